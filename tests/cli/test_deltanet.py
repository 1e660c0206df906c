"""`python -m deltanet_jax NAME`: every command by its name."""

import pathlib
import subprocess
import sys

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
  assert one.stdout == two.stdout and '--preset' in one.stdout


def test_a_misspelt_name_is_one_line():
  done = run('deltanet_jax', 'trian')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr == "error: no command 'trian'; did you mean train?\n"
