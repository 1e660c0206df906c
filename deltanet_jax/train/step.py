"""One optimizer step, a pure function of state and batch."""

import jax
import jax.numpy as jnp
import optax

from deltanet_jax.objectives.base import Objective, Outcome
from deltanet_jax.parallel.sharding import Batch, Params
from deltanet_jax.train.optimizer import Optimizer
from deltanet_jax.train.state import State

MAX_SKIPPED_IN_A_ROW = 10  # skipped steps in a row that end a run


def split_micro_batches(batch: Batch, parts: int) -> Batch:
  """[B,...] -> [parts,B/parts,...]; no row moves to another device."""

  def split(x):
    # rows i, i + parts, ...: a split into neighboring rows would move them
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return x.swapaxes(0, 1)

  return jax.tree.map(split, batch)


def compute_outcome_and_grads(
  objective: Objective, params: Params, batch: Batch, accumulate: int
) -> tuple[Outcome, Params]:
  """The Outcome, as means, and the objective's gradient, both per token over
  `accumulate` micro-batches.

  Sums over tokens are divided by the weight of the whole batch, so that
  `accumulate` changes memory alone, however the weights are spread. Only the
  experts' balance is computed for each micro-batch.
  """
  count = batch['weights'].sum()

  def part(batch):
    def mean(params):
      total, outcome = objective(params, batch)
      reports = jax.tree.map(lambda x: x / accumulate, outcome.reports)
      return total / count, Outcome(outcome.nats / count, reports)

    (_, outcome), grads = jax.value_and_grad(mean, has_aux=True)(params)
    return outcome, grads

  if accumulate == 1:
    return part(batch)

  def add(sums, batch):
    return jax.tree.map(jnp.add, sums, part(batch)), None

  parts = split_micro_batches(batch, accumulate)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first)
  )
  return jax.lax.scan(add, zeros, parts)[0]


def _finite(tree):
  """[] bool: true where all numbers of a tree are finite."""
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def train_step(
  state: State,
  batch: Batch,
  *,
  objective: Objective,
  optimizer: Optimizer,
  accumulate: int,
) -> tuple[State, dict[str, jax.Array]]:
  """Returns the next State and the step's metrics.

  objective: its `adjust` is called after the optimizer's update
  accumulate: the number of micro-batches

  A batch whose loss, gradient norm or new parameters are not finite changes
  neither parameters nor optimizer; it is counted in `skipped` and, up to the
  next good one, in `skipped_in_a_row`.

  metrics: loss (next token, nats per token), grad_norm (before clipping), lr,
  skipped, skipped_in_a_row, and those of `objective.figures`.
  """
  outcome, grads = compute_outcome_and_grads(
    objective, state.params, batch, accumulate
  )
  loss = outcome.nats
  norm = optax.tree.norm(grads)
  updates, opt_state, rate = optimizer.update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  # the moments need no check: those of finite gradients are finite
  good = jnp.isfinite(loss) & jnp.isfinite(norm) & _finite(params)
  params = objective.adjust(params, outcome)

  def choose(new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

  bad = 1 - good.astype(jnp.int32)
  metrics = {
    'loss': loss,
    'grad_norm': norm,
    'lr': rate,
    'skipped': state.skipped + bad,
    'skipped_in_a_row': (state.skipped_in_a_row + bad) * bad,
    **objective.figures(outcome),
  }
  state = state._replace(
    params=choose(params, state.params),
    opt_state=choose(opt_state, state.opt_state),
    step=state.step + 1,
    skipped=metrics['skipped'],
    skipped_in_a_row=metrics['skipped_in_a_row'],
  )
  return state, metrics
