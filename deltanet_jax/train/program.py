"""The compiled functions of a training run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.data.tokenizer import ByteTokenizer
from deltanet_jax.model import HybridLM
from deltanet_jax.objectives.next_token import make_loss
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Batch, Params
from deltanet_jax.runs import processes
from deltanet_jax.train.optimizer import make_optimizer
from deltanet_jax.train.state import State, create_state, make_state_shardings
from deltanet_jax.train.step import train_step

# what a step takes, all [B,T]
BATCH = {
  'tokens': jnp.int32,
  'targets': jnp.int32,
  'segment_ids': jnp.int32,
  'positions': jnp.int32,
  'weights': jnp.float32,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of an Experiment on a mesh."""

  abstract: State  # ShapeDtypeStructs with shardings
  init: Callable[[], Params]  # fresh parameters
  begin: Callable[[Params], State]  # with parameters that it takes over
  # the state is donated; metrics
  step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
  loss: Callable[[Params, Batch], jax.Array]  # nats
  share: Callable[[int], processes.RowShare]  # of so many rows of a batch
  # with shardings, what `step` takes
  batch: dict[str, jax.ShapeDtypeStruct]


def make_program(experiment: Experiment, mesh: jax.sharding.Mesh) -> Program:
  """The `Program` of an Experiment.

  Raises:
    ConfigError: the mesh does not divide a weight.
  """
  train, data = experiment.train, experiment.data
  dtype = jnp.dtype(train.dtype)
  model = HybridLM(experiment.model, dtype)
  objective = train.objective.make(experiment.model, dtype)
  optim = _make_optimizer(experiment, model, objective)
  abstract = _abstract_state(model, optim, mesh)
  homes = jax.tree.map(lambda x: x.sharding, abstract)
  rows, whole = sharding.make_batch_sharding(mesh), homes.step
  return Program(
    abstract=abstract,
    init=lambda: sharding.init_params(model, jax.random.key(train.seed), mesh),
    begin=functools.partial(_begin, optim, homes),
    step=jax.jit(
      _make_step(experiment, objective, optim),
      in_shardings=(homes, rows),
      out_shardings=(homes, whole),
      donate_argnums=0,
    ),
    loss=jax.jit(
      make_loss(experiment.model, dtype),
      in_shardings=(homes.params, rows),
      out_shardings=whole,
    ),
    share=lambda count: processes.find_row_share(rows, (count, data.seq_len)),
    batch={
      name: jax.ShapeDtypeStruct(
        (data.batch, data.seq_len), dtype, sharding=rows
      )
      for name, dtype in BATCH.items()
    },
  )


def _make_optimizer(experiment, model, objective):
  axes = sharding.find_logical_axes(model)
  moved = jax.tree_util.tree_map_with_path(
    lambda path, _: objective.has_gradient([key.key for key in path]),
    axes,
  )
  return make_optimizer(experiment.optim, experiment.train.steps, axes, moved)


def _abstract_state(model, optim, mesh):
  """State of ShapeDtypeStructs, each with its sharding."""
  place = lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)
  try:
    homes = sharding.make_param_shardings(model, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  params = jax.tree.map(place, sharding.make_abstract_params(model), homes)
  shapes = jax.eval_shape(lambda p: create_state(p, optim), params)
  return jax.tree.map(place, shapes, make_state_shardings(params, optim, mesh))


def _begin(optim, homes, params):
  """The first State: the parameters stay out of the program, which would copy
  them."""
  rest = jax.jit(
    lambda params: tuple(create_state(params, optim)[1:]),
    out_shardings=tuple(homes[1:]),
  )
  return State(params, *rest(params))


def _make_step(experiment, objective, optim):
  """`train_step` of a state and a batch; with the batch's sizes."""
  take = functools.partial(
    train_step,
    objective=objective,
    optimizer=optim,
    accumulate=experiment.optim.accumulate,
  )

  def step(state, batch):
    state, metrics = take(state, batch)
    # of a byte text every target but the end of a document is a byte
    bytes_ = (batch['weights'] > 0) & (batch['targets'] != ByteTokenizer.eod)
    sizes = {'tokens': batch['weights'].sum(), 'bytes': bytes_.sum()}
    return state, metrics | sizes

  return step
