"""What the pages say is there: commands, their flags and settings, files."""

import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from deltanet_jax import config
from deltanet_jax.cli.deltanet import COMMANDS
from tests import released

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = 'configs', 'deltanet_jax', 'docs', 'launch', 'tests'
PAGES = [
  str(path.relative_to(ROOT))
  for paths in (
    ROOT.glob('*.md'),
    *(ROOT.glob(f'{x}/**/*.md') for x in FOLDERS),
  )
  for path in sorted(paths)
]


def _list_commands():
  """(page, command line without its continuations)."""
  for page in PAGES:
    text = (ROOT / page).read_text().replace('\\\n', '')
    for line in re.findall(
      r'^    (?:\w+=\S+ +)*((?:python -m|deltanet) .*)$', text, re.M
    ):
      yield page, re.sub('^deltanet ', 'python -m launch.', line)


COMMAND_LINES = list(_list_commands())


@functools.cache
def _show_help(module):
  done = subprocess.run(
    [sys.executable, '-m', module, '--help'],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize('page,line', COMMAND_LINES)
def test_commands_and_their_flags_exist(page, line):
  _, _, module, *arguments = shlex.split(line, comments=True)
  if not module.startswith('launch.'):
    # sphinx is there with the extra docs alone
    assert module == 'sphinx' or importlib.util.find_spec(module)
    return
  if module == 'launch.--help':
    return
  assert module.removeprefix('launch.') in COMMANDS
  file, changes, rest = config.split_argv(
    [word for word in arguments if word not in ('...', '…')]
  )
  for flag in re.findall(r'^--(\w+)', '\n'.join(rest), re.M):
    assert re.search(rf'^ +--(\[no\])?{flag}\b', _show_help(module), re.M), flag
  if file and '=' not in file and (ROOT / file.partition(':')[0]).is_file():
    config.read_experiment(str(ROOT / file), changes)


def test_there_are_commands():
  assert len(COMMAND_LINES) > 30


@pytest.mark.parametrize('page', PAGES)
def test_files_and_links_exist(page):
  text = (ROOT / page).read_text()
  links = [
    link.partition('#')[0]
    for link in re.findall(r'\]\(([^)\s]+)\)', text)
    if ':' not in link
  ]
  for link in filter(None, links):
    assert (ROOT / page).parent.joinpath(link).exists(), link
  paths = re.findall(
    r'`((?:deltanet_jax|configs|launch|docs|tests)/[\w./-]*)`', text
  )
  for path in paths:
    if 'foo' not in path:  # the name of a file to be added
      assert (ROOT / path).exists(), path


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize('page', ['README.md', 'docs/library.md'])
def test_the_python_of_the_pages_runs(page, tmp_path, monkeypatch):
  """A page's blocks in order; a fixture stands for the released weights."""
  released.make('qwen3_next', tmp_path / 'Qwen3-Next-80B-A3B-Instruct')
  monkeypatch.chdir(tmp_path)
  text, names = (ROOT / page).read_text(), {}
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.M | re.S)
  assert len(blocks) >= 3
  for block in blocks:
    exec(compile(block, page, 'exec'), names)
  assert names['y'].shape == names['x'].shape
  assert names['logits'].ndim == 3
