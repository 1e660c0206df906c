"""`python -m deltanet_jax NAME`: every command by its name."""

import pathlib
import subprocess
import sys

import pytest

from deltanet_jax.cli import command
from deltanet_jax.cli.deltanet import COMMANDS

ROOT = pathlib.Path(__file__).parents[2]


def run(*args):
  return subprocess.run(
    [sys.executable, '-m', *args], cwd=ROOT, text=True, capture_output=True
  )


def test_every_launch_module_is_a_command():
  mains = {p.stem for p in (ROOT / 'launch').glob('*.py')} - {'__init__'}
  assert mains == set(COMMANDS)
  for name in mains:
    lines = (ROOT / 'launch' / f'{name}.py').read_text().splitlines()
    assert f'from deltanet_jax.{COMMANDS[name][0]} import main' in lines


def test_help_lists_the_commands_and_imports_none():
  code = (
    'import sys; from deltanet_jax.cli.deltanet import main\n'
    'sys.argv = ["deltanet", "--help"]; main()\n'
    'sys.exit(any("lab" in x or x == "jax" for x in sys.modules))'
  )
  done = run('deltanet_jax')
  assert done.returncode == 0 and all(x in done.stdout for x in COMMANDS)
  quiet = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
  assert quiet.returncode == 0


def test_a_command_is_that_of_launch():
  one, two = run('deltanet_jax', 'calc', '--help'), run('launch.calc', '--help')
  assert one.returncode == two.returncode == 0
  assert '--preset' in one.stdout and 'launch' not in one.stdout
  spelled = two.stdout.replace('python -m launch.', 'python -m deltanet_jax ')
  assert one.stdout == spelled.replace('launch.', 'python -m deltanet_jax ')


@pytest.mark.parametrize(
  'program, spelled',
  [
    ('deltanet calc', 'deltanet'),
    ('python -m deltanet_jax calc', 'python -m deltanet_jax'),
    ('/a b/launch/calc.py', None),
  ],
)
def test_texts_spell_commands_as_they_were_started(
  program, spelled, monkeypatch
):
  monkeypatch.setattr(sys, 'argv', [program])
  text = 'try python -m launch.calc, or launch.train; launch/env.sh, launch.'
  found = command.spell_command(text)
  if spelled is None:
    assert found == text
  else:
    assert found == (
      f'try {spelled} calc, or {spelled} train; launch/env.sh, launch.'
    )


def test_a_misspelt_name_is_one_line():
  done = run('deltanet_jax', 'trian')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr == "error: no command 'trian'; did you mean train?\n"
