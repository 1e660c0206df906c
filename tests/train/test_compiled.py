"""The folder of the compilation cache, and the messages about it."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from deltanet_jax.train import compiled

TINY = """
from tests.tiny_run import make_experiment

def get_config():
  return make_experiment({texts!r})
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty home folder; restores JAX's setting afterwards."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv(compiled.VARIABLE, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  jax.config.update('jax_compilation_cache_dir', None)
  yield tmp_path / 'cache'
  jax.config.update('jax_compilation_cache_dir', before)


def test_programs_are_kept_in_a_folder_that_is_named(cache):
  assert compiled.describe_kept() == 'up to a minute or two'
  assert compiled.keep_programs() is None
  folder = cache / 'deltanet_jax' / 'compiled'
  assert folder.is_dir() and not list(folder.iterdir())
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert str(folder) in compiled.describe_kept()


def test_without_xdg_they_lie_in_the_home(cache, monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(cache))
  assert compiled.find_folder() == cache / '.cache/deltanet_jax/compiled'


@pytest.mark.parametrize('value', ['', '/elsewhere'])
def test_a_folder_that_the_user_chose_wins(cache, monkeypatch, value):
  monkeypatch.setenv(compiled.VARIABLE, value)
  assert compiled.keep_programs() is None
  # JAX reads the variable when it is imported
  assert jax.config.jax_compilation_cache_dir is None and not cache.exists()


def test_a_folder_that_cannot_be_written_is_one_line(cache):
  cache.write_text('a file')
  note = compiled.keep_programs()
  assert str(cache) in note and compiled.VARIABLE in note and '\n' not in note
  assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
@pytest.mark.long
def test_a_second_start_finds_the_programs_and_gives_the_same_run(tmp_path):
  texts = tmp_path / 'texts'
  texts.mkdir()
  for i in range(40):
    (texts / f'{i}.txt').write_text(f'{i} a cat sat on {i * i} mats\n' * 9)
  file = tmp_path / 'tiny.py'
  file.write_text(TINY.format(texts=str(texts)))
  environment = os.environ | {
    'XDG_CACHE_HOME': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  environment.pop(compiled.VARIABLE, None)
  folder, before = tmp_path / 'cache' / 'deltanet_jax' / 'compiled', None
  for name in ('first', 'second'):
    done = subprocess.run(
      [sys.executable, '-m', 'launch.train', f'--config={file}',
       f'--workdir={tmp_path / name}'],
      cwd=pathlib.Path(__file__).parents[2], env=environment,
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    said = next(i for i, x in enumerate(lines) if 'compiling the step' in x)
    assert str(folder) in lines[said]
    assert 'the step is compiled' in lines[said + 1]
    programs = {path.name for path in folder.glob('*-cache')}
    assert before is None or programs == before
    before = programs
  assert any('step' in name for name in before)
  runs = [tmp_path / name / 'metrics.jsonl' for name in ('first', 'second')]
  assert runs[0].read_bytes() == runs[1].read_bytes()
