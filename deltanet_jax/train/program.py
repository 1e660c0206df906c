"""The compiled functions of a training run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltanet_jax import kernels
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

# the arrays [B,T] of a batch
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
  init: Callable[[], Params]  # random parameters
  begin: Callable[[Params], State]  # the State before the first step
  # returns the next state and metrics; the state is donated
  step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
  loss: Callable[[Params, Batch], jax.Array]  # summed nats
  share: Callable[[int], processes.RowShare]  # a process's rows of so many
  batch: dict[str, jax.ShapeDtypeStruct]  # with shardings


def make_program(experiment: Experiment, mesh: jax.sharding.Mesh) -> Program:
  """Returns the `Program` of an Experiment; nothing is compiled yet.

  Raises:
    ConfigError: the mesh does not divide a weight; a mixer's form is not for
      these devices.
  """
  platform = mesh.devices.flat[0].platform
  kernels.require_platform(experiment.model.layers, platform)
  train, data = experiment.train, experiment.data
  dtype = jnp.dtype(train.dtype)
  model = HybridLM(experiment.model, dtype)
  objective = train.objective.make(experiment.model, dtype)
  optim = _make_optimizer(experiment, model, objective)
  abstract = _abstract_state(model, optim, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  rows, replicated = sharding.make_batch_sharding(mesh), shardings.step
  return Program(
    abstract=abstract,
    init=lambda: sharding.init_params(model, jax.random.key(train.seed), mesh),
    begin=functools.partial(_begin, optim, shardings),
    step=jax.jit(
      _make_step(experiment, objective, optim),
      in_shardings=(shardings, rows),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
    ),
    loss=jax.jit(
      make_loss(experiment.model, dtype),
      in_shardings=(shardings.params, rows),
      out_shardings=replicated,
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
  trainable = jax.tree_util.tree_map_with_path(
    lambda path, _: objective.has_gradient([key.key for key in path]),
    axes,
  )
  return make_optimizer(
    experiment.optim, experiment.train.steps, axes, trainable
  )


def _abstract_state(model, optim, mesh):
  """A State of ShapeDtypeStructs with shardings."""
  place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
  try:
    shardings = sharding.make_param_shardings(model, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  params = jax.tree.map(place, sharding.make_abstract_params(model), shardings)
  shapes = jax.eval_shape(lambda p: create_state(p, optim), params)
  return jax.tree.map(place, shapes, make_state_shardings(params, optim, mesh))


def _begin(optim, shardings, params):
  """The first State. The program returns no parameters, which it would copy."""
  rest = jax.jit(
    lambda params: tuple(create_state(params, optim)[1:]),
    out_shardings=tuple(shardings[1:]),
  )
  return State(params, *rest(params))


def _make_step(experiment, objective, optim):
  """(state, batch) -> `train_step`, its metrics with the batch's sizes."""
  take_step = functools.partial(
    train_step,
    objective=objective,
    optimizer=optim,
    accumulate=experiment.optim.accumulate,
  )

  def step(state, batch):
    state, metrics = take_step(state, batch)
    # with the byte tokenizer every target but the end of a document is a byte
    bytes_ = (batch['weights'] > 0) & (batch['targets'] != ByteTokenizer.eod)
    sizes = {'tokens': batch['weights'].sum(), 'bytes': bytes_.sum()}
    return state, metrics | sizes

  return step
