"""The blocked cross-entropy against the plain formula."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltanet_jax.objectives.loss import cross_entropy


def _inputs(B=2, T=13, D=8, Z=11):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (B, T, D))
  head = jax.random.normal(keys[1], (D, Z))
  targets = jax.random.randint(keys[2], (B, T), 0, Z)
  weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
  return hidden, head, targets, weights


def _plain(hidden, head, targets, weights):
  logp = jax.nn.log_softmax(hidden @ head)
  return -jnp.sum(
    weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
  )


@pytest.mark.parametrize('block', [4, 13, 128])
def test_blocks_give_the_plain_value_and_gradients(block):
  args = _inputs()
  assert 0 < float(args[3].sum()) < args[3].size
  want, want_grads = jax.value_and_grad(_plain, (0, 1))(*args)
  got, grads = jax.value_and_grad(
    lambda *a: cross_entropy(*a, block=block), (0, 1)
  )(*args)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  chex.assert_trees_all_close(grads, want_grads, rtol=1e-5, atol=1e-6)


def test_bfloat16_hidden_still_gives_float32_loss_and_head_gradient():
  hidden, head, targets, weights = _inputs()
  low = hidden.astype(jnp.bfloat16)
  total, grad = jax.value_and_grad(cross_entropy, 1)(
    low, head, targets, weights
  )
  assert total.dtype == grad.dtype == jnp.float32
  want = _plain(
    low.astype(jnp.float32),
    head.astype(jnp.bfloat16).astype(jnp.float32),
    targets,
    weights,
  )
  np.testing.assert_allclose(total, want, rtol=1e-5)


def test_memory_does_not_hold_the_logits_of_the_batch():
  B, T, D, Z = 2, 512, 8, 512
  shapes = (
    jax.ShapeDtypeStruct((B, T, D), jnp.float32),
    jax.ShapeDtypeStruct((D, Z), jnp.float32),
    jax.ShapeDtypeStruct((B, T), jnp.int32),
    jax.ShapeDtypeStruct((B, T), jnp.float32),
  )

  def temporary(loss):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * B * T * Z
  assert temporary(_plain) > logits
  assert temporary(lambda *a: cross_entropy(*a, block=32)) < logits / 4


def test_a_sharded_batch_gives_the_same_loss():
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip('needs 8 devices; the test settings simulate them')
  args = _inputs(B=8)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())
  sharded = [
    jax.device_put(x, s)
    for x, s in zip(args, (rows, whole, rows, rows), strict=True)
  ]
  total = jax.jit(lambda *a: cross_entropy(*a, block=4))(*sharded)
  np.testing.assert_allclose(
    total.block_until_ready(), _plain(*args), rtol=1e-6
  )
