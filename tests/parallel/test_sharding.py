"""The mesh and the shardings of parameters, batches and activations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.layers.proj import AXES
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

FFN = MLPConfig(32)
DELTA = GatedDeltaNetConfig(
  key_heads=2, value_heads=4, key_dim=8, value_dim=8, form='recurrent'
)
FULL = AttentionConfig(heads=4, kv_heads=1, head_dim=8)

# the mesh axes that split a weight's width
STORED = ('fsdp', 'expert', 'seq')


def _model(**changes):
  fields = {
    'vocab': 33,
    'd_model': 16,
    'repeats': 2,
    'period': (Layer(DELTA, FFN), Layer(FULL, FFN)),
  }
  return HybridLM(ModelConfig(**fields | changes))


def test_every_weight_axis_has_a_rule_and_rules_name_mesh_axes():
  activations = {'batch', 'time', 'act_embed'}
  assert set(sharding.RULES) == set(AXES) | activations
  for axis in sharding.RULES:
    assert set(sharding.find_mesh_axes(axis)) <= set(sharding.MESH_AXES)


def test_mesh_has_the_sizes_asked_for_and_plain_axes():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, seq=2))
  sizes = {'replica': 1, 'data': 1, 'fsdp': 2, 'expert': 1, 'seq': 2}
  assert dict(mesh.shape) == sizes | {'tensor': 1}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_larger_than_the_machine_is_refused():
  message = 'mesh data 3 x seq 9 needs 27 devices and there are 8'
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(MeshConfig(data=3, seq=9))


class _Device:
  def __init__(self, slice_index):
    self.slice_index, self.platform = slice_index, 'tpu'
    self.device_kind = 'TPU v4'


def test_slices_are_counted_by_the_replica_axis():
  devices = [_Device(0), _Device(0), _Device(1), _Device(1)]
  with pytest.raises(
    ValueError, match='replica is 1 and the devices belong to 2 slices'
  ):
    sharding.make_mesh(MeshConfig(fsdp=4), devices)


def test_parameters_lie_as_their_axes_say():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  places = sharding.make_param_shardings(_model(), mesh)
  delta, attention = (
    places['backbone']['period'][f'layer_{i}']['mixer'] for i in (0, 1)
  )
  # stacked over the layers, then D over fsdp and heads over tensor
  assert delta['v']['w'].spec == P(None, STORED, 'tensor', None)
  assert delta['o']['w'].spec == P(None, 'tensor', None, STORED)
  assert delta['q_conv']['taps'].spec == P(None, None, 'tensor', None)
  assert delta['A_log'].spec == P(None, 'tensor')
  # one key head and 33 words do not divide: not split
  assert attention['k']['w'].spec == P(None, STORED, None, None)
  assert places['head']['w'].spec == P(STORED, None)


def test_weights_are_stored_over_the_axes_that_split_tokens():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, seq=2))
  moe = MoEConfig(experts=4, top=2, hidden=8)
  model = _model(period=(Layer(FULL, moe),))
  layer = sharding.make_param_shardings(model, mesh)['backbone']['period'][
    'layer_0'
  ]
  assert layer['mixer']['q']['w'].spec == P(None, STORED, 'tensor', None)
  # the experts come first, and a mesh axis serves one axis of a weight
  rest = ('fsdp', 'seq')
  assert layer['ffn']['gate'].spec == P(None, 'expert', rest, 'tensor')
  assert layer['ffn']['router']['w'].spec == P(None, STORED, ())
  shapes = sharding.make_abstract_params(model)['backbone']['embed']
  place = sharding.make_param_shardings(model, mesh)['backbone']['embed']
  embed = jax.ShapeDtypeStruct(shapes.shape, shapes.dtype, sharding=place)
  assert sharding.count_bytes_per_device({'embed': embed}) == 33 * 16 * 4 // 8


def test_a_mesh_that_does_not_divide_is_refused_with_the_weights_name():
  mesh = sharding.make_mesh(MeshConfig(tensor=8))
  with pytest.raises(
    ValueError,
    match='mesh.tensor 8 does not divide the 4 heads of'
    ' backbone/period/layer_0/mixer/A_log',
  ):
    sharding.make_param_shardings(_model(), mesh)


def test_parameters_are_born_in_place_with_values_of_no_mesh():
  model, key = _model(), jax.random.key(3)
  meshes = [
    sharding.make_mesh(cfg)
    for cfg in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2))
  ]
  one, eight = (sharding.init_params(model, key, mesh) for mesh in meshes)
  chex.assert_trees_all_equal(one, eight)
  places = sharding.make_param_shardings(model, meshes[1])
  jax.tree.map(
    lambda x, place: np.testing.assert_equal(x.sharding.spec, place.spec),
    eight,
    places,
  )
  # no two layers of the scan start alike
  q = one['backbone']['period']['layer_0']['mixer']['q']['w']
  assert abs(q[0] - q[1]).max() > 0
  shapes = sharding.make_abstract_params(model)
  chex.assert_trees_all_equal_shapes_and_dtypes(one, shapes)


def test_constraint_acts_under_a_mesh_only():
  x = jnp.zeros((8, 4, 16))
  lay = jax.jit(lambda x: sharding.constrain(x, 'batch', 'time', 'act_embed'))
  assert len(lay(x).sharding.device_set) == 1
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
  with jax.set_mesh(mesh):
    y = lay(x)
    # three rows do not divide over four devices: whole
    few = lay(x[:3])
  assert y.sharding.shard_shape(y.shape) == (2, 2, 16)
  assert few.sharding.shard_shape(few.shape) == (3, 2, 16)
  rows = sharding.make_batch_sharding(mesh)
  assert rows.shard_shape((8, 4)) == (2, 2)
