"""What all mains share: output that nobody reads, or that has few letters."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(main, shell='{}', **env):
  """The command of a main that is the function `main` of its flags."""
  code = (
    'from deltanet_jax.cli import command\n\n'
    f'def main(taken):\n{main}\n\ncommand.run_command(main)'
  )
  command = f'{sys.executable} -c "$CODE"'
  return subprocess.run(
    ['bash', '-c', f'set -o pipefail; {shell.format(command)}'],
    cwd=ROOT,
    capture_output=True,
    env=os.environ | {'CODE': code} | env,
  )


@pytest.mark.parametrize(
  'main',
  [
    '  for i in range(99999): print(i)',
    '  print(1)',  # held back until the end
    '  import sys\n  for i in range(99999): print(i, file=sys.stderr)',
    '  import sys\n  print(1, flush=True); return 0',
  ],
)
def test_who_has_read_enough_ends_a_command_quietly(main):
  # the reader is gone before anything is written
  done = run(main, '{{ sleep 0.2; {} 2>&1; }} | true')
  assert (done.returncode, done.stdout, done.stderr) == (141, b'', b'')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_output_to_a_full_disk_is_one_line():
  done = run('  print(1)', '{} > /dev/full')
  assert done.returncode == 1
  assert done.stderr == b'error: output: No space left on device\n'


def test_letters_that_the_output_lacks_are_shown_as_numbers():
  smile = "  print('a \\u00e9 \\U0001f600')"
  done = run(smile, PYTHONIOENCODING='ascii')
  assert (done.returncode, done.stderr) == (0, b'')
  assert done.stdout == b'a \\xe9 \\U0001f600\n'
  done = run(smile, PYTHONIOENCODING='utf-8')
  assert done.stdout == 'a \u00e9 \U0001f600\n'.encode()


def test_a_refusal_is_one_line_whatever_it_quotes():
  said = '  from deltanet_jax.config import ConfigError\n  '
  done = run(said + "raise ConfigError('a\\nb\\r\\nc')")
  assert (done.returncode, done.stdout) == (2, b'')
  assert done.stderr == b'error: a b c\n'


def launch(main, *args):
  """A main as its user runs it; importing jax ends it."""
  code = (
    'import runpy, sys\nsys.modules["jax"] = None\n'
    f'runpy.run_module("launch.{main}", run_name="__main__", alter_sys=True)'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True
  )


@pytest.mark.parametrize(
  'flag, words',
  [
    (b'--prompt=a\xff\xfe', '--prompt is not UTF-8 text: the byte 0xff'),
    (b'--seed=4294967296', '[0, 4294967295]'),
    (b'--seed=-1', '[0, 4294967295]'),
    (b'--seed=99999999999999999999', '[0, 4294967295]'),
    (b'--seed=1.5', 'seed'),
  ],
)
def test_generate_refuses_what_means_nothing(flag, words):
  done = launch('generate', '--released=none', os.fsdecode(flag))
  assert (done.returncode, done.stdout) == (2, b'')
  message = done.stderr.decode()
  assert message.count('\n') == 1 and words in message


@pytest.mark.parametrize('seed', [-1, 2**32 - 1])
def test_first_steps_refuses_seeds_that_are_others(seed):
  done = launch('first_steps', f'--seed={seed}')
  assert (done.returncode, done.stdout) == (2, b'')
  assert b'[0, 4294967294]' in done.stderr
