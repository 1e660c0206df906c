"""Several processes: what each brings, and whole runs, killed and continued."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from deltanet_jax import config
from deltanet_jax.cli import process_flags
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import DataConfig, MeshConfig
from deltanet_jax.data.text import TextData
from deltanet_jax.parallel import sharding
from deltanet_jax.runs import processes
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.train import log, loop

ROOT = pathlib.Path(__file__).parents[2]
WORDS = 'the cat sat on a mat and ran off with my hat'.split()
PATIENCE = 600  # seconds for a process that takes ten when the machine is idle

# a hybrid; the process that $SPOIL names signals itself at the given step
TINY = """
import os
import pathlib
import time
from deltanet_jax.data import text
from deltanet_jax.config.experiment import *
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig



class Spoiled(text.TextData):
  def iterate(self, start=0, rows=None):
    import jax

    process, number, step, saved = os.environ['SPOIL'].split(':')
    for i, batch in enumerate(super().iterate(start, rows), start + 1):
      if jax.process_index() == int(process) and i == int(step):
        while saved and not pathlib.Path(saved).is_dir():
          time.sleep(0.05)
        os.kill(os.getpid(), int(number))
      yield batch


if 'SPOIL' in os.environ:
  text.TextData = Spoiled


def get_config():
  delta = GatedDeltaNetConfig(2, 2, 8, 8, conv=2, form='recurrent')
  attention = AttentionConfig(heads=2, kv_heads=2, head_dim=8, rotary_dim=8)
  layers = Layer(delta, MLPConfig(16)), Layer(attention, MLPConfig(16))
  return Experiment(
    model=ModelConfig(264, 16, layers, repeats=1),
    data=DataConfig({texts!r}, seq_len=32, batch=8, heldout=0.2),
    optim=OptimConfig(lr=1e-3, eps=1e-5, warmup=2),
    train=TrainConfig(
      steps=8, dtype='float32', log_every=1, eval_every=4, eval_rows=12,
      save_every=2,
    ),
  )
"""


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  draw = random.Random(0)
  for i in range(40):
    (folder / f'{i}.txt').write_text(' '.join(draw.choices(WORDS, k=60)))
  return f'{folder}/*.txt'


@pytest.fixture
def data(texts):
  return TextData(DataConfig(texts, seq_len=32, batch=8, heldout=0.2))


class _Home:
  """A sharding as the process sees it that owns some of the mesh's devices."""

  def __init__(self, mesh, devices):
    self._all = sharding.make_batch_sharding(mesh)
    self._devices = devices

  def addressable_devices_indices_map(self, shape):
    found = self._all.devices_indices_map(shape)
    return {device: found[device] for device in self._devices}


@pytest.mark.parametrize('own', [(0, 1), (2, 3, 4, 5), (0, 5), (6,)])
@pytest.mark.parametrize(
  'sizes', [{'data': 8}, {'fsdp': 4, 'seq': 2}, {'data': 2, 'tensor': 4}]
)
def test_a_process_brings_what_its_devices_hold(data, sizes, own, monkeypatch):
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  devices = mesh.devices.reshape(-1)[list(own)]
  home, whole = _Home(mesh, devices), data.make_batch(3)
  share = processes.find_row_share(home, (8, 32))
  rows = 8 // (sizes.get('data', 1) * sizes.get('fsdp', 1))
  copies = 8 // (8 // rows)
  assert len(share.rows) == rows * len({i // copies for i in own})
  part = next(data.iterate(3, share.rows))
  assert {x.shape[0] for x in part.values()} == {len(share.rows)}

  def make(shape, home, call):
    indices = home.addressable_devices_indices_map(shape).values()
    return [(index, call(index)) for index in indices]

  monkeypatch.setattr(jax, 'make_array_from_callback', make)
  for name, pieces in share.place(part).items():
    for index, piece in pieces:
      np.testing.assert_array_equal(piece, whole[name][index])


def test_a_process_alone_places_the_whole_batch(data):
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, seq=2))
  home, whole = sharding.make_batch_sharding(mesh), data.make_batch(0)
  share = processes.find_row_share(home, (8, 32))
  assert share.rows.tolist() == list(range(8))
  for name, x in share.place(next(data.iterate(0, share.rows))).items():
    assert x.sharding == home
    np.testing.assert_array_equal(x, whole[name])


