"""The mesh, and where parameters, batches and activations live on it.

The layout is one table: RULES maps the logical axes that weights and
activations name to axes of the mesh.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'tensor')

RULES = {
  # activations
  'batch': ('data', 'fsdp'),
  'time': None,
  'act_embed': None,
  # weights
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_k': None,
  'head_v': None,
  'latent': None,
  'mlp': 'tensor',
  'experts': None,
  'vocab': 'tensor',
  'conv': None,
  'norm': None,
}

# kept whole where the mesh does not divide them: a byte vocabulary is odd, and
# key heads may be fewer than the devices; any other axis is an error
WHOLE_IF_UNEVEN = ('vocab', 'kv_heads')


def make_mesh(cfg):
  """A mesh of MeshConfig's sizes on the first devices."""
  shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
  need, have = math.prod(shape), jax.device_count()
  if need > have:
    raise ValueError(
      f'mesh data x fsdp x tensor {" x ".join(map(str, shape))} needs {need}'
      f' devices and there are {have}; make the mesh smaller'
    )
  return jax.make_mesh(
    shape,
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices()[:need],
  )


def batch_sharding(mesh):
  """Of arrays [B,...], B split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def constrain(x, *axes):
  """x laid out by its logical axes on the current mesh (`jax.set_mesh`);
  unchanged without one."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = PartitionSpec(*(RULES[axis] for axis in axes))
  return jax.lax.with_sharding_constraint(x, spec)


def _boxed(model):
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def abstract_params(model):
  """The parameters' shapes and types, as a plain nested dict."""
  return nn.unbox(_boxed(model))


def logical_axes(model):
  """The parameters' logical axes: a tree of PartitionSpec of axis names."""
  return nn.get_partition_spec(_boxed(model))


def param_shardings(model, mesh):
  """The parameters' NamedSharding by RULES.

  Raises a ValueError that names the weight when the mesh does not divide it.
  """

  def place(path, axes, weight):
    spec = []
    for axis, size in zip(axes, weight.shape, strict=True):
      to = RULES[axis]
      parts = mesh.shape[to] if to else 1
      if size % parts:
        if axis not in WHOLE_IF_UNEVEN:
          raise ValueError(
            f'mesh.{to} {parts} does not divide the {size} {axis} of'
            f' {"/".join(key.key for key in path)}; change one of them'
          )
        to = None
      spec.append(to)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(
    place,
    logical_axes(model),
    abstract_params(model),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def init_params(model, key, mesh):
  """Fresh parameters, a plain nested dict of arrays born on their devices.

  The values do not depend on the mesh.
  """
  shardings = param_shardings(model, mesh)
  # a row for each share of the batch: the model lays its activations out
  tokens = jnp.zeros((mesh.shape['data'] * mesh.shape['fsdp'], 1), jnp.int32)
  init = lambda key: nn.unbox(model.init(key, tokens)['params'])
  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=shardings)(key)
