"""Ids of the hub stand where folders do; a stub takes the library's place."""

import fnmatch
import inspect
import sys
import types

import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import hub


@pytest.fixture
def library(monkeypatch, tmp_path):
  """A huggingface_hub that notes what it is asked and gives `tmp_path`."""
  stub, asked = types.ModuleType('huggingface_hub'), []

  def snapshot_download(repo_id, **settings):
    asked.append((repo_id, settings))
    return str(tmp_path)

  stub.snapshot_download, stub.asked = snapshot_download, asked
  monkeypatch.setitem(sys.modules, 'huggingface_hub', stub)
  return stub


@pytest.mark.parametrize(
  'given, repository, revision',
  [
    ('hub:Qwen/Qwen3-0.6B', 'Qwen/Qwen3-0.6B', None),
    ('Qwen/Qwen3-0.6B', 'Qwen/Qwen3-0.6B', None),
    ('hub:Qwen/Qwen3-0.6B@refs/pr/1', 'Qwen/Qwen3-0.6B', 'refs/pr/1'),
    ('a/b_c@v1.0', 'a/b_c', 'v1.0'),
  ],
)
def test_an_id_is_fetched(given, repository, revision, library, tmp_path):
  assert hub.find_folder(given) == tmp_path
  [(asked, settings)] = library.asked
  assert (asked, settings['revision']) == (repository, revision)


def test_only_weights_settings_and_tokenizers_at_the_top_are_asked_for(library):
  hub.find_folder('hub:a/b')
  [(_, settings)] = library.asked
  filters = fnmatch.fnmatchcase
  names = [
    'model-00001-of-00002.safetensors', 'model.safetensors.index.json',
    'config.json', 'tokenizer.json', 'merges.txt', 'chat_template.jinja',
    'pytorch_model.bin', 'README.md', 'modeling.py', 'original/x.safetensors',
  ]  # fmt: skip
  match = lambda name, key: any(filters(name, p) for p in settings[key])
  kept = [
    name
    for name in names
    if match(name, 'allow_patterns') and not match(name, 'ignore_patterns')
  ]
  assert kept == names[:6]


def test_the_library_takes_what_we_ask():
  real = pytest.importorskip('huggingface_hub')
  inspect.signature(real.snapshot_download).bind(
    'a/b', revision=None, allow_patterns=['*'], ignore_patterns=['*/*']
  )


def test_a_folder_is_never_fetched(library, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  assert hub.find_folder('org/name') == tmp_path / 'org' / 'name'
  for missing in (f'{tmp_path}/no', './org/no', 'no'):
    with pytest.raises(ConfigError, match='no such folder; give'):
      hub.find_folder(missing)
  assert not library.asked


def test_a_run_knows_its_folder_again_after_it_is_gone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  [name] = hub.list_names('org/name')
  (tmp_path / 'org' / 'name').rmdir()
  assert name in hub.list_names('org/name')


@pytest.mark.parametrize('given', ['hub:name', 'hub:a/b/c', 'hub:a/b@'])
def test_what_is_no_id_is_refused(given, library):
  with pytest.raises(
    ConfigError, match='not the id of a model; give hub:ORG/NAME'
  ):
    hub.find_folder(given)
  assert not library.asked


def test_no_library_and_no_network_are_one_line(library, monkeypatch):
  def offline(*args, **kwargs):
    raise ConnectionError('cannot reach\nthe hub')

  library.snapshot_download = offline
  with pytest.raises(ConfigError, match='from the hub: cannot reach the hub'):
    hub.find_folder('a/b')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ConfigError, match='pip install huggingface_hub'):
    hub.find_folder('a/b')
