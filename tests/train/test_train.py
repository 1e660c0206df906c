"""Whole runs: interrupted, resumed, on other meshes."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, MeshConfig, MLPConfig
from deltanet_jax.config.mixers import KDAConfig
from deltanet_jax.data.text import TextData
from deltanet_jax.objectives.score import Score
from deltanet_jax.platforms import choose
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.train import log, loop
from tests.tiny_run import (
  Crash,
  Spoiled,
  assert_same_run,
  compiled_once,
  crash,
  make_experiment,
  texts,
  train,
  unbroken,
)


def test_a_run_leaves_all_its_files(unbroken, texts):
  folder, result = unbroken
  records = log.read_records(folder / 'metrics.jsonl')
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
  data = TextData(make_experiment(texts).data)
  tokens = data.heldout_bytes + len(list(data.heldout_documents))
  bits = result['heldout_loss'] * tokens / data.heldout_bytes / np.log(2)
  np.testing.assert_allclose(result['heldout_bits_per_byte'], bits)
  assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')
  assert list((folder / 'tensorboard').glob('events*'))


def _events(folder):
  """{(name, step): value} of TensorBoard's files, read byte by byte."""
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


def test_a_held_out_loss_is_said_to_be_of_so_many_rows(
  texts, tmp_path, monkeypatch
):
  experiment, asked = make_experiment(texts), []
  train_ = dataclasses.replace(experiment.train, eval_rows=9)
  score = lambda loss, params, batches, place, eod: (
    asked.append(len(list(batches))) or Score(1.0, 1, 0)
  )
  monkeypatch.setattr(loop, 'score_batches', score)
  stream, data = io.StringIO(), TextData(experiment.data)
  experiment = dataclasses.replace(experiment, train=train_)
  loop.train(experiment, Workdir(tmp_path), data, stream)
  # batches of 8 rows
  every = data.heldout_row_count
  assert asked[:-1] == [2, 2, 2] and asked[-1] == -(-every // 8) > 2
  assert stream.getvalue().count(': held-out loss of 16 rows 1.0000, ') == 3
  assert f'step 9: held-out loss of all {every:,} rows 1.0000, ' in (
    stream.getvalue()
  )


def test_tensorboard_has_the_numbers_of_the_lines(unbroken):
  found = _events(unbroken[0])
  for name in ('metrics.jsonl', 'timing.jsonl'):
    for record in log.read_records(unbroken[0] / name):
      for key in record.keys() - {'step'}:
        value = found.pop((key, record['step']))
        np.testing.assert_allclose(value, record[key], rtol=1e-6)
  assert not found


@pytest.mark.parametrize('step', [1, 5, 8])
def test_a_crash_and_a_restart_equal_an_unbroken_run(
  texts, tmp_path, unbroken, step
):
  experiment = make_experiment(texts)
  with pytest.raises(Crash):
    train(experiment, tmp_path, Spoiled(experiment.data, step, crash))
  # as if more lines had been written before the kill, the last one incomplete
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 9, "loss": 1.0}\n{"step": 9, "heldo')
  train(experiment, tmp_path)
  assert_same_run(tmp_path, unbroken)


@pytest.fixture(params=[0, 2])
def ahead(request, monkeypatch):
  """Steps that are dispatched ahead, on one device as on an accelerator."""
  choice = choose(None)._replace(ahead=request.param)
  monkeypatch.setattr(loop, 'choose', lambda device: choice)
  return request.param


@pytest.mark.parametrize('ahead', [2], indirect=True)
def test_steps_are_dispatched_before_earlier_ones_are_awaited(
  texts, tmp_path, unbroken, ahead, monkeypatch
):
  experiment, done = make_experiment(texts), []
  get = jax.device_get

  def wait(x):
    if isinstance(x, dict):  # a step's metrics, not a score
      done.append('wait')
    return get(x)

  def fetch(batch):
    done.append('fetch')

  monkeypatch.setattr(jax, 'device_get', wait)
  train(experiment, tmp_path, Spoiled(experiment.data, 1, fetch))
  assert_same_run(tmp_path, unbroken)
  # scored or saved after the steps 3, 4, 6, 8 and 9
  groups = [len(x.split()) for x in ' '.join(done).split('fetch')]
  assert groups[1:] == [0, 0, 3, 1, 0, 2, 0, 2, 1]


def test_sigterm_saves_after_the_step_and_the_run_goes_on(
  texts, tmp_path, unbroken, ahead
):
  experiment = make_experiment(texts)

  def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)

  stopped = train(experiment, tmp_path, Spoiled(experiment.data, 2, terminate))
  assert stopped == signal.SIGTERM
  assert (tmp_path / 'checkpoints' / '2').is_dir()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  train(experiment, tmp_path)
  assert_same_run(tmp_path, unbroken)


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_good_checkpoint(
  texts, tmp_path, monkeypatch, ahead
):
  assert loop.MAX_SKIPPED_IN_A_ROW == 10
  monkeypatch.setattr(loop, 'MAX_SKIPPED_IN_A_ROW', 3)
  experiment = make_experiment(texts)

  def poison(batch):
    return batch | {'weights': batch['weights'] * np.nan}

  with pytest.raises(loop.NonFiniteError, match='steps 5 to 7 had no finite'):
    train(experiment, tmp_path, Spoiled(experiment.data, 5, poison))
  records = log.read_records(tmp_path / 'metrics.jsonl')
  last = [r for r in records if 'loss' in r][-1]
  assert (last['step'], last['loss'], last['skipped']) == (6, None, 2)
  # the checkpoint holds finite parameters: the run can be resumed
  result = train(experiment, tmp_path)
  assert result['step'] == 9 and np.isfinite(result['heldout_loss'])


