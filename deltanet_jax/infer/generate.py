"""Sampling of tokens: prefill, then decoding from the cache."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.infer import cache_growth
from deltanet_jax.infer.sampling import sample_tokens
from deltanet_jax.model import (
  Backbone,
  ModelCache,
  compute_logits,
  get_head_weight,
  init_cache,
)
from deltanet_jax.parallel.sharding import Params

Advance = Callable[
  [Params, ModelCache, jax.Array, jax.Array], tuple[jax.Array, ModelCache]
]


def generate(
  params: Params,
  cfg: ModelConfig,
  prompt: Sequence[int],
  *,
  max_tokens: int,
  sampling: Sampling,
  key: jax.Array,
  dtype: np.dtype | type,
  vocab: int,
) -> Iterator[int]:
  """Yields up to `max_tokens` token ids, each as soon as it is sampled.

  prompt: ids, at least one   cfg: ModelConfig   dtype: of the computation
  vocab: number of ids that have a token; models may round theirs up

  Compiles a program for a piece of the prompt, one for the rest, and one for a
  token at every size of the cache, which doubles as the text grows
  (`cache_growth`). Token i is sampled with `jax.random.fold_in(key, i)`.
  """
  if not len(prompt):
    raise ValueError('the prompt has no token; give at least one')
  sampling.check()
  advance = make_advance(cfg, dtype, sampling, vocab)
  most = len(prompt) + max_tokens
  slots = cache_growth.count_slots(len(prompt), most)
  cache = init_cache(cfg, 1, slots, dtype)
  tokens = jnp.asarray(prompt, jnp.int32)[None]
  for i in range(max_tokens):
    length = len(prompt) + i
    if length > slots:
      slots = cache_growth.count_slots(length, most)
      cache = cache_growth.grow_cache(cache, cfg, 1, slots, dtype)
    for piece in cache_growth.split_prompt(tokens):
      token, cache = advance(params, cache, piece, jax.random.fold_in(key, i))
    yield int(token[0])
    tokens = token[:, None]


@functools.cache
def make_advance(
  cfg: ModelConfig, dtype: np.dtype | type, sampling: Sampling, vocab: int
) -> Advance:
  """(params, cache (donated), tokens [B,T], key) -> next token [B], cache."""
  backbone = Backbone(cfg, dtype)

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(params, cache, tokens, key):
    hidden, cache, _ = backbone.apply(
      {'params': params['backbone']}, tokens, cache=cache
    )
    head = get_head_weight(params, cfg)[:, :vocab]
    logits = compute_logits(hidden[:, -1], head)
    return sample_tokens(logits, key, sampling), cache

  return advance
