"""Choosing the next token: pure functions of logits and a key."""

import jax
import jax.numpy as jnp


def keep_likely(logits, top_k, top_p):
  """logits [..., Z] with -inf for what top_k and then top_p leave out."""
  Z = logits.shape[-1]
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, -1)
  rank = jnp.arange(Z)
  ranked = jnp.where(rank < (top_k or Z), ranked, -jnp.inf)
  p = jax.nn.softmax(ranked, -1)
  # a token stays while those before it do not reach top_p: the first always
  before = jnp.cumsum(p, -1) - p
  ranked = jnp.where((before < top_p) | (top_p == 1), ranked, -jnp.inf)
  return jnp.take_along_axis(ranked, jnp.argsort(order, -1), -1)


def sample(logits, key, sampling):
  """Token ids [...] int32 drawn from logits [..., Z]."""
  logits = logits.astype(jnp.float32)
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k or sampling.top_p < 1:
    logits = keep_likely(logits, sampling.top_k, sampling.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)
