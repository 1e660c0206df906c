"""What the token mixers share: their inputs, the recurrent cache, the call of
a rule."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deltanet_jax import kernels
from deltanet_jax.config.mixers import MixerConfig
from deltanet_jax.layers import conv
from deltanet_jax.parallel import sequence

# the position of a slot not yet written: later than any query, so never seen
UNWRITTEN = 2**30


class Context(NamedTuple):
  """What a mixer knows of its tokens besides their vectors.

  positions [B,T] int32 restart in every document; segment_ids [B,T] int32, or
  None for one document a row: a document is a run of equal ids, so one that
  comes back starts another; depth, a float scalar: layer index / (layers - 1),
  0 for one layer.
  """

  positions: jax.Array
  segment_ids: jax.Array | None
  depth: jax.Array


class RecurrentCache(NamedTuple):
  """A recurrent mixer's memory; its size does not depend on the context."""

  state: jax.Array  # [B,H,K,V] float32
  q: jax.Array | None  # [B,W-1,J,K], the convolutions' last inputs
  k: jax.Array | None  # [B,W-1,J,K]
  v: jax.Array | None  # [B,W-1,H,V]


class Mixer(nn.Module):
  """module(x [B,T,D], ctx, cache=None) -> (y [B,T,D], cache).

  Without a cache: training; the second result is None or what the module
  reports. With one: the tokens continue what it holds; a
  single token takes the rule's step. A cache with segment_ids is a ValueError.
  """

  cfg: MixerConfig
  d_model: int
  dtype: Any = jnp.float32
  zero_centred: bool = False
  out_scale: float = 1.0  # of the output projection's standard deviation


def check(ctx, cache):
  if cache is not None and ctx.segment_ids is not None:
    raise ValueError(
      'segment_ids with a cache; a cache holds one document per row, give one'
      ' of them'
    )


def append(cache, now, **new):
  """`cache` with tokens written at its length.

  cache: a NamedTuple with positions [S] and length besides the fields of
  `new` [B,S,...]; now [T]: the tokens' positions; new: their values, cast to
  the cache's types. At most max_len tokens in all; what goes beyond is lost.
  """
  if now.size > cache.positions.size:
    raise ValueError(
      f'{now.size} tokens for a cache of max_len {cache.positions.size};'
      ' make a longer cache'
    )
  write = lambda name, x, axis: jax.lax.dynamic_update_slice_in_dim(
    getattr(cache, name),
    x.astype(getattr(cache, name).dtype),
    cache.length,
    axis,
  )
  return cache._replace(
    positions=write('positions', now, 0),
    length=cache.length + now.size,
    **{name: write(name, x, 1) for name, x in new.items()},
  )


def init_recurrent(cfg, batch, dtype, key_shape, value_shape, state_shape):
  """key_shape (J,K), value_shape (H,V), state_shape (H,K,V)."""
  past = lambda shape: (
    conv.init_state(batch, cfg.conv, shape, dtype) if cfg.conv else None
  )
  return RecurrentCache(
    jnp.zeros((batch, *state_shape), jnp.float32),
    past(key_shape),
    past(key_shape),
    past(value_shape),
  )


def convolve(cfg, q, k, v, ctx, cache):
  """The short convolutions of q, k and v, or none; called in a module."""
  past = (None,) * 3 if cache is None else cache[1:]
  if not cfg.conv:
    return (q, k, v), past
  axes = ('kv_heads', 'head_k'), ('kv_heads', 'head_k'), ('heads', 'head_v')
  pairs = [
    conv.ShortConv(cfg.conv, axes, name=f'{name}_conv')(
      x, state, ctx.segment_ids
    )
    for name, x, axes, state in zip('qkv', (q, k, v), axes, past, strict=True)
  ]
  return tuple(zip(*pairs, strict=True))


def run_rule(rule, cfg, inputs, ctx, cache, **gates):
  """Runs `rule`'s form, or its step for one token with a cache.

  inputs: the rule's arguments [B,T,...] or None in its order; `gates` by name
  for the forms, after the inputs for the step. Returns (o, state), state None
  in training with time split over devices.
  """
  check(ctx, cache)
  if cache is not None and inputs[0].shape[1] == 1:
    token = [None if x is None else x[:, 0] for x in (*inputs, *gates.values())]
    o, state = rule.step(*token, cache.state)
    return o[:, None], state
  chunk = {} if cfg.form == 'recurrent' else {'chunk': cfg.chunk}
  form = functools.partial(kernels.forms(rule)[cfg.form], **chunk)
  if cache is None and sequence.split(inputs[0].shape[1]):
    return sequence.run(rule, form, inputs, ctx.segment_ids, gates), None
  return form(
    *inputs,
    state=None if cache is None else cache.state,
    segment_ids=ctx.segment_ids,
    **gates,
  )


def log_uniform_dt(key, shape, dtype=jnp.float32):
  """x with softplus(x) log-uniform in [1e-3, 1e-1], as Mamba's dt bias."""
  low, high = jnp.log(1e-3), jnp.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return dt + jnp.log(-jnp.expm1(-dt))


def log_uniform_decay(low):
  """log A with A uniform in [low, 16]."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, 16.0))

  return init
