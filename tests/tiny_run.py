"""A tiny run, and the same one broken off: for the tests of what continues."""

import dataclasses
import functools
import io
import json

import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.data.text import TextData
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.train import loop

WORDS = 'the cat sat on a mat and ran off with my hat'.split()


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for i in range(40):
    (folder / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, 40)))
  return folder


def make_experiment(texts):
  mixer = AttentionConfig(heads=2, kv_heads=2, head_dim=8, rotary_dim=8)
  return Experiment(
    model=ModelConfig(264, 16, (Layer(mixer, MLPConfig(16)),), repeats=1),
    data=DataConfig(f'{texts}/*.txt', seq_len=32, batch=8, heldout=0.2),
    optim=OptimConfig(name='muon', lr=1e-2, warmup=2),
    train=TrainConfig(
      steps=9, dtype='float32', log_every=2, eval_every=4, eval_rows=64,
      save_every=3,
    ),
  )  # fmt: skip


def train(experiment, folder, data=None):
  workdir = Workdir(folder)
  workdir.check(experiment)
  try:
    data = data or TextData(experiment.data)
    return loop.train(experiment, workdir, data, io.StringIO())
  finally:
    workdir.unlock()


_make_program = functools.cache(loop.make_program)


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """One compilation for each configuration, wherever its text lies; a killed
  process has its own."""

  def make(experiment, mesh):
    data = dataclasses.replace(experiment.data, path='')
    return _make_program(dataclasses.replace(experiment, data=data), mesh)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'make_program', make)
    yield


@pytest.fixture(scope='module')
def unbroken(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp('unbroken')
  result = train(make_experiment(texts), folder)
  return folder, result


def assert_same_run(folder, unbroken):
  for name in ('metrics.jsonl', 'config.json'):
    assert (folder / name).read_bytes() == (unbroken[0] / name).read_bytes()
  results = [json.loads((f / 'result.json').read_text())
             for f in (folder, unbroken[0])]  # fmt: skip
  for result in results:
    del result['tokens_per_second']
  assert results[0] == results[1]


class Spoiled:
  """Data whose batch of one step runs `spoil` first."""

  def __init__(self, cfg, step, spoil):
    self._data = TextData(cfg)
    self._step, self._spoil = step, spoil

  def __getattr__(self, name):
    return getattr(self._data, name)

  def iterate(self, start, rows):
    for step, batch in enumerate(self._data.iterate(start, rows), start + 1):
      yield self._spoil(batch) or batch if step >= self._step else batch


class Crash(Exception):
  pass


def crash(batch):
  raise Crash