def test_rows_of_a_batch_are_those_of_the_whole_one(data):
  rows = np.array([1, 2, 6])
  some = data.iterate(5, rows)
  for step in range(5, 25):  # an epoch is 9 batches and a part
    batch = next(some)
    for name, x in data.make_batch(step).items():
      np.testing.assert_array_equal(batch[name], x[rows])
  both = data.make_heldout_batches(8), data.make_heldout_batches(8, rows)
  for whole, batch in zip(*both, strict=True):
    for name, x in whole.items():
      np.testing.assert_array_equal(batch[name], x[rows])


def test_the_fingerprint_of_a_text_changes_with_text_and_seed(data, texts):
  cfg = DataConfig(texts, seq_len=32, batch=8, heldout=0.2)
  assert TextData(cfg).fingerprint() == data.fingerprint()
  for change in ({'seed': 1}, {'path': f'{texts},!0.txt,!**/1.txt'}):
    other = TextData(dataclasses.replace(cfg, **change))
    assert other.fingerprint() != data.fingerprint()
  for rows in (other._train_rows, other._heldout_rows):
    before = other.fingerprint()
    rows._stream[5] ^= 1
    assert other.fingerprint() != before


@contextlib.contextmanager
def _flags(**values):
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**values):
    yield


def test_flags_name_a_process_a_cluster_or_nothing():
  with _flags():
    assert process_flags.read_process_flags() is None
  with _flags(distributed=True, meet_seconds=7):
    assert process_flags.read_process_flags() == process_flags.Meeting(7)
  with _flags(coordinator='node0:8476', processes=4, process=3):
    assert process_flags.read_process_flags() == (
      process_flags.Meeting(120, 'node0:8476', 4, 3)
    )


@pytest.mark.parametrize(
  'values, words',
  [
    ({'process': 0}, 'no --coordinator and no --processes given'),
    ({'coordinator': 'a:1', 'processes': 2}, 'no --process given'),
    ({'coordinator': 'a', 'processes': 2, 'process': 0}, 'HOST:PORT'),
    ({'coordinator': 'a:1', 'processes': 2, 'process': 2}, 'give 0 to 1'),
    ({'distributed': True, 'process': 1}, 'give it alone'),
  ],
)
def test_flags_that_do_not_fit_are_refused(values, words):
  with _flags(**values), pytest.raises(ConfigError, match=words):
    process_flags.read_process_flags()


def test_a_bad_command_line_is_refused_before_jax_is_imported(tmp_path):
  code = (
    'import runpy, sys\nsys.modules["jax"] = None\n'
    'runpy.run_module("launch.train", run_name="__main__", alter_sys=True)\n'
  )
  given = '--config=configs/quickstart.py', f'--workdir={tmp_path / "run"}'
  done = subprocess.run(
    [sys.executable, '-c', code, *given, '--processes=2'],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.startswith('error: no --coordinator and no --process')


def test_together_ends_in_all_what_fails_in_one(monkeypatch):
  assert processes.call_together(lambda: 5) == 5

  def fail():
    raise ConfigError('no such file')

  with pytest.raises(ConfigError, match='no such file'):
    processes.call_together(fail)
  monkeypatch.setattr(processes, 'gather_arrays', lambda x: np.array([x, 1]))
  with pytest.raises(ConfigError, match='process 1 failed'):
    processes.call_together(lambda: 5)


def test_processes_with_another_start_are_named(monkeypatch):
  parts = {'a configuration': 'x', 'a text': 'y'}
  processes.require_same_start(parts)
  theirs = np.array([0, 1], np.uint32)
  monkeypatch.setattr(
    processes, 'gather_arrays', lambda x: np.stack([x, x, x + theirs])
  )
  with pytest.raises(ConfigError, match='process 2 has a text that differs'):
    processes.require_same_start(parts)


def test_a_mesh_that_leaves_a_process_out_is_refused(monkeypatch):
  devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  mesh = lambda n: types.SimpleNamespace(devices=np.array(devices[:n]))
  processes.require_devices(mesh(5))
  with pytest.raises(ConfigError, match='4 of 8 devices, of 1 of 2'):
    processes.require_devices(mesh(4))


def test_a_folder_that_does_not_show_config_json_is_refused(tmp_path, texts):
  experiment = _experiment(tmp_path, texts)
  workdir = Workdir(tmp_path / 'run')
  with pytest.raises(ConfigError, match='a disk that all processes share'):
    workdir.require_seen(experiment, seconds=0.2)
  workdir.lock(experiment)
  workdir.require_seen(experiment, seconds=0.2)
  workdir.unlock()
  # as a disk of another machine may still hold it
  train = dataclasses.replace(experiment.train, save_every=3)
  with pytest.raises(ConfigError, match='a disk that all processes share'):
    workdir.require_seen(
      dataclasses.replace(experiment, train=train), seconds=0.2
    )


def _experiment(folder, texts):
  """Of the file tiny.py, that this writes, too."""
  file = folder / 'tiny.py'
  file.write_text(TINY.replace('{texts!r}', repr(texts)))
  return config.load(file)


def _train_here(experiment, folder):
  workdir = Workdir(folder)
  try:
    data = TextData(experiment.data)
    return loop.train(experiment, workdir, data, io.StringIO())
  finally:
    workdir.unlock()


class Job:
  """Processes of launch.train, ended at the latest by leaving the context."""

  def __init__(self, folder, count, *args, how, spoil=None, own=()):
    """how: number of a process -> (flags, environment) by which it finds the
    others   own: further arguments of the last process"""
    self._outputs = [folder / f'output-{i}' for i in range(count)]
    self._children = []
    common = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'SPOIL': spoil or '-1:0:0:',
    }
    for i in range(count):
      found, names = how(i)
      command = [
        sys.executable, '-m', 'launch.train', f'--config={folder}/tiny.py',
        f'--workdir={folder}/run', *args, *found,
        *(own if i == count - 1 else ()),
      ]  # fmt: skip
      with open(self._outputs[i], 'w') as output:
        child = subprocess.Popen(
          command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
          env=os.environ | common | names,
        )  # fmt: skip
      self._children.append(child)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    for child in self._children:
      child.kill()
      child.wait()

  def wait(self):
    """The exit statuses; the processes have PATIENCE together."""
    last = time.monotonic() + PATIENCE
    return [
      child.wait(max(0.1, last - time.monotonic())) for child in self._children
    ]

  def output(self, i):
    return self._outputs[i].read_text()