def test_eight_devices_give_the_loss_of_one(texts, tmp_path, unbroken):
  experiment = dataclasses.replace(
    make_experiment(texts), mesh=MeshConfig(fsdp=-1, seq=2, tensor=2)
  )
  # once from the start, and once from a checkpoint that one device wrote
  other = tmp_path / 'resumed'
  shutil.copytree(unbroken[0] / 'checkpoints' / '6', other / 'checkpoints/6')
  shutil.copy(unbroken[0] / 'metrics.jsonl', other)
  for folder in (tmp_path / 'whole', other):
    train(experiment, folder)
    got = log.read_records(folder / 'metrics.jsonl')
    for a, b in zip(
      got, log.read_records(unbroken[0] / 'metrics.jsonl'), strict=True
    ):
      for name in {'loss', 'heldout_loss'} & b.keys():
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5)
    # all devices, also where their number has changed
    assert Workdir(folder).read().mesh == experiment.mesh


def test_a_mesh_larger_than_the_machine_is_bad_input(texts, tmp_path):
  experiment = dataclasses.replace(
    make_experiment(texts), mesh=MeshConfig(seq=16)
  )
  with pytest.raises(ConfigError, match='16 devices'):
    train(experiment, tmp_path)
  assert not list(tmp_path.iterdir())  # the folder is not locked


def test_a_killed_process_continues_bit_for_bit(texts, tmp_path, unbroken):
  config = tmp_path / 'tiny.py'
  config.write_text(
    f'from tests.tiny_run import make_experiment\n'
    f'def get_config():\n  return make_experiment({str(texts)!r})\n'
  )
  folder = tmp_path / 'run'
  command = [
    sys.executable, '-m', 'launch.train', f'--config={config}',
    f'--workdir={folder}',
  ]  # fmt: skip
  root = pathlib.Path(__file__).parents[2]
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
  assert 'on cpu: softmax attention blocks' in done.stderr
  assert json.loads((folder / 'forms.json').read_text()) == {
    'since': [
      {'step': 0, 'platform': 'cpu', 'forms': {'softmax attention': 'blocks'}}
    ]
  }
  assert_same_run(folder, unbroken)


