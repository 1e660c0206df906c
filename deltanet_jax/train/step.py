"""One optimiser step, as a jitted function of state and batch."""

import jax
import jax.numpy as jnp
import optax

from deltanet_jax.model import Backbone, head_weight
from deltanet_jax.train.loss import cross_entropy

MAX_STREAK = 10  # skipped steps in a row that end a run


def make_loss(cfg, dtype):
  """The function (params, batch) -> summed loss in nats of a ModelConfig.

  batch: dict of [B,T] tokens, targets, positions, segment_ids (int32) and
  weights (float32).
  """
  backbone = Backbone(cfg, dtype)

  def total_loss(params, batch):
    hidden, _ = backbone.apply(
      {'params': params['backbone']},
      batch['tokens'],
      positions=batch['positions'],
      segment_ids=batch['segment_ids'],
    )
    head = head_weight(params, cfg)
    return cross_entropy(hidden, head, batch['targets'], batch['weights'])

  return total_loss


def micro_batches(batch, parts):
  """[B, ...] -> [parts, B/parts, ...], every device keeping its own rows."""

  def split(x):
    # rows i, i + parts, ...: a split into runs of rows would move them
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return x.swapaxes(0, 1)

  return jax.tree.map(split, batch)


def loss_and_grads(total_loss, params, batch, accumulate):
  """Mean loss per token in nats, and its gradient, over all micro-batches.

  The sums are divided by the weight of the whole batch, so that `accumulate`
  changes the memory and nothing else, however the weights are spread.
  """
  count = batch['weights'].sum()

  def part(batch):
    return jax.value_and_grad(lambda p: total_loss(p, batch) / count)(params)

  if accumulate == 1:
    return part(batch)

  def add(sums, batch):
    return jax.tree.map(jnp.add, sums, part(batch)), None

  zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(add, zeros, micro_batches(batch, accumulate))[0]


def train_step(state, batch, *, total_loss, optimizer, rate, accumulate):
  """The next State and the step's metrics.

  A batch whose loss or gradient norm is not finite changes neither parameters
  nor optimiser; it is counted in `skipped` and, until a good one, in `streak`.

  metrics: loss (nats per token), grad_norm (before clipping), lr, skipped,
  streak.
  """
  loss, grads = loss_and_grads(total_loss, state.params, batch, accumulate)
  norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def choose(new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

  bad = 1 - good.astype(jnp.int32)
  metrics = {
    'loss': loss,
    'grad_norm': norm,
    'lr': rate(state.step - state.skipped),
    'skipped': state.skipped + bad,
    'streak': (state.streak + bad) * bad,
  }
  state = state._replace(
    params=choose(params, state.params),
    opt_state=choose(opt_state, state.opt_state),
    step=state.step + 1,
    skipped=metrics['skipped'],
    streak=metrics['streak'],
  )
  return state, metrics
