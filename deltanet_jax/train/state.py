"""What a training run carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltanet_jax.parallel.sharding import Params
from deltanet_jax.train.optimizer import Optimizer


class State(NamedTuple):
  """A value: parameters in float32, the optimizer's state, three counters."""

  params: Params
  opt_state: optax.OptState
  step: jax.Array  # [] int32, batches seen
  skipped: jax.Array  # [] int32, of these, batches that left no trace
  streak: jax.Array  # [] int32, skipped batches up to now without a break


def create_state(params: Params, optimizer: Optimizer) -> State:
  """State before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return State(params, optimizer.init(params), zero, zero, zero)


def make_state_shardings(
  params: Params, optimizer: Optimizer, mesh: Mesh
) -> State:
  """State of NamedShardings: an optimizer moment lies as its parameter does.

  params: arrays, or ShapeDtypeStructs with a sharding.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  names = {
    jax.tree_util.keystr(path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def place(path, leaf):
    del leaf
    # the path of a moment ends with the path of its parameter
    ends = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
    return next((names[end] for end in ends if end in names), whole)

  abstract = jax.eval_shape(lambda p: create_state(p, optimizer), params)
  return jax.tree_util.tree_map_with_path(place, abstract)
