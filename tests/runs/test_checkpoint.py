"""Checkpoints survive donation, another mesh and damage on disk."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltanet_jax.runs import checkpoint
from deltanet_jax.runs.checkpoint import CheckpointError, Checkpoints


def _items(step):
  key = jax.random.key(step)
  params = {
    'block': {'w': jax.random.normal(key, (8, 512)), 'b': jnp.ones(8)},
    'low': jax.random.normal(key, (8, 2)).astype(jnp.bfloat16),
  }
  return {'params': params, 'rest': (jnp.int32(step), {'mu': params['low']})}


def _abstract(items, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), items
  )


@pytest.fixture
def folder(tmp_path):
  """Checkpoints of steps 1, 2 and 3, of which the last two are kept."""
  with Checkpoints(tmp_path / 'ckpt', keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, _items(step))
    checkpoints.wait()
    assert checkpoints.list_steps() == [2, 3]
  return tmp_path / 'ckpt'


def _restored(folder):
  with Checkpoints(folder, keep=2) as checkpoints:
    step, items = checkpoints.restore(_abstract(_items(0)))
    _assert_equal(items, _items(step))
    return step, checkpoints.list_steps()


def _assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _data_files(folder, step):
  files = sorted((folder / str(step) / 'params').rglob('d/*'))
  assert files
  return files


def test_the_newest_checkpoint_comes_back_bit_for_bit(folder):
  assert _restored(folder) == (3, [2, 3])


def test_a_save_that_failed_is_told_once(tmp_path, monkeypatch):
  def full(*unused):
    raise ValueError('RESOURCE_EXHAUSTED: no space left')

  monkeypatch.setattr(ocp.CheckpointManager, 'close', full)
  with pytest.raises(OSError, match='of the plot'):
    with Checkpoints(tmp_path):
      raise OSError('of the plot')
  with pytest.raises(CheckpointError, match='cannot save in .*no space left'):
    with Checkpoints(tmp_path):
      pass


def test_an_empty_folder_gives_none(tmp_path):
  with Checkpoints(tmp_path / 'none') as checkpoints:
    assert checkpoints.restore(_abstract(_items(0))) is None


def test_one_item_is_restored_alone(folder):
  with Checkpoints(folder) as checkpoints:
    want = {'params': _items(3)['params']}
    _assert_equal(checkpoints.restore(_abstract(want))[1], want)


def _flip_a_byte(folder):
  file = max(_data_files(folder, 3), key=lambda file: file.stat().st_size)
  raw = bytearray(file.read_bytes())
  raw[len(raw) // 2] ^= 0x10
  file.write_bytes(raw)


def _truncate(folder):
  for file in _data_files(folder, 3):
    file.write_bytes(file.read_bytes()[:-100])


def _empty(folder):
  for child in (folder / '3').iterdir():
    shutil.rmtree(child) if child.is_dir() else child.unlink()


def _lose_the_checksums(folder):
  shutil.rmtree(folder / '3' / 'checksums')


@pytest.mark.parametrize(
  'damage', [_flip_a_byte, _truncate, _empty, _lose_the_checksums]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
  folder, damage, caplog
):
  damage(folder)
  with caplog.at_level(logging.WARNING):
    step, steps = _restored(folder)
  assert (step, steps) == (2, [2, 3])
  assert 'checkpoint 3 is damaged' in caplog.text
  # the run goes on from there and writes the step again
  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.restore(_abstract(_items(0)))
    checkpoints.save(3, _items(3))
  assert (folder / 'damaged-3').is_dir()
  assert _restored(folder) == (3, [2, 3])


def test_a_missing_checkpoint_leaves_the_one_before(folder):
  shutil.rmtree(folder / '3')
  assert _restored(folder) == (2, [2])


def test_no_whole_checkpoint_is_an_error(folder):
  for step in (2, 3):
    shutil.rmtree(folder / str(step) / 'params')
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(
      CheckpointError, match='all checkpoints in .* are damaged'
    ):
      checkpoints.restore(_abstract(_items(0)))


@pytest.mark.parametrize('change', ['shape', 'type', 'name'])
def test_arrays_that_do_not_fit_are_named(folder, change):
  items = _items(0)
  block = items['params']['block']
  block['w'] = {
    'shape': block['w'][:4],
    'type': block['w'].astype(jnp.bfloat16),
    'name': block['w'],
  }[change]
  if change == 'name':
    block['v'] = block.pop('w')
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(
      CheckpointError, match=r'block\.[wv], this version expects'
    ):
      checkpoints.restore(_abstract(items))
  assert (folder / '3').is_dir()  # nothing was wrong with it


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_the_checksum_knows_values_and_places_and_no_layout(dtype, monkeypatch):
  x = (100 * jax.random.normal(jax.random.key(0), (8, 6, 4))).astype(dtype)
  a, b = x[0, 0, 0], x[5, 3, 1]
  others = [
    x,
    x.at[7, 5, 3].add(1),
    x.at[0, 0, 0].set(b).at[5, 3, 1].set(a),
    jnp.roll(x, 1, 0),
    x.reshape(8, 4, 6).swapaxes(1, 2),
    jnp.zeros_like(x),
  ]
  sums = [checkpoint._checksum(other) for other in others]
  assert len(set(sums)) == len(sums)
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  for axes in [('a', 'b'), (None, 'b'), (('b', 'a'),), ('b', None, 'a'), ()]:
    laid = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    assert checkpoint._checksum(laid) == sums[0]
  monkeypatch.setattr(checkpoint, '_PIECE', 50)
  assert checkpoint._checksum(x) == sums[0]
  assert checkpoint._checksum(jnp.int32(3)) != checkpoint._checksum(
    jnp.int32(4)
  )


def test_a_save_is_not_touched_by_donating_its_arrays(tmp_path):
  state = {'w': jnp.arange(1 << 20, dtype=jnp.float32)}
  overwrite = jax.jit(lambda s: {'w': s['w'] * 0 - 1}, donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'params': state})
    for _ in range(20):
      state = overwrite(state)
    checkpoints.wait()
    _, items = checkpoints.restore(_abstract({'params': state}))
  np.testing.assert_array_equal(items['params']['w'], np.arange(1 << 20))


def test_a_checkpoint_moves_between_one_device_and_eight(tmp_path):
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('fsdp'))
  items = {'params': _items(1)['params']}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, items)
    checkpoints.wait()
    _, sharded = checkpoints.restore(_abstract(items, rows))
    assert len(sharded['params']['low'].sharding.device_set) == 8
    _assert_equal(sharded, items)
    checkpoints.save(2, sharded)
    checkpoints.wait()
    step, back = checkpoints.restore(_abstract(items))
  assert step == 2
  _assert_equal(back, items)
