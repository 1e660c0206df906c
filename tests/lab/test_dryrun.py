"""Chips, what is advised, and dry runs for TPU topologies."""

import collections
import functools
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.lab import chips
from deltanet_jax.lab.dryrun import advice, bound, hlo, run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  'text, slices, count, devices',
  [
    ('v5e:16x16', 1, 256, 256),
    ('v5p:4x4x8', 1, 128, 128),
    ('v6e:2x2', 2, 8, 8),
    ('tpu7x:2x2x1', 1, 4, 8),
  ],
)
def test_a_topology_has_so_many_devices(text, slices, count, devices):
  found = chips.parse_topology(text, slices)
  assert (found.name, found.chips, found.devices) == (text, count, devices)


@pytest.mark.parametrize(
  'text, says',
  [
    ('v5p', 'v5e:16x16 or v5p:4x4x8'),
    ('v9:2x2', 'v5e, v5p, v6e, tpu7x'),
    ('v5p:4x4', '3 sides'),
    ('v5e:1x4', 'even'),
    ('v5e:2x0', 'largest slice of v5e is 16x16'),
    ('v5e:16x32', '--slices'),
  ],
)
def test_a_topology_that_is_none_is_refused(text, says):
  with pytest.raises(ConfigError, match=says):
    chips.parse_topology(text)


@pytest.mark.parametrize(
  'mesh, slices, says',
  [
    ({}, 1, '--config.mesh.fsdp=16$'),
    ({'fsdp': 4, 'tensor': 2}, 1, '--config.mesh.fsdp=8$'),
    ({'tensor': 3}, 1, 'product is 16'),
    ({'fsdp': 16}, 2, '--config.mesh.replica=2'),
  ],
)
def test_a_mesh_that_does_not_fill_the_topology_is_refused(mesh, slices, says):
  with pytest.raises(ConfigError, match=says):
    chips.check_mesh(
      MeshConfig(**mesh), chips.parse_topology('v5e:4x4', slices)
    )
  chips.check_mesh(
    MeshConfig(fsdp=8, tensor=2), chips.parse_topology('v5e:4x4')
  )


def test_a_ring_has_two_links_and_a_line_one():
  pod, part = (
    chips.parse_topology('v5e:16x4'),
    chips.parse_topology('v5p:2x4x1'),
  )
  assert [pod.links(axis) for axis in (0, 1)] == [2, 1]
  assert [part.links(axis) for axis in (0, 1, 2)] == [1, 2, 0]
  assert part.ici_rate((0, 1)) == 3 * 100e9


def test_bytes_sent_are_those_of_rings():
  topology = chips.parse_topology('v5p:2x2x1')
  places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]

  def sent(kind, group=(0, 1)):
    one = hlo.Collective(kind, ((256,),), 1024, 3, group)
    (found,) = bound.time_networks([one], topology, places)
    return found

  assert sent('all-gather').sent == 3 * 512
  assert sent('all-gather').seconds == 3 * 512 / 100e9
  assert sent('all-reduce').sent == 3 * 1024
  assert sent('reduce-scatter', (0, 1, 2, 3)).sent == 3 * 3 * 1024
  assert sent('reduce-scatter', (0, 1, 2, 3)).seconds == 9 * 1024 / 200e9
  assert sent('collective-permute').sent == 3 * 1024


# ----------------------------------------------------------------- advice


@pytest.mark.parametrize(
  'text, size',
  [
    ('HLO temporaries (64.08G) exceeds available HBM (15.75G).', 64.08),
    ('Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.', 20.5),
  ],
)
def test_a_refused_program_tells_its_size(text, size):
  arguments = 2**30 if 'temporaries' in text else 0
  want = int(size * 2**30) + arguments
  assert run.parse_refused_bytes(text, arguments) == pytest.approx(
    want, rel=1e-9
  )