def test_a_folder_of_another_configuration_is_refused(texts, tmp_path):
  experiment = make_experiment(texts)
  workdir = Workdir(tmp_path)
  workdir.check(experiment)
  workdir.lock(experiment)
  same = dataclasses.replace(
    experiment,
    train=dataclasses.replace(experiment.train, save_every=7, keep=5, steps=99),
    mesh=MeshConfig(data=2),
  )
  workdir.check(same)
  for part, change in (
    ('optim', {'lr': 0.5}),
    ('train', {'seed': 99}),
    ('data', {'seed': 7}),
  ):
    changed = dataclasses.replace(getattr(experiment, part), **change)
    other = dataclasses.replace(experiment, **{part: changed})
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError) as error:
      workdir.check(other)
    message = str(error.value)
    assert re.search(rf'{part}\.{name}: .* != {value}', message)
    # it may change, and its folder has no weights to start another run from
    assert 'mesh, remat, form, chunk and train.steps, log_every' in message
    assert '--released' not in message
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  with pytest.raises(ConfigError, match=rf'--released={tmp_path} it starts'):
    workdir.check(other)
  model = dataclasses.replace(experiment.model, repeats=2)
  with pytest.raises(ConfigError) as error:
    workdir.check(dataclasses.replace(experiment, model=model))
  assert '--released' not in str(error.value)  # it would be another model


def test_how_a_model_is_computed_may_change_but_not_its_function(
  texts, tmp_path
):
  experiment, workdir = make_experiment(texts), Workdir(tmp_path)
  layer = Layer(KDAConfig.tiny(), MLPConfig(16))
  model = dataclasses.replace(experiment.model, period=(layer,))
  experiment = dataclasses.replace(experiment, model=model)
  workdir.lock(experiment)
  change = lambda **to: workdir.check(
    config.override_fields(
      experiment, [(f'model.{name}', value) for name, value in to.items()]
    )
  )
  mixer = 'period.0.mixer.'
  change(
    **{f'{mixer}form': 'recurrent', f'{mixer}chunk': '16', 'remat': 'dots'}
  )
  with pytest.raises(ConfigError, match='norm_eps'):
    change(**{f'{mixer}form': 'recurrent', f'{mixer}norm_eps': '1e-3'})


def test_two_processes_do_not_share_a_folder(texts, tmp_path):
  experiment = make_experiment(texts)
  first = Workdir(tmp_path)
  first.lock(experiment)
  with pytest.raises(ConfigError, match='another process trains'):
    Workdir(tmp_path).lock(experiment)
  first.unlock()
  Workdir(tmp_path).lock(experiment)


def test_progress_lines_come_now_and_then_when_nobody_watches():
  clock = log.Clock(tokens=100, total=4)
  stream = io.StringIO()
  progress = log.Steps(4, 2, stream)
  for step in range(1, 5):
    clock.start()
    clock.stop()
    progress.step(step, 2.0, 2.885, clock)
  lines = stream.getvalue().splitlines()
  assert len(lines) == 2 and '\r' not in stream.getvalue()
  assert lines[0].startswith('step 2/4  loss 2.0000  2.885 bits/byte')
  assert lines[1].endswith('0m00s left')


def test_bits_per_byte_of_training_count_bytes_as_those_of_held_out_text(
  tmp_path,
):
  """In documents of two bytes a third of the targets is no byte."""
  for i in range(200):
    (tmp_path / f'{i}.txt').write_text(f'{i:02}'[-2:])
  experiment = make_experiment(tmp_path)
  stream, data = io.StringIO(), TextData(experiment.data)
  loop.train(experiment, Workdir(tmp_path / 'run'), data, stream)
  lines = stream.getvalue().splitlines()
  found = {x.split()[1][:-2]: x for x in lines if 'bits/byte  ' in x}
  # 200 documents of three targets in rows of 32: a fifth is held out
  rows = data.heldout_row_count
  assert f': held-out loss of all {rows} rows ' in stream.getvalue()
  records = log.read_records(tmp_path / 'run' / 'metrics.jsonl')
  losses = {str(r['step']): r['loss'] for r in records if 'loss' in r}
  assert found.keys() == losses.keys() - {'9'} or found.keys() == losses.keys()
  for step, line in found.items():
    batch = data.make_batch(int(step) - 1)
    bytes_ = int((batch['targets'] < 256).sum())
    bits = losses[step] * 8 * 32 / np.log(2) / bytes_
    assert 1.4 < 8 * 32 / bytes_ < 1.6
    assert f'{bits:.3f} bits/byte' in line
