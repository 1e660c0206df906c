"""Parameters, cache bytes and FLOP of a model, from shapes alone: nothing is
computed or allocated."""

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

# any dtype: shapes and products do not depend on it
_DTYPE = jnp.bfloat16

LONGEST = 2**40  # tokens; beyond any context


def count_parameters(cfg):
  """The number of parameters of a ModelConfig."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(_params(cfg)))


def count_active_parameters(cfg):
  """Parameters active per token: all but the experts not chosen.

  Embedding table and output head count fully, as in model cards.
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
  """`count_cache_bytes` by part: 'tokens' (keys and values, latents) and
  'convolution' (its last inputs) in dtype; 'state' in state_dtype (float32 in
  the model); 'positions', int32."""
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
  """The part of each cache array of a mixer, as in `count_cache_parts`."""
  cache = jax.eval_shape(lambda: mixer.init_cache(1, 1, _DTYPE))
  # a part may be None: the inputs of an absent convolution
  arrays = zip(cache._fields, cache, strict=True)
  return tuple(
    cache.describe_parts()[name] for name, x in arrays if x is not None
  )


@functools.lru_cache(maxsize=4096)
def infer_cache_shapes(mixer, context, batch):
  """The shapes of the cache arrays of a mixer."""
  fresh = lambda: mixer.init_cache(batch, context, _DTYPE)
  return jax.tree.leaves(jax.eval_shape(fresh))


def count_total_bytes(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """Bytes of the caches of all layers."""
  sizes = count_cache_bytes(cfg, context, batch, dtype, state_dtype)
  return sum(sizes.values())


def find_break_even(cfg, batch, dtype, state_dtype=jnp.float32):
  """The fewest tokens at which the cache is smaller than that of the
  all-attention twin, or None.

  Raises:
    ValueError: the model has no attention.
  """
  twin = make_attention_twin(cfg)
  size = lambda which, n: count_total_bytes(which, n, batch, dtype, state_dtype)
  # the difference never falls: the cache of attention only grows
  smaller = lambda n: size(cfg, n) < size(twin, n)
  tokens = bisect.bisect_left(range(1, LONGEST), True, key=smaller) + 1
  return tokens if tokens < LONGEST else None


def compute_saving(cfg, context, batch, dtype, state_dtype=jnp.float32):
  """1 - cache bytes / those of the all-attention twin.

  context: tokens, or None for the limit of long contexts

  Raises:
    ValueError: the model has no attention.
  """
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
  """The model with its first attention in every layer.

  Raises:
    ValueError: the model has no attention.
  """
  return _twin(cfg, 'attention')


def make_recurrent_twin(cfg):
  """The model with its first recurrent mixer in every layer.

  Raises:
    ValueError: the model has no recurrent layer.
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
  """The first recurrent mixer, or else the first attention, of a model; or
  None."""
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
  """The model with another number of layers, ratio (recurrent, attention) or
  mixers.

  With layers or ratio, attention layers are spread evenly, the last layer being
  one; layer i keeps the ffn of the old layer i, or of the last.

  Raises:
    ValueError: the model has no mixer of a kind that is needed.
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
  """Attention layers of L at R recurrent to A: rounded half up, at least one
  unless A is 0."""
  return max(min(A, 1), (2 * L * A + R + A) // (2 * (R + A)))


def count_flops(cfg, context):
  """FLOP per token of the forward pass, the mean over a sequence of `context`
  tokens, as in training and prefill. A float.

  Counts the products of the model's program (`deltanet_jax.flops`): recurrences
  in the configured form, padded to whole chunks; attention over whole blocks of
  tokens with their masked pairs; the chosen experts; logits of every token. A
  training step takes three times as much (each product has two in the backward
  pass), without recomputation, which model FLOP utilization leaves out.
  """
  return _blocks_flops(cfg, context, decoding=False) / context + _head_flops(
    cfg
  )


def count_decoding_flops(cfg, context):
  """FLOP of decoding the last of `context` tokens, counted as in `count_flops`.
  An int."""
  return _blocks_flops(cfg, context, decoding=True) + _head_flops(cfg)


def _blocks_flops(cfg, context, decoding):
  """FLOP of all layers over the whole context, or of decoding one token."""
  # what the FLOP of a block depend on: twins share counts
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
  """The only layer of the model, and the shapes of its parameters."""
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
