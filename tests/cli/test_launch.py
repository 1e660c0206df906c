"""The command lines: bad input is one line and status 2, without jax."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '--config=configs/quickstart.py'
TINY = """
import dataclasses
from deltanet_jax import config
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  delta = GatedDeltaNetConfig(1, 1, 8, 8, conv=0, form='recurrent')
  attention = AttentionConfig(heads=1, kv_heads=1, head_dim=8)
  layers = Layer(delta, MLPConfig(8)), Layer(attention, MLPConfig(8))
  quick = config.load('configs/quickstart.py')
  return dataclasses.replace(
    quick,
    model=ModelConfig(264, 16, layers, repeats=1),
    data=dataclasses.replace(
      quick.data, path='{path}', seq_len=32, batch=4, heldout=0.2
    ),
    train=dataclasses.replace(quick.train, steps=2),
  )
"""


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'line {i} of a short text\n' * 20)
  return f'{folder}/*.txt'


@pytest.fixture(scope='module')
def tiny(texts, tmp_path_factory):
  file = tmp_path_factory.mktemp('config') / 'tiny.py'
  file.write_text(TINY.replace('{path}', texts))
  return f'--config={file}'


def _run(module, *flags, imports=()):
  """Runs a main; `imports` are packages whose import ends it."""
  blocked = ''.join(f'sys.modules[{name!r}] = None\n' for name in imports)
  code = (
    'import runpy, sys\n'
    f'{blocked}sys.argv[0] = {module!r}\n'
    f'runpy.run_module({module!r}, run_name="__main__", alter_sys=True)\n'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {'XLA_FLAGS': ''},
  )


def _assert_refused(done, *words):
  assert done.returncode == 2, done.stderr
  assert done.stdout == ''
  assert done.stderr.count('\n') == 1 and done.stderr.startswith('error: ')
  for word in words:
    assert word in done.stderr


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], ['--config=FILE', 'there is configs/quickstart.py,', ' and 6 more']),
    (['--config=configs/quikstart.py'], ['did you mean configs/quickstart']),
    ([CONFIG], ['--workdir']),
    ([CONFIG, '--wrkdir=x'], ['wrkdir', 'workdir']),
    ([CONFIG, '--steps=5'], ['--steps;', 'mean --config.train.steps=5?']),
    ([CONFIG, '--train.step=5'], ['mean --config.train.steps=5?']),
    ([CONFIG, '--batch_size', '3'], ['mean --config.data.batch?']),
    ([CONFIG, '--workdir=x', 'more'], ["'more'"]),
    ([CONFIG, '--config.optim.lrr=1'], ["'lrr'", "mean 'lr'"]),
    ([CONFIG, '--config.train.steps=many'], ['many', 'whole number']),
    ([CONFIG, '--config.model.period.3.mixer.heads=5'], ['5', 'kv_heads 2']),
    ([CONFIG, '--config.model.period.0.mixer.chunk=20'], ['20', '16']),
    (
      [CONFIG, '--config.model.period.0.mixer.chunk=48'],
      ['chunk is 48; give 16, 32, 64 or another 16 * 2^n'],
    ),
    ([CONFIG, '--config.optim.clip=0'], ['optim.clip is 0.0; give more than']),
    ([CONFIG, f'--config.train.seed={2**40}'], ['train.seed is', '4294967295']),
    (
      [CONFIG, '--config.optim.accumulate=3'],
      ['accumulate 3', 'multiple of 3'],
    ),
    ([CONFIG, '--workdir=x', '--config.data.path=no/such*'], ['no/such*']),
    ([CONFIG, '--workdir=configs/quickstart.py'], ['is a file']),
  ],
)
def test_a_bad_command_line_is_refused_before_jax_is_imported(flags, words):
  done = _run('launch.train', *flags, imports=['jax'])
  _assert_refused(done, *words)


def test_text_shorter_than_a_batch_is_refused(tiny, tmp_path):
  done = _run(
    'launch.train', tiny, f'--workdir={tmp_path / "run"}',
    '--config.data.seq_len=100000',
  )  # fmt: skip
  _assert_refused(done, '100000')
  assert not (tmp_path / 'run').exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny, tmp_path):
  done = _run(
    'launch.train', tiny, f'--workdir={tmp_path}', '--config.model.vocab=100'
  )
  _assert_refused(done, '257', '100')


@pytest.mark.parametrize('main', ['train', 'generate', 'quickstart'])
def test_help_answers_without_jax(main):
  done = _run(f'launch.{main}', '--help', imports=['jax'])
  assert done.returncode == 0, done.stderr
  assert f'launch.{main}' in done.stdout or 'quickstart.sh' in done.stdout
  assert '--workdir' in done.stdout


def test_generation_refuses_bad_input(tmp_path):
  done = _run('launch.generate', f'--workdir={tmp_path}', imports=['jax'])
  _assert_refused(done, 'config.json')
  done = _run('launch.generate', '--workdir=x', '--max_tokens=0')
  _assert_refused(done, 'max_tokens')


def test_train_then_generate_then_train_again(tiny, tmp_path):
  train = [tiny, f'--workdir={tmp_path}']
  done = _run('launch.train', *train)
  assert done.returncode == 0, done.stderr
  assert 'heldout_bits_per_byte' in done.stdout
  assert 'step 2/2' in done.stderr

  prompt = ['launch.generate', f'--workdir={tmp_path}', '--prompt=line \u00e9']
  flags = ['--max_tokens=5', '--temperature=1', '--top_k=50', '--top_p=0.9']
  first, again = (_run(*prompt, *flags, '--seed=3') for _ in range(2))
  assert first.returncode == 0, first.stderr
  assert first.stdout.startswith('line \u00e9') and first.stdout.endswith('\n')
  assert first.stdout == again.stdout
  _assert_refused(_run(*prompt, '--temperature=-1'), 'temperature', '-1')

  # done already: jax is not needed to say so
  finished = _run('launch.train', *train, imports=['jax'])
  assert finished.returncode == 0, finished.stderr
  assert finished.stdout == done.stdout
  other = _run('launch.train', *train, '--config.optim.lr=1', imports=['jax'])
  _assert_refused(other, 'optim.lr', str(tmp_path))


def test_quickstart_shows_its_four_results(tiny, tmp_path):
  done = _run('launch.quickstart', tiny, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  for sign in ('order-2', 'order-3', 'def read_lines(', '262,144',
               'all attention', 'loss.png', 'metrics.jsonl'):  # fmt: skip
    assert sign in done.stdout
  lines = [line.split() for line in done.stdout.splitlines()]
  sizes = {
    ' '.join(words[:2]): np.array(words[2:], float)
    for words in lines
    if words[:2] in (['this', 'model'], ['all', 'attention'])
    and len(words) == 5
  }
  assert (sizes['this model'] < sizes['all attention']).all()


@pytest.mark.parametrize(
  'script', ['launch/quickstart.sh', 'tests/run.sh', 'launch/env.sh', '.ci/run']
)
def test_the_scripts_parse(script):
  path = ROOT / script
  subprocess.run(['bash', '-n', path], check=True)
  assert os.access(path, os.X_OK) == (path.name != 'env.sh')


def test_an_old_python_is_refused_with_a_clear_line(tmp_path):
  old = tmp_path / 'python3'
  old.write_text(
    '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n'
  )
  old.chmod(0o755)
  done = subprocess.run(
    ['bash', '-c', 'source launch/env.sh; make_env "$1"', 'bash', tmp_path],
    cwd=ROOT,
    env={'PATH': str(tmp_path)},
    capture_output=True,
    text=True,
    executable='/bin/bash',
  )
  assert done.returncode == 2
  assert 'Python 3.11 or newer' in done.stderr and '3.9.1' in done.stderr
  assert not (tmp_path / '.venv').exists()