def _record(**sizes):
  sizes = {name: size * chips.GIB for name, size in sizes.items()}
  held = {k: sizes[k] for k in ('parameters', 'optimizer')}
  total = sum(held.values()) + sizes['temporaries']
  memory = {
    'held': held, 'available': 16 * chips.GIB, 'total': total,
    'temporaries': sizes['temporaries'],
  }  # fmt: skip
  return {'of': 'train', 'memory': memory}


def _advised(changes, **sizes):
  """The first advice, and the experiment with what it says to set."""
  before = config.read_experiment(ROOT / 'configs/gdn.py:hybrid_1p3b', changes)
  said = advice.give_advice(before, _record(**sizes))
  words = said[0].replace(':', ' ').replace(',', ' ').split()
  flags = [w for w in words if w.startswith('--config.')]
  _, changed, _ = config.split_argv(flags)
  return said, config.override_fields(before, changed), before


def test_many_rows_are_taken_in_smaller_parts():
  said, after, _ = _advised((), parameters=1, optimizer=2, temporaries=21)
  # of 4 rows a device: 20 GiB of activations into the 11.2 that are left
  assert after.optim.accumulate == 8
  assert '2 rows of 4,096 tokens' in said[0] and '10.0 GiB' in said[0]


def test_a_long_row_is_split_over_time():
  changes = [
    ('data.batch', '8'), ('data.seq_len', '131072'), ('optim.accumulate', '1'),
  ]  # fmt: skip
  _, after, before = _advised(
    changes, parameters=1, optimizer=2, temporaries=31
  )
  assert (after.mesh.fsdp, after.mesh.seq, after.optim.accumulate) == (2, 4, 4)
  size = lambda mesh: mesh.fsdp * mesh.seq
  assert size(after.mesh) == size(before.mesh)


def test_large_weights_are_split_over_more_devices():
  said, after, _ = _advised((), parameters=8, optimizer=16, temporaries=9)
  # 32 GiB into 70% of 15.2: a quarter on each
  assert after.mesh.fsdp == 32
  assert '32.0 GiB' in said[0]


def test_kept_activations_are_recomputed_first():
  changes = [('model.remat', 'none')]
  _, after, _ = _advised(changes, parameters=1, optimizer=2, temporaries=21)
  assert after.model.remat == 'full'


# ---------------------------------------------------------------- command

TINY = """
import dataclasses
from deltanet_jax import config
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig

def get_config():
  cfg = config.load('configs/small.py:hybrid_gdn')
  layer = cfg.model.period[0]
  ffn = dataclasses.replace(layer.ffn, hidden=64)
  mixers = (
    GatedDeltaNetConfig(
      key_heads=4, value_heads=4, key_dim=16, value_dim=16, chunk=16
    ),
    AttentionConfig(heads=4, kv_heads=4, head_dim=16, rotary_dim=8),
  )
  period = tuple(
    dataclasses.replace(layer, mixer=mixer, ffn=ffn) for mixer in mixers
  )
  model = dataclasses.replace(cfg.model, d_model=256, period=period, repeats=3)
  data = dataclasses.replace(cfg.data, seq_len=128)
  return dataclasses.replace(cfg, model=model, data=data)
"""


@pytest.fixture
def tiny(tmp_path):
  path = tmp_path / 'tiny.py'
  path.write_text(TINY)
  return f'--config={path}'


