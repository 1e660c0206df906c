"""A mixer in a user's own module: trained, resumed, generated from, scored;
from a folder outside the clone."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MIXER = '''
import dataclasses

from deltanet_jax.config.mixers import GatedDeltaNetConfig


@dataclasses.dataclass(frozen=True)
class HalvedConfig(GatedDeltaNetConfig):
  """Half of what a Gated DeltaNet makes."""

  module = 'halved_module:Halved'
  share: float = 0.5
'''
MODULE = """
from deltanet_jax.mixers.gated_deltanet import GatedDeltaNet


class Halved(GatedDeltaNet):
  def __call__(self, x, *args, **kwargs):
    return super().__call__(self.cfg.share * x, *args, **kwargs)
"""
CONFIG = """
from halved import HalvedConfig

from deltanet_jax.config.experiment import (
  DataConfig, Experiment, Layer, MLPConfig, ModelConfig, OptimConfig,
  TrainConfig,
)


def get_config():
  layer = Layer(HalvedConfig(1, 1, 8, 8, chunk=16), MLPConfig(16))
  return Experiment(
    ModelConfig(257, 16, (layer,), repeats=1),
    DataConfig('*.txt', seq_len=16, batch=2, heldout=0.2),
    OptimConfig(lr=1e-2, warmup=1),
    TrainConfig(steps=2, dtype='float32', log_every=1, eval_every=2,
                eval_rows=2, save_every=1),
  )
"""


def run(main, *args, cwd):
  return subprocess.run(
    [sys.executable, '-m', f'launch.{main}', *args],
    cwd=cwd,
    text=True,
    capture_output=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('mine')
  (folder / 'lib').mkdir()
  (folder / 'lib' / 'halved.py').write_text(MIXER)
  (folder / 'lib' / 'halved_module.py').write_text(MODULE)
  (folder / 'lib' / 'tiny.py').write_text(CONFIG)
  for i in range(20):
    (folder / f'{i}.txt').write_text(f'the cat sat on mat {i} ' * 4)
  done = run('train', '--config=lib/tiny.py', '--workdir=run', cwd=folder)
  assert done.returncode == 0, done.stderr
  return folder


def test_its_class_is_stored_with_its_module(folder):
  text = (folder / 'run' / 'config.json').read_text()
  assert '"_type": "halved:HalvedConfig"' in text


def test_a_run_goes_on_with_its_file_and_not_without(folder):
  metrics = folder / 'run' / 'metrics.jsonl'
  unbroken = metrics.read_bytes()
  # as if it had been killed after its first step was saved
  (folder / 'run' / 'result.json').unlink()
  shutil.rmtree(folder / 'run' / 'checkpoints' / '2')
  done = run('train', '--config=lib/tiny.py', '--workdir=run', cwd=folder)
  assert done.returncode == 0 and 'after step 1' in done.stderr, done.stderr
  assert metrics.read_bytes() == unbroken
  for main in 'train', 'generate':
    done = run(main, '--workdir=run', cwd=folder)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'give --config=FILE' in done.stderr


def test_it_is_generated_from_and_scored(folder):
  given = '--workdir=run', '--config=lib/tiny.py'
  done = run('generate', *given, '--prompt=the', '--max_tokens=3', cwd=folder)
  assert done.returncode == 0 and done.stdout.startswith('the'), done.stderr
  done = run('evaluate', *given, '--data=*.txt', cwd=folder)
  assert done.returncode == 0 and 'bits_per_byte' in done.stdout, done.stderr
