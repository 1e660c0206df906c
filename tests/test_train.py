"""A step, and whole runs: broken off, resumed, on other meshes."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.data.text import TextData
from deltanet_jax.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.mixers.config import AttentionConfig
from deltanet_jax.train import log, loop, state as states, step as steps
from deltanet_jax.train.auxiliary import Told
from deltanet_jax.workdir import Workdir

WORDS = 'the cat sat on a mat and ran off with my hat'.split()


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for i in range(40):
    (folder / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, 40)))
  return folder


def _experiment(texts):
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


def _train(experiment, folder, data=None):
  workdir = Workdir(folder)
  workdir.check(experiment)
  try:
    data = data or TextData(experiment.data)
    return loop.train(experiment, workdir, data, io.StringIO())
  finally:
    workdir.release()


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """One compilation for each configuration; the killed process has its own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'make_program', functools.cache(loop.make_program))
    yield


@pytest.fixture(scope='module')
def unbroken(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp('unbroken')
  result = _train(_experiment(texts), folder)
  return folder, result


def _assert_same_run(folder, unbroken):
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


def _crash(batch):
  raise Crash


def _line_loss(params, batch):
  error = (batch['tokens'] @ params['w'] - batch['targets']) ** 2
  nats = jnp.sum(batch['weights'] * error)
  return nats, Told(nats, reports=())


def _line(rows=8):
  keys = jax.random.split(jax.random.key(0), 4)
  batch = {
    'tokens': jax.random.normal(keys[0], (rows, 5, 3)),
    'targets': jax.random.normal(keys[1], (rows, 5)),
    # uneven: a mean of the micro-batches' means would be another number
    'weights': jax.random.bernoulli(keys[2], 0.5, (rows, 5)).astype(float),
  }
  return {'w': jax.random.normal(keys[3], (3,))}, batch


def test_four_micro_batches_equal_one_large_batch():
  params, batch = _line()
  weights = batch['weights'].reshape(2, 4, 5).sum((0, 2))
  assert len(set(weights.tolist())) > 1
  one = steps.told_and_grads(_line_loss, params, batch, 1)
  four = steps.told_and_grads(_line_loss, params, batch, 4)
  mean = _line_loss(params, batch)[0] / batch['weights'].sum()
  np.testing.assert_allclose(one[0].nats, mean, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), four, one
  )


def test_a_batch_without_finite_loss_changes_nothing_and_is_counted():
  params, batch = _line()
  optimizer = optax.adam(0.1)
  step = jax.jit(
    lambda state, batch: steps.train_step(
      state, batch, objective=_line_loss, optimizer=optimizer,
      rate=lambda step: 1.0 * step, accumulate=1, bias_rate=0.0,
    )
  )  # fmt: skip
  first, _ = step(states.create(params, optimizer), batch)
  bad = batch | {'targets': batch['targets'].at[0, 0].set(jnp.nan)}
  bad['weights'] = jnp.ones_like(bad['weights'])
  second, metrics = step(first, bad)
  third, metrics_bad = step(second, bad)
  assert not np.isfinite(metrics['loss'])
  for kept in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(first, kept), getattr(third, kept)
    )
  counters = [int(third.step), int(third.skipped), int(third.streak)]
  assert counters == [3, 2, 2]
  assert int(metrics_bad['streak']) == 2 and float(metrics_bad['lr']) == 1.0
  fourth, _ = step(third, batch)
  assert [int(fourth.skipped), int(fourth.streak)] == [2, 0]
  assert not np.array_equal(fourth.params['w'], third.params['w'])


def test_a_run_leaves_all_its_files(unbroken, texts):
  folder, result = unbroken
  records = log.read(folder / 'metrics.jsonl')
  losses = {r['step']: r['loss'] for r in records if 'loss' in r}
  assert list(losses) == [2, 4, 6, 8, 9]
  assert losses[9] < losses[2] < 6
  scores = [r for r in records if 'heldout_loss' in r]
  assert [r['step'] for r in scores] == [4, 8, 9]
  # these rows are all of this text
  for name in ('heldout_loss', 'heldout_bits_per_byte'):
    np.testing.assert_allclose(scores[-1][name], result[name])
  assert records[-2]['tokens'] == 9 * 8 * 32
  assert result == json.loads((folder / 'result.json').read_text())
  data = TextData(_experiment(texts).data)
  tokens = data.heldout_bytes + len(list(data.heldout_documents()))
  bits = result['heldout_loss'] * tokens / data.heldout_bytes / np.log(2)
  np.testing.assert_allclose(result['heldout_bits_per_byte'], bits)
  assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')
  assert list((folder / 'tensorboard').glob('events*'))


