"""One training step: micro-batches, and values that are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltanet_jax.objectives.base import Outcome
from deltanet_jax.train.optimizer import Optimizer
from deltanet_jax.train.state import create_state
from deltanet_jax.train.step import compute_outcome_and_grads, train_step


class _Line:
  """An objective: squared errors."""

  def __call__(self, params, batch):
    error = (batch['tokens'] @ params['w'] - batch['targets']) ** 2
    nats = jnp.sum(batch['weights'] * error)
    return nats, Outcome(nats, reports=())

  def adjust(self, params, outcome):
    return params

  def figures(self, outcome):
    return {}


_line_loss = _Line()


def _line(rows=8):
  keys = jax.random.split(jax.random.key(0), 4)
  batch = {
    'tokens': jax.random.normal(keys[0], (rows, 5, 3)),
    'targets': jax.random.normal(keys[1], (rows, 5)),
    # uneven: a mean of the micro-batches' means would differ
    'weights': jax.random.bernoulli(keys[2], 0.5, (rows, 5)).astype(float),
  }
  return {'w': jax.random.normal(keys[3], (3,))}, batch


def _optimizer(*parts):
  """Its rate is the number of updates so far."""
  chain = optax.chain(*parts)

  def update(grads, state, params):
    count = state[0][0].count.astype(float)
    return *chain.update(grads, state, params), count

  return Optimizer(chain.init, update)


def test_four_micro_batches_equal_one_large_batch():
  params, batch = _line()
  weights = batch['weights'].reshape(2, 4, 5).sum((0, 2))
  assert len(set(weights.tolist())) > 1
  one = compute_outcome_and_grads(_line_loss, params, batch, 1)
  four = compute_outcome_and_grads(_line_loss, params, batch, 4)
  mean = _line_loss(params, batch)[0] / batch['weights'].sum()
  np.testing.assert_allclose(one[0].nats, mean, rtol=1e-6)
  chex.assert_trees_all_close(four, one, rtol=1e-5)


def test_a_batch_without_finite_loss_changes_nothing_and_is_counted():
  params, batch = _line()
  optimizer = _optimizer(optax.adam(0.1))
  step = jax.jit(
    lambda state, batch: train_step(
      state, batch, objective=_line_loss, optimizer=optimizer,
      accumulate=1,
    )
  )  # fmt: skip
  first, _ = step(create_state(params, optimizer), batch)
  bad = batch | {'targets': batch['targets'].at[0, 0].set(jnp.nan)}
  bad['weights'] = jnp.ones_like(bad['weights'])
  second, metrics = step(first, bad)
  third, metrics_bad = step(second, bad)
  assert not np.isfinite(metrics['loss'])
  chex.assert_trees_all_equal(first[:2], third[:2])  # params, opt_state
  counters = [int(third.step), int(third.skipped), int(third.skipped_in_a_row)]
  assert counters == [3, 2, 2]
  assert (
    int(metrics_bad['skipped_in_a_row']) == 2
    and float(metrics_bad['lr']) == 1.0
  )
  fourth, _ = step(third, batch)
  assert [int(fourth.skipped), int(fourth.skipped_in_a_row)] == [2, 0]
  assert not np.array_equal(fourth.params['w'], third.params['w'])


@pytest.mark.parametrize('what', ['nan', 'overflow'])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(what):
  params, batch = _line()
  scale = {'nan': jnp.nan, 'overflow': 3e38}[what]
  optimizer = _optimizer(
    optax.adam(0.1),
    # finite gradients, but parameters that are not: b2 = 1, a rate of 1e38
    optax.stateless(lambda g, p: jax.tree.map(lambda x: x * scale * 100, g)),
  )
  step = jax.jit(
    lambda state, batch: train_step(
      state, batch, objective=_line_loss, optimizer=optimizer,
      accumulate=1,
    )
  )  # fmt: skip
  first = create_state(params, optimizer)
  second, metrics = step(first, batch)
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  chex.assert_trees_all_equal(first[:2], second[:2])  # params, opt_state
  assert [
    int(second.step),
    int(second.skipped),
    int(second.skipped_in_a_row),
  ] == [1] * 3
