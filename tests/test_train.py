"""A step, and whole runs: broken off, resumed, on other meshes."""

import dataclasses
import errno
import functools
import io
import json
import math
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
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver

from deltanet_jax.config import ConfigError
from deltanet_jax.data.text import TextData
from deltanet_jax.evals.perplexity import Score
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
from launch import train as launch_train

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


def _events(folder):
  """{(name, step): value} of TensorBoard's files, read as its format says."""
  from tensorboardX.proto.event_pb2 import Event

  found = {}
  for path in sorted((folder / 'tensorboard').glob('events*')):
    raw, at = path.read_bytes(), 0
    while at < len(raw):
      size = int.from_bytes(raw[at : at + 8], 'little')
      event = Event.FromString(raw[at + 12 : at + 12 + size])
      at += size + 16  # length, its checksum, the event, its checksum
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
  return found


def test_tensorboard_has_the_numbers_of_the_lines(unbroken):
  found = _events(unbroken[0])
  for name in ('metrics.jsonl', 'timing.jsonl'):
    for record in log.read(unbroken[0] / name):
      for key in record.keys() - {'step'}:
        value = found.pop((key, record['step']))
        np.testing.assert_allclose(value, record[key], rtol=1e-6)
  assert not found


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
    # all devices that there are, also where there are others
    assert Workdir(folder).read().mesh == experiment.mesh


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


def _strict(path):
  """JSON as its standard has it: without NaN and Infinity."""

  def refuse(name):
    raise AssertionError(f'{name} in {path}')

  return [
    json.loads(text, parse_constant=refuse)
    for text in (
      path.read_text().splitlines()
      if path.suffix == '.jsonl'
      else [path.read_text()]
    )
  ]


@pytest.mark.parametrize('what', ['nan', 'overflow'])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(what):
  params, batch = _line()
  scale = {'nan': jnp.nan, 'overflow': 3e38}[what]
  optimizer = optax.chain(
    optax.adam(0.1),
    # of finite gradients: what b2 = 1 or a rate of 1e38 make of them
    optax.stateless(lambda g, p: jax.tree.map(lambda x: x * scale * 100, g)),
  )
  step = jax.jit(
    lambda state, batch: steps.train_step(
      state, batch, objective=_line_loss, optimizer=optimizer,
      rate=lambda step: 1.0, accumulate=1, bias_rate=0.0,
    )
  )  # fmt: skip
  first = states.create(params, optimizer)
  second, metrics = step(first, batch)
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  for kept in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(first, kept), getattr(second, kept)
    )
  assert [int(second.step), int(second.skipped), int(second.streak)] == [1] * 3


def _drop(folder, *steps):
  """As if the process had ended after an earlier checkpoint."""
  (folder / 'result.json').unlink()
  for step in steps:
    shutil.rmtree(folder / 'checkpoints' / str(step))


@pytest.fixture
def begun(unbroken, tmp_path):
  """A copy of the unbroken run that ended after step 6 of 9."""
  folder = tmp_path / 'run'
  shutil.copytree(unbroken[0], folder)
  _drop(folder, 9)
  return folder


@pytest.fixture
def other_texts(texts, tmp_path):
  """The texts with one file more."""
  folder = tmp_path / 'other'
  shutil.copytree(texts, folder)
  (folder / 'new.txt').write_text('zq xj ' * 40)
  return folder


def _with(texts, **changes):
  """(the experiment of the unbroken run, TextData of other files)."""
  experiment = _experiment(texts)
  data = dataclasses.replace(experiment.data, **changes)
  return experiment, TextData(data)


@pytest.mark.parametrize('change', ['more', 'fewer', 'bytes', 'order'])
def test_a_run_whose_text_has_changed_is_refused_by_what_changed(
  texts, other_texts, begun, change
):
  old, words = other_texts / '3.txt', {
    'more': ['files: 40 before, 41 now', 'documents: 40 before, 41 now'],
    'fewer': ['files: 40 before, 39 now', 'bytes: '],
    'bytes': ['as many files, documents and bytes, and others among them'],
    'order': ['as many files, documents and bytes, and others among them'],
  }[change]  # fmt: skip
  if change != 'more':
    (other_texts / 'new.txt').unlink()
  if change == 'fewer':
    old.unlink()
  elif change == 'bytes':
    held = TextData(_experiment(other_texts).data).heldout_documents()
    texts_ = sorted(other_texts.glob('*.txt'))
    first, second = [p for p in texts_ if p.read_bytes() not in set(held)][:2]
    first.write_bytes(first.read_bytes()[::-1])
  elif change == 'order':
    (other_texts / '0.txt').rename(other_texts / 'z.txt')
  experiment, data = _with(texts, path=f'{other_texts}/*.txt')
  before = {p: p.stat().st_mtime_ns for p in begun.rglob('*') if p.is_file()}
  with pytest.raises(ConfigError) as error:
    _train(experiment, begun, data)
  message = str(error.value)
  if change == 'bytes' and words[0] not in message:
    words = ['held-out documents: ']  # the new content fell on that side
  assert '\n' not in message and '--new_text' in message
  assert all(word in message for word in words), message
  after = {p: p.stat().st_mtime_ns for p in begun.rglob('*') if p.is_file()}
  assert after == before  # nothing was written


