"""The training state: what a step takes and returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltanet_jax.parallel.sharding import Params
from deltanet_jax.train.optimizer import Optimizer


class State(NamedTuple):
  """Parameters in float32, the optimizer's state and three counters."""

  params: Params
  opt_state: optax.OptState
  step: jax.Array  # [] int32, batches seen
  skipped: jax.Array  # [] int32, batches that changed nothing (`train_step`)
  skipped_in_a_row: jax.Array  # [] int32, of these, the latest without a break


def create_state(params: Params, optimizer: Optimizer) -> State:
  """The State before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return State(params, optimizer.init(params), zero, zero, zero)


def make_state_shardings(
  params: Params, optimizer: Optimizer, mesh: Mesh
) -> State:
  """The State's NamedShardings: an optimizer moment has its parameter's.

  params: arrays, or ShapeDtypeStructs with a sharding
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
