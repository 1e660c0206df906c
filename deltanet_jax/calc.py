"""Sizes of a model, from shapes alone: nothing is computed or allocated."""

import collections
import dataclasses
import math

import jax

from deltanet_jax import model, sharding
from deltanet_jax.mixers.config import AttentionConfig, MLAConfig

# mixers that keep something of every token
ATTENTION = AttentionConfig, MLAConfig


def _total(tree, of):
  return sum(of(x) for x in jax.tree.leaves(tree))


def parameters(cfg):
  """The number of parameters of a ModelConfig."""
  params = sharding.abstract_params(model.HybridLM(cfg))
  return _total(params, lambda x: math.prod(x.shape))


def cache_bytes(cfg, context, batch, dtype):
  """Bytes of the decoding cache for `context` tokens, by mixer: for example
  {'GatedDeltaNet': 147456, 'Attention': 4194304}."""
  sizes = collections.Counter()
  for layer in cfg.layers:
    fresh = lambda mixer=layer.mixer: mixer.init_cache(batch, context, dtype)
    name = layer.mixer.module.split(':')[1]
    sizes[name] += _total(
      jax.eval_shape(fresh), lambda x: math.prod(x.shape) * x.dtype.itemsize
    )
  return dict(sizes)


def all_attention_twin(cfg):
  """The same model with every recurrent mixer replaced by its first attention.

  Raises a ValueError for a model without attention.
  """
  attention = [
    layer.mixer for layer in cfg.layers if isinstance(layer.mixer, ATTENTION)
  ]
  if not attention:
    raise ValueError(
      'the model has no attention layer, so its all-attention twin is not'
      ' defined; add one or compare with a model that has'
    )

  def swap(layers):
    return tuple(
      layer
      if isinstance(layer.mixer, ATTENTION)
      else dataclasses.replace(layer, mixer=attention[0])
      for layer in layers
    )

  return dataclasses.replace(
    cfg,
    prefix=swap(cfg.prefix),
    period=swap(cfg.period),
    suffix=swap(cfg.suffix),
  )