def test_a_run_told_so_goes_on_with_another_text_from_its_first_row(
  texts, other_texts, begun, unbroken
):
  experiment = _experiment(texts)
  data = dataclasses.replace(experiment.data, path=f'{other_texts}/*.txt')
  other = dataclasses.replace(experiment, data=data)
  with pytest.raises(ConfigError, match='data.path'):
    Workdir(begun).check(other)
  Workdir(begun).check(other, new_text=True)
  seen, stream = [], io.StringIO()
  spoiled = Spoiled(data, 1, lambda batch: seen.append(batch))
  workdir = Workdir(begun)
  crash = Spoiled(data, 8, _crash)
  with pytest.raises(Crash):
    loop.train(other, workdir, crash, stream, new_text=True)
  workdir.release()
  assert 'another text from here on (files: 40 before, 41 now' in (
    stream.getvalue()
  )
  # killed before the next checkpoint, it begins at the same row again; the
  # flag may stay or go
  loop.train(other, workdir, spoiled, io.StringIO())
  workdir.release()
  assert workdir.read() == other
  own = TextData(data)
  own.begin(6)
  assert len(seen) == 3
  for step, batch in enumerate(seen, 6):
    for name, x in own.batch(step).items():
      np.testing.assert_array_equal(batch[name], x)
  # an epoch from here on has every row of the new text once, in an order
  # that is not the one of the same text at the run's beginning
  rows = own._train_rows.full
  again = TextData(data)
  epochs = [
    [b['tokens'].tobytes() for b in _rows(text, first, rows)]
    for text, first in ((own, 6), (again, 0))
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
  # what was before is kept, and a third start repeats it to the bit
  lines = (begun / 'metrics.jsonl').read_bytes()
  old = (unbroken[0] / 'metrics.jsonl').read_text().splitlines(True)
  old = [line for line in old if json.loads(line)['step'] <= 6]
  assert lines.startswith(''.join(old).encode()) and len(old) == 4
  _drop(begun, 9)
  loop.train(other, workdir, TextData(data), io.StringIO(), new_text=True)
  workdir.release()
  assert (begun / 'metrics.jsonl').read_bytes() == lines


def _rows(data, first, count):
  """The first `count` rows from step `first` on."""
  for i in range(count):
    step, row = divmod(i, 8)
    yield {name: x[row] for name, x in data.batch(first + step).items()}


def test_a_checkpoint_from_before_the_new_text_takes_it_from_there(tmp_path):
  workdir, text = Workdir(tmp_path), {'files': 1, 'sums': [1, 2]}
  assert workdir.take_text({'files': 1, 'sums': [0, 2]}, 0) == (0, None)
  since, said = workdir.take_text(text, 6)
  assert since == 6 and 'as many files' in said
  assert workdir.take_text(text, 9) == (6, None)
  # the newer checkpoints are damaged
  assert workdir.take_text(text, 3) == workdir.take_text(text, 9) == (3, None)


def test_a_run_stored_before_texts_were_known_goes_on_and_keeps_its_text(
  texts, begun, unbroken, other_texts
):
  workdir, experiment = Workdir(begun), _experiment(texts)
  workdir.corpus.unlink()
  stream = io.StringIO()
  loop.train(experiment, workdir, TextData(experiment.data), stream)
  workdir.release()
  told = [x for x in stream.getvalue().splitlines() if 'texts were known' in x]
  assert len(told) == 1
  assert workdir.corpus.read_text() == Workdir(unbroken[0]).corpus.read_text()
  _assert_same_run(begun, unbroken)
  _drop(begun)
  with pytest.raises(ConfigError, match='files: 40 before, 41 now'):
    _train(*_with(texts, path=f'{other_texts}/*.txt')[:1], begun,
           _with(texts, path=f'{other_texts}/*.txt')[1])  # fmt: skip


def test_a_checkpoint_that_is_damaged_twice_ends_no_run(texts, begun, unbroken):
  for _ in range(3):
    _train(_experiment(texts), begun)
    _assert_same_run(begun, unbroken)
    _drop(begun)
    shutil.rmtree(begun / 'checkpoints' / '9' / 'params')
  names = {path.name for path in (begun / 'checkpoints').glob('damaged*')}
  assert names == {'damaged-9', 'damaged-9-2'}


@pytest.mark.parametrize(
  'tail',
  [
    b'\0' * 300 + b'\n',
    b'\0' * 300,
    b'3\n',
    b'{"loss": 1}\n',
    b'\xff\xfe\n',
    b'[' * 10**5 + b'\n',
  ],
)
def test_lines_that_a_lost_power_left_are_no_lines(
  texts, begun, unbroken, tail, capsys
):
  for name in ('metrics.jsonl', 'timing.jsonl'):
    with open(begun / name, 'ab') as file:
      file.write(tail)
  _train(_experiment(texts), begun)
  _assert_same_run(begun, unbroken)
  told = capsys.readouterr().err.count('is no record; left out')
  assert told == 2 * tail.endswith(b'\n')


def test_a_finished_run_without_its_timing_is_scored(texts, begun, unbroken):
  _train(_experiment(texts), begun)
  _drop(begun)
  (begun / 'timing.jsonl').unlink()
  result = _train(_experiment(texts), begun)
  assert result['tokens_per_second'] is None
  _assert_same_run(begun, unbroken)


def test_a_run_that_diverged_ends_with_numbers_that_json_has(
  texts, begun, monkeypatch
):
  monkeypatch.setattr(
    loop, 'evaluate', lambda *args: Score(nats=8e5, tokens=1000, ends=0)
  )
  result = _train(_experiment(texts), begun)
  assert result['heldout_perplexity'] == math.inf
  (kept,) = _strict(begun / 'result.json')
  assert kept['heldout_perplexity'] is None and kept['heldout_loss'] == 800
  monkeypatch.setattr(
    loop, 'evaluate', lambda *args: Score(nats=math.nan, tokens=1000, ends=0)
  )
  _drop(begun)
  _train(_experiment(texts), begun)
  assert _strict(begun / 'result.json')[0]['heldout_loss'] is None
  assert _strict(begun / 'metrics.jsonl')


def _full(*unused, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
  'where',
  ['metrics', 'timing', 'board', 'sync', 'plot', 'result', 'save', 'claim'],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
  texts, begun, unbroken, monkeypatch, capsys, where
):
  experiment = _experiment(texts)
  data = TextData(experiment.data)
  target, name = {
    'metrics': (log.Log, 'metrics'),
    'timing': (log.Log, 'timing'),
    'board': (log.Board, 'flush'),
    'sync': (log.JsonLines, 'sync'),
    'plot': (log, 'plot'),
    'result': (loop.files, 'write'),
    'save': (ocp.CheckpointManager, 'save'),
    'claim': (loop.files, 'write'),
  }[where]
  with monkeypatch.context() as patch, flagsaver.flagsaver():
    write = loop.files.write

    def only(path, text):
      names = {'result': 'result.json', 'claim': 'config.json'}
      return _full() if path.name == names[where] else write(path, text)

    patch.setattr(target, name, only if name == 'write' else _full)
    workdir = Workdir(begun)
    with pytest.raises((SystemExit, ConfigError)) as error:
      launch_train._train(experiment, workdir, data, None, 'bytes')
    workdir.release()
  told = [x for x in capsys.readouterr().err.splitlines() if 'error: ' in x]
  if where == 'claim':
    assert error.type is ConfigError and 'No space left' in str(error.value)
  else:
    assert error.value.code == 1 and len(told) == 1
    assert 'No space left on device' in told[0]
  assert not list(begun.rglob('*.tmp*'))
  _train(experiment, begun)
  _assert_same_run(begun, unbroken)


def test_bits_per_byte_of_training_count_bytes_as_those_of_held_out_text(
  tmp_path,
):
  """Of documents of two bytes a third of all targets is no byte."""
  for i in range(200):
    (tmp_path / f'{i}.txt').write_text(f'{i:02}'[-2:])
  experiment = _experiment(tmp_path)
  stream, data = io.StringIO(), TextData(experiment.data)
  loop.train(experiment, Workdir(tmp_path / 'run'), data, stream)
  lines = stream.getvalue().splitlines()
  found = {x.split()[1][:-2]: x for x in lines if 'bits/byte  ' in x}
  records = log.read(tmp_path / 'run' / 'metrics.jsonl')
  losses = {str(r['step']): r['loss'] for r in records if 'loss' in r}
  assert found.keys() == losses.keys() - {'9'} or found.keys() == losses.keys()
  for step, line in found.items():
    batch = data.batch(int(step) - 1)
    bytes_ = int((batch['targets'] < 256).sum())
    bits = losses[step] * 8 * 32 / np.log(2) / bytes_
    assert 1.4 < 8 * 32 / bytes_ < 1.6
    assert f'{bits:.3f} bits/byte' in line


@pytest.mark.parametrize('name', ['result.json', 'config.json', 'text.json'])
@pytest.mark.parametrize(
  'content', [b'', b'{', b'3', b'\xff', b'\0' * 9, b'[' * 10**5, b'[]']
)
def test_files_of_a_run_that_are_no_json_are_refused_by_name(
  texts, tmp_path, name, content
):
  workdir = Workdir(tmp_path)
  workdir.claim(_experiment(texts))
  workdir.release()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError) as error:
    workdir.read()
    workdir.finished()
    workdir.check_text({'sums': 0})
  message = str(error.value)
  assert '\n' not in message and str(tmp_path / name) in message
