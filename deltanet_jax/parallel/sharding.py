"""The mesh, and the shardings of parameters, batches and activations.

RULES maps the logical axes of weights and activations to axes of the mesh:

    replica   the batch is split, weights replicated; between slices or pods
    data      the batch is split, weights replicated
    fsdp      the batch, weights and optimizer state are split
    expert    the batch and experts are split, other weights as by fsdp
    seq       time is split, weights as by fsdp
    tensor    heads, hidden channels and the vocabulary are split

A weight is gathered over fsdp, seq and expert where it is used
(`gather_weight`).
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.platforms import choose

Params = dict[str, 'Params | jax.Array']  # nested, by the modules' names
# the tree of Params, with PartitionSpecs of logical axis names
LogicalAxes = dict[str, 'LogicalAxes | PartitionSpec']
Axes = Sequence[str | None]  # an array's logical axes; None: not split
# [B,T]: tokens, targets, positions, segment_ids, weights
Batch = dict[str, jax.Array]

# devices along the last axes are neighbors on the network
MESH_AXES = ('replica', 'data', 'fsdp', 'expert', 'seq', 'tensor')

RULES = {
  # activations
  'batch': ('replica', 'data', 'fsdp', 'expert'),
  'time': 'seq',
  'act_embed': None,
  # weights
  'layers': None,
  'embed': ('fsdp', 'expert', 'seq'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_k': None,
  'head_v': None,
  'latent': None,
  'mlp': 'tensor',
  'experts': 'expert',
  'vocab': 'tensor',
  'conv': None,
  'norm': None,
}

# replicated where the mesh does not divide them: a byte vocabulary is odd, and
# key heads may be fewer than devices. For other axes of a weight that is an
# error, since a copy on every device is what the mesh is to avoid
WHOLE_IF_UNEVEN = ('vocab', 'kv_heads')


def make_mesh(
  cfg: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of MeshConfig's sizes on the first of `devices`, by default all.

  With several TPU slices `replica` must be their number. ValueError where there
  are too few devices or another number of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
  need = math.prod(shape)
  if need > len(devices):
    split = [f'{a} {n}' for a, n in zip(MESH_AXES, shape, strict=True) if n > 1]
    raise ValueError(
      f'mesh {" x ".join(split)} needs {need} devices and there are'
      f' {len(devices)}; make the mesh smaller'
    )
  devices = devices[:need]
  slices = 1
  if choose(devices[0]).slices:
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
  # two of our axes may share a physical one: 64 x 4 on a 16 x 16 pod
  if slices == 1:
    grid = mesh_utils.create_device_mesh(
      shape, devices=devices, allow_split_physical_axes=True
    )
  elif slices == cfg.replica:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]),
      (slices, *(1 for _ in shape[1:])),
      devices=devices,
      allow_split_physical_axes=True,
    )
  else:
    raise ValueError(
      f'mesh.replica is {cfg.replica} and the devices belong to {slices}'
      f' slices; set mesh.replica={slices}'
    )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def get_current_mesh() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def count_parts(axis: str | None) -> int:
  """The number of parts into which the current mesh splits a logical axis."""
  mesh = get_current_mesh()
  return (
    1
    if mesh is None
    else math.prod(mesh.shape[a] for a in find_mesh_axes(axis))
  )


def find_mesh_axes(axis: str | None) -> tuple[str, ...]:
  """The mesh axes of a logical axis; () where it is not split."""
  to = () if axis is None else RULES[axis]
  return (to,) if isinstance(to, str) else to or ()


def make_spec(
  axes: Axes,
  shape: Sequence[int],
  mesh: Mesh | AbstractMesh,
  uneven: Callable[[int, tuple[str, ...]], None] = lambda i, to: None,
) -> PartitionSpec:
  """The PartitionSpec of an array by its logical axes (None: not split).

  A mesh axis splits the first of the array's axes that it applies to. Where the
  mesh does not divide a size, `uneven(index, mesh axes)` is called and the axis
  is not split.
  """
  used, places = set(), []
  for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
    to = tuple(a for a in find_mesh_axes(axis) if a not in used)
    if size % math.prod(mesh.shape[a] for a in to):
      uneven(i, to)
      to = ()
    used |= set(to)
    places.append(to if len(to) > 1 else to[0] if to else None)
  return PartitionSpec(*places)


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays [B,T]."""
  whole = tuple(
    math.prod(mesh.shape[a] for a in find_mesh_axes(x)) for x in _ROWS
  )
  return NamedSharding(mesh, make_spec(_ROWS, whole, mesh))


_ROWS = ('batch', 'time')


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains x to the sharding of its logical axes (None: not split) on the
  current mesh, by `make_spec`; returns x without a mesh."""
  mesh = get_current_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, make_spec(axes, x.shape, mesh))


def gather_weight(w: jax.Array, axes: Axes) -> jax.Array:
  """Gathers a weight before a product, so that only 'tensor' splits it.

  The constraint keeps the partitioner from moving activations instead.
  """
  stored = ('embed', 'experts')
  return constrain(w, *(None if axis in stored else axis for axis in axes))


def split_time_to_rows(x: jax.Array) -> jax.Array:
  """[B,T,...] -> [P B, T/P, ...]: spans become rows, so that a scan over time
  runs on every device's own span. Returns x where time is not split."""
  P = count_parts('time')
  if P == 1:
    return x
  B, T, *rest = x.shape
  none = (None,) * len(rest)
  x = constrain(x.reshape(B, P, T // P, *rest), 'batch', 'time', None, *none)
  x = constrain(jnp.swapaxes(x, 0, 1), 'time', 'batch', None, *none)
  x = x.reshape(P * B, T // P, *rest)
  to = find_mesh_axes('time') + find_mesh_axes('batch')
  return jax.lax.with_sharding_constraint(x, PartitionSpec(to))


def count_bytes_per_device(tree: object) -> int:
  """Bytes per device of arrays, or of ShapeDtypeStructs with a sharding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _boxed(model):
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def make_abstract_params(model: nn.Module) -> Params:
  """The parameters' shapes and types, as a plain nested dict."""
  return nn.unbox(_boxed(model))


def find_logical_axes(model: nn.Module) -> LogicalAxes:
  """The parameters' logical axes: a tree of PartitionSpec of axis names."""
  return nn.get_partition_spec(_boxed(model))


def make_param_shardings(model: nn.Module, mesh: Mesh) -> Params:
  """The parameters' NamedShardings by RULES.

  Raises:
    ValueError: the mesh does not divide a weight, which the message names.
  """

  def place(path, axes, weight):
    def uneven(i, to):
      if axes[i] not in WHOLE_IF_UNEVEN:
        split = [f'mesh.{a} {n}' for a in to if (n := mesh.shape[a]) > 1]
        raise ValueError(
          f'{" x ".join(split)} does not divide the {weight.shape[i]} {axes[i]}'
          f' of {"/".join(key.key for key in path)}; change one of them'
        )

    return NamedSharding(mesh, make_spec(axes, weight.shape, mesh, uneven))

  return jax.tree_util.tree_map_with_path(
    place,
    find_logical_axes(model),
    make_abstract_params(model),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def init_params(model: nn.Module, key: jax.Array, mesh: Mesh) -> Params:
  """Random parameters, a plain nested dict of arrays that are created sharded.

  Their values do not depend on the mesh.
  """
  shardings = make_param_shardings(model, mesh)
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = lambda key: nn.unbox(model.init(key, tokens)['params'])
  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=shardings)(key)