@pytest.mark.parametrize('step', [1, 5, 8])
def test_a_crash_and_a_restart_equal_an_unbroken_run(
  texts, tmp_path, unbroken, step
):
  experiment = _experiment(texts)
  with pytest.raises(Crash):
    _train(experiment, tmp_path, Spoiled(experiment.data, step, _crash))
  # as if more had been written before the end, the last line in part
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 9, "loss": 1.0}\n{"step": 9, "heldo')
  _train(experiment, tmp_path)
  _assert_same_run(tmp_path, unbroken)


def test_sigterm_saves_after_the_step_and_the_run_goes_on(
  texts, tmp_path, unbroken
):
  experiment = _experiment(texts)

  def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)

  stopped = _train(experiment, tmp_path, Spoiled(experiment.data, 5, terminate))
  assert stopped == signal.SIGTERM
  assert (tmp_path / 'checkpoints' / '5').is_dir()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  _train(experiment, tmp_path)
  _assert_same_run(tmp_path, unbroken)


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_good_checkpoint(
  texts, tmp_path, monkeypatch
):
  assert steps.MAX_STREAK == 10
  monkeypatch.setattr(steps, 'MAX_STREAK', 3)
  experiment = _experiment(texts)

  def poison(batch):
    return batch | {'weights': batch['weights'] * np.nan}

  with pytest.raises(loop.NonFiniteError, match='steps 5 to 7 had no finite'):
    _train(experiment, tmp_path, Spoiled(experiment.data, 5, poison))
  records = log.read(tmp_path / 'metrics.jsonl')
  last = [r for r in records if 'loss' in r][-1]
  assert (last['step'], last['loss'], last['skipped']) == (6, None, 2)
  # the checkpoint holds finite parameters: the run can be taken up
  result = _train(experiment, tmp_path)
  assert result['step'] == 9 and np.isfinite(result['heldout_loss'])


def test_eight_devices_give_the_loss_of_one(texts, tmp_path, unbroken):
  experiment = dataclasses.replace(
    _experiment(texts), mesh=MeshConfig(fsdp=-1, seq=2, tensor=2)
  )
  # once from the start, and once from a checkpoint that one device wrote
  other = tmp_path / 'resumed'
  shutil.copytree(unbroken[0] / 'checkpoints' / '6', other / 'checkpoints/6')
  shutil.copy(unbroken[0] / 'metrics.jsonl', other)
  for folder in (tmp_path / 'whole', other):
    _train(experiment, folder)
    got = log.read(folder / 'metrics.jsonl')
    for a, b in zip(got, log.read(unbroken[0] / 'metrics.jsonl'), strict=True):
      for name in {'loss', 'heldout_loss'} & b.keys():
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5)
    assert Workdir(folder).read().mesh == MeshConfig(fsdp=2, seq=2, tensor=2)


def test_a_mesh_larger_than_the_machine_is_bad_input(texts, tmp_path):
  experiment = dataclasses.replace(_experiment(texts), mesh=MeshConfig(seq=16))
  with pytest.raises(ConfigError, match='16 devices'):
    _train(experiment, tmp_path)
  assert not list(tmp_path.iterdir())  # the folder is free for another try


def test_a_killed_process_continues_bit_for_bit(texts, tmp_path, unbroken):
  config = tmp_path / 'tiny.py'
  config.write_text(
    f'from tests.test_train import _experiment\n'
    f'def get_config():\n  return _experiment({str(texts)!r})\n'
  )
  folder = tmp_path / 'run'
  command = [
    sys.executable, '-m', 'launch.train', f'--config={config}',
    f'--workdir={folder}',
  ]  # fmt: skip
  root = pathlib.Path(__file__).parents[1]
  with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as child:
    deadline = time.monotonic() + 120
    while not (folder / 'checkpoints' / '3').is_dir():
      assert child.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)
    child.kill()
  assert child.returncode == -signal.SIGKILL
  assert not (folder / 'result.json').exists()
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'continuing after step' in done.stderr
  assert 'MiB more for activations' in done.stderr
  _assert_same_run(folder, unbroken)


def test_a_folder_of_another_configuration_is_refused(texts, tmp_path):
  experiment = _experiment(texts)
  workdir = Workdir(tmp_path)
  workdir.check(experiment)
  workdir.claim(experiment)
  same = dataclasses.replace(
    experiment,
    train=dataclasses.replace(experiment.train, save_every=7, keep=5),
    mesh=MeshConfig(data=2),
  )
  workdir.check(same)
  for part, change in (
    ('optim', {'lr': 0.5}),
    ('train', {'steps': 99}),
    ('data', {'seed': 7}),
  ):
    changed = dataclasses.replace(getattr(experiment, part), **change)
    other = dataclasses.replace(experiment, **{part: changed})
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=rf'{part}\.{name}: .* != {value}'):
      workdir.check(other)


def test_two_processes_do_not_share_a_folder(texts, tmp_path):
  experiment = _experiment(texts)
  first = Workdir(tmp_path)
  first.claim(experiment)
  with pytest.raises(ConfigError, match='another process trains'):
    Workdir(tmp_path).claim(experiment)
  first.release()
  Workdir(tmp_path).claim(experiment)


def test_progress_lines_come_now_and_then_when_nobody_watches():
  clock = log.Clock(tokens=100, total=4)
  stream = io.StringIO()
  progress = log.Progress(4, 2, stream)
  for step in range(1, 5):
    clock.start()
    clock.stop()
    progress.step(step, 2.0, 2.885, clock)
  lines = stream.getvalue().splitlines()
  assert len(lines) == 2 and '\r' not in stream.getvalue()
  assert lines[0].startswith('step 2/4  loss 2.0000  2.885 bits/byte')
  assert lines[1].endswith('0m00s left')
