"""The mesh, and one layout table for everything on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deltanet_jax import sharding
from deltanet_jax.experiment import Layer, MeshConfig, MLPConfig, ModelConfig
from deltanet_jax.layers.proj import AXES
from deltanet_jax.mixers.config import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.model import HybridLM

pytestmark = pytest.mark.usefixtures('quick_compile')

FFN = MLPConfig(32)
DELTA = GatedDeltaNetConfig(
  key_heads=2, value_heads=4, key_dim=8, value_dim=8, form='recurrent'
)
FULL = AttentionConfig(heads=4, kv_heads=1, head_dim=8)


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
  for to in sharding.RULES.values():
    assert (
      to is None
      or {to} <= set(sharding.MESH_AXES)
      or (set(to) <= set(sharding.MESH_AXES))
    )


def test_mesh_has_the_sizes_asked_for_and_plain_axes():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 2, 'tensor': 2}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_larger_than_the_machine_is_refused():
  with pytest.raises(ValueError, match='needs 27 devices and there are 8'):
    sharding.make_mesh(MeshConfig(data=3, fsdp=3, tensor=3))


def test_parameters_lie_as_their_axes_say():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  places = sharding.param_shardings(_model(), mesh)
  delta, attention = (
    places['backbone']['period'][f'layer_{i}']['mixer'] for i in (0, 1)
  )
  # stacked over the layers, then D over fsdp and heads over tensor
  assert delta['v']['w'].spec == P(None, 'fsdp', 'tensor', None)
  assert delta['o']['w'].spec == P(None, 'tensor', None, 'fsdp')
  assert delta['q_conv']['taps'].spec == P(None, None, 'tensor', None)
  assert delta['A_log'].spec == P(None, 'tensor')
  # one key head and 33 words do not divide: kept whole
  assert attention['k']['w'].spec == P(None, 'fsdp', None, None)
  assert places['head']['w'].spec == P('fsdp', None)


def test_a_mesh_that_does_not_divide_is_refused_with_the_weights_name():
  mesh = sharding.make_mesh(MeshConfig(tensor=8))
  with pytest.raises(
    ValueError,
    match='mesh.tensor 8 does not divide the 4 heads of'
    ' backbone/period/layer_0/mixer/A_log',
  ):
    sharding.param_shardings(_model(), mesh)


def test_parameters_are_born_in_place_with_values_of_no_mesh():
  model, key = _model(), jax.random.key(3)
  meshes = [
    sharding.make_mesh(cfg)
    for cfg in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2))
  ]
  one, eight = (sharding.init_params(model, key, mesh) for mesh in meshes)
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  places = sharding.param_shardings(model, meshes[1])
  jax.tree.map(
    lambda x, place: np.testing.assert_equal(x.sharding.spec, place.spec),
    eight,
    places,
  )
  # no two layers of the scan start alike
  q = one['backbone']['period']['layer_0']['mixer']['q']['w']
  assert abs(q[0] - q[1]).max() > 0
  shapes = sharding.abstract_params(model)
  jax.tree.map(
    lambda x, y: np.testing.assert_equal(
      (x.shape, x.dtype), (y.shape, y.dtype)
    ),
    one,
    shapes,
  )


def test_constraint_acts_under_a_mesh_only():
  x = jnp.zeros((8, 4, 16))
  lay = jax.jit(lambda x: sharding.constrain(x, 'batch', 'time', 'act_embed'))
  assert len(lay(x).sharding.device_set) == 1
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  with jax.set_mesh(mesh):
    y = lay(x)
  assert y.sharding.shard_shape(y.shape) == (1, 4, 16)
  rows = sharding.batch_sharding(mesh)
  assert rows.shard_shape((8, 4)) == (1, 4)
