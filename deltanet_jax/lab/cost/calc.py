"""Sizes and work of a model, from shapes alone: nothing is computed or
allocated, so a million tokens of a large model are answered at once."""

import bisect
import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from deltanet_jax import flops, model
from deltanet_jax.config import pattern
from deltanet_jax.config.experiment import MoEConfig
from deltanet_jax.config.mixers import ATTENTION
from deltanet_jax.mixers.base import Context
from deltanet_jax.parallel import sharding

# of caches and computation: neither shapes nor products depend on it
_DTYPE = jnp.bfloat16

LONGEST = 2**40  # tokens; beyond any context


def count_parameters(cfg):
  """The number of parameters of a ModelConfig."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(_params(cfg)))


def count_active_parameters(cfg):
  """Parameters that work on one token: all but the experts not chosen.

  Embedding table and output head are counted whole, as model cards do.
  """
  tree = _params(cfg)
  idle = sum(
    _idle(layer, tree['backbone'][section][f'layer_{i}'])
    for section in ('prefix', 'period', 'suffix')
    for i, layer in enumerate(getattr(cfg, section))
    if section in tree['backbone']
  )
  if cfg.mtp is not None:
    idle += _idle(cfg.mtp, tree['mtp']['layer'])
  return count_parameters(cfg) - idle


def _idle(layer, tree):
  if not isinstance(layer.ffn, MoEConfig):
    return 0
  experts = sum(
    math.prod(tree['ffn'][name].shape) for name in ('gate', 'up', 'down')
  )
  return experts - experts // layer.ffn.experts * layer.ffn.top


@functools.lru_cache(maxsize=8)
def _params(cfg):
  return sharding.make_abstract_params(model.HybridLM(cfg))


def name_kind(mixer):
  """'GatedDeltaNet' of a GatedDeltaNetConfig."""
  return mixer.module.split(':')[1]


def count_cache_bytes(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """Bytes of the decoding cache for `context` tokens, by mixer: for example
  {'GatedDeltaNet': 147456, 'Attention': 4194304}."""
  parts = count_cache_parts(cfg, context, batch, dtype, state_dtype)
  return {name: sum(sizes.values()) for name, sizes in parts.items()}


def count_cache_parts(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """`count_cache_bytes` with each mixer's bytes by what they hold: 'tokens'
  (keys and values, latents), 'convolution' (its last inputs), both in dtype;
  'state' in state_dtype (the model's own is float32); 'positions', int32."""
  widths = {'state': jnp.dtype(state_dtype).itemsize, 'positions': 4}
  sizes = collections.defaultdict(collections.Counter)
  for mixer, count in collections.Counter(x.mixer for x in cfg.layers).items():
    shapes = infer_cache_shapes(mixer, context, batch)
    for part, x in zip(list_cache_parts(mixer), shapes, strict=True):
      width = widths.get(part, jnp.dtype(dtype).itemsize)
      sizes[name_kind(mixer)][part] += count * width * math.prod(x.shape)
  return {name: dict(parts) for name, parts in sizes.items()}


@functools.lru_cache(maxsize=1024)
def list_cache_parts(mixer):
  """What each array of a mixer's cache holds, as in `count_cache_parts`."""
  cache = jax.eval_shape(lambda: mixer.init_cache(1, 1, _DTYPE))
  # a part may be none: the inputs of a convolution that is not there
  arrays = zip(cache._fields, cache, strict=True)
  return tuple(
    cache.describe_parts()[name] for name, x in arrays if x is not None
  )


@functools.lru_cache(maxsize=4096)
def infer_cache_shapes(mixer, context, batch):
  """The shapes of those arrays."""
  fresh = lambda: mixer.init_cache(batch, context, _DTYPE)
  return jax.tree.leaves(jax.eval_shape(fresh))


def count_total_bytes(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """Bytes of all layers' caches."""
  sizes = count_cache_bytes(cfg, context, batch, dtype, state_dtype)
  return sum(sizes.values())


def find_break_even(cfg, batch, dtype, state_dtype=jnp.float32):
  """The fewest tokens at which the cache is smaller than the all-attention
  twin's; None when it never is. A ValueError without attention."""
  twin = make_attention_twin(cfg)
  size = lambda which, n: count_total_bytes(which, n, batch, dtype, state_dtype)
  # the difference never falls: attention's cache only grows
  smaller = lambda n: size(cfg, n) < size(twin, n)
  tokens = bisect.bisect_left(range(1, LONGEST), True, key=smaller) + 1
  return tokens if tokens < LONGEST else None


def compute_saving(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """The part of the all-attention twin's cache that the model does without:
  0.75 where a quarter is left, below zero where it takes more. context None:
  the limit for long contexts. A ValueError without attention."""
  size = lambda which, n: count_total_bytes(which, n, batch, dtype, state_dtype)
  own, full = cfg, make_attention_twin(cfg)
  if context is not None:
    return 1 - size(own, context) / size(full, context)
  own, full = (
    size(x, LONGEST) - size(x, LONGEST // 2) or size(x, LONGEST)
    for x in (own, full)
  )
  return 1 - own / full


def make_attention_twin(cfg):
  """The same model with every recurrent mixer replaced by its first attention.

  Raises a ValueError for a model without attention.
  """
  return _twin(cfg, 'attention')


def make_recurrent_twin(cfg):
  """The same model with every attention replaced by its first recurrent mixer.

  Raises a ValueError for a model without recurrent layers.
  """
  return _twin(cfg, 'recurrent')


def _twin(cfg, kind):
  kept = kind == 'attention'
  mixer = find_mixer(cfg, recurrent=not kept)
  if mixer is None:
    raise ValueError(
      f'the model has no {kind} layer, so its all-{kind} twin is not defined;'
      ' add one or compare with a model that has'
    )
  return _with_mixers(cfg, lambda x: x if _attends(x) == kept else mixer)


def find_mixer(cfg, recurrent):
  """The model's first recurrent mixer, or its first attention; or None."""
  mixers = (layer.mixer for layer in cfg.layers)
  return next((x for x in mixers if _attends(x) != recurrent), None)


def _attends(mixer):
  return isinstance(mixer, ATTENTION)


def _with_mixers(cfg, swap):
  change = lambda layers: tuple(
    dataclasses.replace(layer, mixer=swap(layer.mixer)) for layer in layers
  )
  sections = 'prefix', 'period', 'suffix'
  return dataclasses.replace(
    cfg, **{s: change(getattr(cfg, s)) for s in sections}
  )


def resize_model(cfg, layers=None, ratio=None, attention=None, recurrent=None):
  """The model with other numbers: how many layers, how many recurrent ones to
  how many with attention (a pair), which mixers.

  With layers or ratio the pattern is laid out again, attention spread evenly
  and last; layer i has the ffn of the old layer i, or of the last one. A
  ValueError when the model has no mixer of a kind that is needed.
  """
  attention = attention or find_mixer(cfg, recurrent=False)
  recurrent = recurrent or find_mixer(cfg, recurrent=True)
  if layers is None and ratio is None:
    swap = lambda x: attention if _attends(x) else recurrent
    return _with_mixers(cfg, swap)
  old = cfg.layers
  attends = sum(_attends(layer.mixer) for layer in old)
  L, (R, A) = layers or len(old), ratio or (len(old) - attends, attends)
  N = count_attention_layers(L, R, A)
  for count, mixer, what in (
    (N, attention, 'attention'), (L - N, recurrent, 'recurrent')
  ):  # fmt: skip
    if count and mixer is None:
      raise ValueError(f'the model has no {what} layer; name its mixer')
  new = []
  for i in range(L):
    mixer = attention if (i + 1) * N // L > i * N // L else recurrent
    new.append(dataclasses.replace(old[min(i, len(old) - 1)], mixer=mixer))
  prefix, period, repeats, suffix = pattern.fold_layers(new)
  return dataclasses.replace(
    cfg, prefix=prefix, period=period, repeats=repeats, suffix=suffix
  )


def count_attention_layers(L, R, A):
  """How many of L layers attend at R recurrent ones to A: rounded, half up,
  and at least one unless A is 0."""
  return max(min(A, 1), (2 * L * A + R + A) // (2 * (R + A)))


def count_flops(cfg, context):
  """Operations of the forward pass for one of `context` tokens: a sequence's
  mean, as in training and prefill. A float.

  Counted are the products of the model's own program (`deltanet_jax.flops`):
  recurrences in the form that the configuration names, with its padding to
  whole chunks; attention over whole blocks of tokens (`ops.attention`), masked
  pairs in them too; of the experts those chosen; the output head at every
  token. A training step takes three times as much (each product has two in the
  backward pass), without what is made again there, scores and rematerialized
  layers, which model-FLOPs utilisation leaves out.
  """
  return _blocks_flops(cfg, context, decoding=False) / context + _head_flops(
    cfg
  )


def count_decoding_flops(cfg, context):
  """Operations of decoding one token as the last of `context`, from a cache
  of that many slots; counted as in `count_flops`. An int."""
  return _blocks_flops(cfg, context, decoding=True) + _head_flops(cfg)


def _blocks_flops(cfg, context, decoding):
  """Of all layers: over the whole context, or one token from its cache."""
  # what of the model a block's operations depend on: twins share counts
  alone = lambda layer: dataclasses.replace(
    cfg, prefix=(), period=(layer,), repeats=1, suffix=(), mtp=None
  )
  return sum(
    count * _block_flops(alone(layer), context, decoding)
    for layer, count in collections.Counter(cfg.layers).items()
  )


@functools.lru_cache(maxsize=512)
def _block_flops(cfg, context, decoding):
  block, params = _block(cfg)
  tokens, cache = context, None
  if decoding:
    fresh = lambda: cfg.period[0].mixer.init_cache(1, context, _DTYPE)
    tokens, cache = 1, jax.eval_shape(fresh)
  run = lambda params, inputs, cache: block.apply(params, *inputs, cache)
  return flops.count_operations(run, params, _inputs(cfg, tokens), cache)


@functools.lru_cache(maxsize=64)
def _block(cfg):
  """The only layer of the model, and its parameters' shapes."""
  block = model.Block(cfg, cfg.period[0], _DTYPE)
  inputs = _inputs(cfg, 1)
  return block, jax.eval_shape(block.init, jax.random.key(0), *inputs, None)


def _inputs(cfg, tokens):
  shape = jax.ShapeDtypeStruct
  return shape((1, tokens, cfg.d_model), _DTYPE), Context(
    shape((1, tokens), jnp.int32), None, shape((), jnp.float32)
  )


def _head_flops(cfg):
  weight = jax.eval_shape(lambda p: model.get_head_weight(p, cfg), _params(cfg))
  return 2 * math.prod(weight.shape)