def _dryrun(*args):
  return subprocess.run(
    [sys.executable, '-m', 'launch.dryrun', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_bad_input_is_one_line_before_anything_is_compiled(tiny):
  for args, says in (
    ((), 'no --topology'),
    (('--topology=v5e:4x4',), 'set --config.mesh.fsdp=16'),
    (('--topology=v5e:4x4', '--batch=2'), '--config.data.batch'),
  ):
    done = _dryrun(tiny, *args)
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.count('\n') == 1 and not done.stdout


ENDS = """
import os
from deltanet_jax.config import ConfigError
from deltanet_jax.lab.dryrun import apart

def abort(say):
  say('compiling')
  os.write(2, b'log\\nF1128 11:03 2 pool.cc:9] Check failed: a\\n@ 0x7f\\n')
  os.abort()

def refuse(say):
  raise ConfigError('batch 3')

for work in abort, refuse, lambda say: 1 / 0, lambda say: os._exit(3), len:
  try:
    apart.run_apart(work)
  except Exception as error:
    print(type(error).__name__, str(error).splitlines()[-1])
print(apart.run_apart(lambda say: {'fits': True}))
"""


def test_a_compiler_that_aborts_ends_its_own_process_alone():
  done = subprocess.run(
    [sys.executable, '-c', ENDS], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.splitlines() == [
    'CompilerError Check failed: a',
    'ConfigError batch 3',
    'RuntimeError ZeroDivisionError: division by zero',
    'CompilerError its process ended with status 3',
    "RuntimeError TypeError: object of type 'function' has no len()",
    "{'fits': True}",
  ]
  assert done.stderr == 'compiling\n'


def test_without_the_right_libtpu_the_command_that_installs_it_is_named(
  monkeypatch,
):
  from deltanet_jax.lab.dryrun import __main__ as dryrun

  def version(name, libtpu):
    if libtpu is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return libtpu if name == 'libtpu' else '0.10.2'

  for libtpu, says in ((None, 'not installed'), ('0.0.1', 'libtpu is 0.0.1')):
    monkeypatch.setattr(
      importlib.metadata, 'version', functools.partial(version, libtpu=libtpu)
    )
    with pytest.raises(ConfigError, match=f'{says}.*pip install'):
      dryrun._check_libtpu()
  (want,) = [x for x in importlib.metadata.requires('jax') if 'libtpu' in x]
  right = want.split('==')[1].split('*')[0] + '1'
  monkeypatch.setattr(
    importlib.metadata, 'version', functools.partial(version, libtpu=right)
  )
  dryrun._check_libtpu()


def _has_libtpu():
  try:
    importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


needs_libtpu = pytest.mark.skipif(
  not _has_libtpu(), reason='needs libtpu: requirements-tpu.txt'
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, slices',
  [
    ('v5e:16x16', 1),
    ('v5p:4x4x8', 1),
    ('v6e:16x16', 1),
    ('tpu7x:4x4x8', 1),
    ('v5e:4x4', 2),
  ],
)
def test_a_small_model_is_compiled_for(topology, slices, tiny, tmp_path):
  devices = chips.parse_topology(topology, slices).devices
  path = tmp_path / 'out.json'
  done = _dryrun(
    tiny, f'--topology={topology}', f'--slices={slices}', f'--json={path}',
    f'--config.mesh.replica={slices}', '--config.mesh.tensor=4',
    f'--config.mesh.fsdp={devices // slices // 4}',
    f'--config.data.batch={devices}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  print(f'{topology}: compiled in {found["seconds"]["compile"]:.1f} s')
  assert found['devices'] == devices and found['fits']
  # weights are gathered in every layer, and in the backward pass again
  kinds = collections.Counter()
  for x in found['collectives']:
    kinds[x['kind']] += x['count']
  assert kinds['all-gather'] > 2 * 6
  between = any(kind.startswith(hlo.BETWEEN) for kind in kinds)
  assert between == (slices > 1) == (found['bound']['dcn'] > 0)
  assert found['unknown_loops'] == []
  assert found['flops']['program'] > found['flops']['model'] > 0
  assert 0 < found['mfu'] < 1
  assert 'at least' in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_what_to_change(tiny):
  done = _dryrun(
    tiny, '--topology=v5e:2x2', '--config.mesh.fsdp=4',
    '--config.data.batch=8192', '--config.data.seq_len=4096',
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert 'Does not fit' in done.stdout
  assert '--config.model.remat=full' in done.stdout
  assert '--config.optim.accumulate=' in done.stdout