def _port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def _by_flags(count):
  at = f'--coordinator=127.0.0.1:{_port()}', f'--processes={count}'
  return lambda i: ([*at, f'--process={i}'], {})


def _by_slurm(count):
  job = str(random.randrange(1 << 12))  # which gives the port
  return lambda i: (
    ['--distributed'],
    {
      'SLURM_JOB_ID': job, 'SLURM_STEP_NODELIST': 'localhost',
      'SLURM_NTASKS': str(count), 'SLURM_STEP_NUM_TASKS': str(count),
      'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i),
    },
  )  # fmt: skip


def _by_open_mpi(count):
  at = f'{random.randrange(1 << 16) << 16}.0;tcp://127.0.0.1:34911'
  return lambda i: (
    ['--distributed'],
    {
      'OMPI_MCA_orte_hnp_uri': at, 'OMPI_COMM_WORLD_SIZE': str(count),
      'OMPI_COMM_WORLD_RANK': str(i), 'OMPI_COMM_WORLD_LOCAL_RANK': str(i),
    },
  )  # fmt: skip


def _curve(folder):
  return {
    (record['step'], name): record[name]
    for record in log.read_records(folder / 'metrics.jsonl')
    for name in ('loss', 'heldout_loss')
    if name in record
  }


def _assert_same_curve(folder, other):
  got, want = _curve(folder), _curve(other)
  assert list(got) == list(want)
  np.testing.assert_allclose(
    list(got.values()), list(want.values()), rtol=1e-5, atol=0
  )


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.long)])
def test_many_then_two_then_one_process_equal_one_unbroken_run(
  count, tmp_path, texts, monkeypatch, quick_compile
):
  make = functools.cache(loop.make_program)
  monkeypatch.setattr(loop, 'make_program', make)
  experiment = _experiment(tmp_path, texts)
  _train_here(experiment, tmp_path / 'whole')
  run = tmp_path / 'run'

  # rows and time are split over the processes; the last one dies
  kill = f'{count - 1}:{signal.SIGKILL.value}:6:{run}/checkpoints/4'
  mesh = f'--config.mesh.fsdp={count // 2}', '--config.mesh.seq=2'
  with Job(tmp_path, count, *mesh, how=_by_flags(count), spoil=kill) as job:
    *others, killed = job.wait()
    assert killed == -signal.SIGKILL, job.output(count - 1)
    assert all(status not in (0, 2) for status in others), others
  assert [r['step'] for r in log.read_records(run / 'metrics.jsonl')][-1] == 5
  first = _curve(run)
  whole = _curve(tmp_path / 'whole')
  np.testing.assert_allclose(
    list(first.values()), [whole[k] for k in first], rtol=1e-5, atol=0
  )

  # what is read by one process alone is bad for both
  files = [f for f in run.glob('checkpoints/4/params/**/d/*') if f.is_file()]
  file = max(files, key=lambda file: file.stat().st_size)
  raw = bytearray(file.read_bytes())
  raw[len(raw) // 2] ^= 0x10
  file.write_bytes(raw)
  # the second one alone is told to stop
  stop = f'1:{signal.SIGTERM.value}:5:'
  mesh = ('--config.mesh.data=2',)
  with Job(tmp_path, 2, *mesh, how=_by_open_mpi(2), spoil=stop) as job:
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.output(0)
    assert 'continuing after step 2' in job.output(0)
    assert 'SIGTERM: saved after step 5' in job.output(0)
    assert 'step 3' not in job.output(1)  # the first one tells it
  assert (run / 'checkpoints' / 'damaged-4').is_dir()

  result = _train_here(experiment, run)
  assert result['step'] == 8
  _assert_same_curve(run, tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_go_on_with_another_text_when_told(tmp_path, texts):
  copy = tmp_path / 'texts'
  shutil.copytree(pathlib.Path(texts).parent, copy)
  experiment = _experiment(tmp_path, f'{copy}/*.txt')
  run, mesh = tmp_path / 'run', ('--config.mesh.data=-1',)
  stop = f'1:{signal.SIGTERM.value}:5:'
  with Job(tmp_path, 2, *mesh, how=_by_flags(2), spoil=stop) as job:
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.output(0)
  (copy / 'new.txt').write_text('zq xj ' * 40)
  with Job(tmp_path, 2, *mesh, how=_by_flags(2)) as job:
    assert job.wait() == [2, 2], job.output(0)
    assert 'files: 40 before, 41 now' in job.output(0)
    assert 'process 0 failed' in job.output(1)
  shutil.copytree(run, tmp_path / 'alone')
  with Job(tmp_path, 2, '--new_text', *mesh, how=_by_flags(2)) as job:
    assert job.wait() == [0, 0], job.output(0)
  assert json.loads((run / 'text.json').read_text())['since'] == 5
  # one process, continuing alone, sees the same rows, on the devices it has
  workdir = Workdir(tmp_path / 'alone')
  assert workdir.read().mesh == MeshConfig(data=-1)
  data = TextData(experiment.data)
  loop.train(experiment, workdir, data, io.StringIO(), new_text=True)
  workdir.unlock()
  _assert_same_curve(run, tmp_path / 'alone')


@pytest.mark.slow
def test_processes_that_differ_or_do_not_come_are_told_so(tmp_path, texts):
  _experiment(tmp_path, texts)
  other, mesh = ['--config.optim.lr=0.5'], '--config.mesh.data=2'
  with Job(tmp_path, 2, mesh, how=_by_slurm(2), own=other) as job:
    assert job.wait() == [2, 2], job.output(0)
    for i in range(2):
      assert 'process 1 has a configuration that differs' in job.output(i)
  assert not (tmp_path / 'run').exists()
  for i in range(2):
    alone = _by_flags(2)(i)
    with Job(
      tmp_path, 1, mesh, '--meet_seconds=1', how=lambda _, a=alone: a
    ) as job:
      assert job.wait() == [1]
      assert f'as process {i}; not all joined' in job.output(0)
      assert 'Check failure' not in job.output(0)


@pytest.mark.slow
@pytest.mark.long
def test_the_death_of_the_first_process_ends_the_others(tmp_path, texts):
  _experiment(tmp_path, texts)
  kill = f'0:{signal.SIGKILL.value}:4:{tmp_path}/run/checkpoints/2'
  mesh = ('--config.mesh.tensor=2',)
  with Job(tmp_path, 2, *mesh, how=_by_flags(2), spoil=kill) as job:
    killed, other = job.wait()
    assert killed == -signal.SIGKILL and other not in (0, 2)
  with Job(tmp_path, 2, *mesh, how=_by_flags(2)) as job:
    assert job.wait() == [0, 0], job.output(0)
    assert 'continuing after step 2' in job.output(0)
    assert '"heldout_loss"' in job.output(0)
    assert '"heldout_loss"' not in job.output(1)
