"""Choosing the next token: pure functions of logits and a key."""

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config.sampling import SEEDS, Sampling

# smaller numbers are 0 on some devices
LEAST = float(np.finfo(np.float32).tiny)
MOST = float(np.finfo(np.float32).max)


def make_key(seed: int) -> jax.Array:
  """The key of a seed.

  Raises:
    ValueError: the seed is not in SEEDS (32 bits).
  """
  if seed not in SEEDS:
    raise ValueError(f'seed is {seed}; give {SEEDS[0]} to {SEEDS[-1]}')
  return jax.random.key(seed)


def keep_likely(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """logits [...,Z] with -inf where top_k and then top_p exclude a token."""
  Z = logits.shape[-1]
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, -1)
  rank = jnp.arange(Z)
  ranked = jnp.where(rank < min(top_k or Z, Z), ranked, -jnp.inf)
  p = jax.nn.softmax(ranked, -1)
  # a token stays while the ones before it sum to less than top_p
  before = jnp.cumsum(p, -1) - p
  likely = (before < top_p) | (rank == 0) | (top_p == 1)
  ranked = jnp.where(likely, ranked, -jnp.inf)
  return jnp.take_along_axis(ranked, jnp.argsort(order, -1), -1)


def sample_tokens(
  logits: jax.Array, key: jax.Array, sampling: Sampling
) -> jax.Array:
  """Token ids [...] int32 drawn from logits [..., Z]."""
  logits = logits.astype(jnp.float32)
  if sampling.temperature < LEAST:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  # shifted to 0 at most: a quotient beyond float32 becomes -inf
  logits = logits - jnp.max(logits, -1, keepdims=True)
  logits = logits / np.float32(min(sampling.temperature, MOST))
  if sampling.top_k or sampling.top_p < 1:
    logits = keep_likely(logits, sampling.top_k, sampling.top_p)
  return jax.random.categorical(key, logits).astype(jnp.int32)
