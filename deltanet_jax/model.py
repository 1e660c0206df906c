"""A language model of any pattern of mixers: prefix, scanned period, suffix."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deltanet_jax.config.experiment import Layer, ModelConfig, MoEConfig
from deltanet_jax.layers.mlp import MLP
from deltanet_jax.layers.moe import MoE
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.layers.proj import Proj, named, scaled_normal
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops.routing import Load
from deltanet_jax.parallel.sharding import constrain, in_use

EMBED_STD = 0.02

POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class ModelCache(NamedTuple):
  """Every layer's cache; those of `period` are stacked over the repeats."""

  length: jax.Array  # int32 scalar, tokens so far
  prefix: tuple
  period: tuple
  suffix: tuple


class LayerReport(NamedTuple):
  """What a layer tells in training beside its output."""

  mixer: Any  # None, or what the mixer's module says it returns
  load: Load | None  # of the experts; None without them


class Reports(NamedTuple):
  """Every layer's LayerReport; those of `period` stacked over the repeats."""

  prefix: tuple
  period: tuple
  suffix: tuple


def init_cache(cfg, batch, max_len, dtype):
  """A fresh cache for `max_len` tokens, prompt included. A value: its shapes
  under `jax.eval_shape` are the memory that decoding takes."""
  fresh = lambda layers: tuple(
    layer.mixer.init_cache(batch, max_len, dtype) for layer in layers
  )
  stack = lambda x: jnp.broadcast_to(x, (cfg.repeats, *x.shape))
  return ModelCache(
    jnp.int32(0),
    fresh(cfg.prefix),
    jax.tree.map(stack, fresh(cfg.period)) if cfg.repeats else (),
    fresh(cfg.suffix),
  )


class Block(nn.Module):
  """The mixer, then the ffn, each joined to x as `layer.residual` says.

  Returns (x, the layer's next cache), or in training (x, its LayerReport).
  """

  cfg: ModelConfig
  layer: Layer
  dtype: Any

  @nn.compact
  def __call__(self, x, ctx, cache):
    c, ffn = self.cfg, self.layer.ffn
    # 2 branches a layer add up in the residual: keep their sum's size
    out_scale = (2 * len(c.layers)) ** -0.5
    mixer = self.layer.mixer.make(
      d_model=c.d_model,
      dtype=self.dtype,
      zero_centred=c.zero_centred,
      out_scale=out_scale,
      name='mixer',
    )
    x, out = self._join(x, lambda h: mixer(h, ctx, cache), 'mixer_norm')
    if isinstance(ffn, MoEConfig):
      branch = MoE(ffn, self.dtype, out_scale, name='ffn')
    else:
      mlp = MLP(ffn.hidden, self.dtype, out_scale, name='ffn')
      branch = lambda h: (mlp(h), None)
    x, load = self._join(x, branch, 'ffn_norm')
    return x, LayerReport(out, load) if cache is None else out

  def _join(self, x, branch, name):
    """(x joined with what `branch` makes, the other thing it returns)."""
    c, r = self.cfg, self.layer.residual
    norm = RMSNorm(c.norm_eps, c.zero_centred, name=name)
    if r.form == 'post':
      y, out = branch(x)
      x = x + norm(y)
    else:
      h = norm(x)
      y, out = branch(h)
      x = x + y if r.form == 'pre' else r.alpha * h + r.beta * y
    return constrain(x, 'batch', 'time', 'act_embed'), out


class Stack(nn.Module):
  """`layers` in order; depth [len(layers)], caches one for each or (). Returns
  x and what each block returns beside it."""

  cfg: ModelConfig
  layers: tuple[Layer, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x, depth_and_caches, positions, segment_ids):
    depth, caches = depth_and_caches
    block, new = Block, []
    if self.cfg.remat != 'none':
      block = nn.remat(Block, policy=POLICIES[self.cfg.remat])
    for i, layer in enumerate(self.layers):
      ctx = Context(positions, segment_ids, depth[i])
      x, out = block(self.cfg, layer, self.dtype, name=f'layer_{i}')(
        x, ctx, caches[i] if caches else None
      )
      new.append(out)
    return x, tuple(new)


def _repeat(stack, carry, depth, positions, segment_ids):
  """One of the period's repeats: carry (x, its index, all repeats' caches)."""
  x, i, caches = carry
  # carried and written in place: scanned over, they would be there twice
  own = jax.tree.map(lambda x: x[i], caches)
  x, out = stack(x, (depth, own), positions, segment_ids)
  if not caches:
    return (x, i + 1, caches), out
  caches = jax.tree.map(lambda x, y: x.at[i].set(y), caches, out)
  return (x, i + 1, caches), ()


class Backbone(nn.Module):
  """tokens [B,T] -> (normed hidden [B,T,D] in dtype, the next cache), or in
  training (hidden, Reports)."""

  cfg: ModelConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, positions=None, segment_ids=None, cache=None):
    c = self.cfg
    if cache is not None and segment_ids is not None:
      raise ValueError(
        'segment_ids with a cache; a cache holds one document per row, give'
        ' one of them'
      )
    if positions is None:
      positions = _positions(tokens, segment_ids, cache)
    table = self.param(
      'embed',
      named(scaled_normal(EMBED_STD), ('vocab', 'embed')),
      (c.vocab, c.d_model),
      jnp.float32,
    )
    x = lookup(table.astype(self.dtype), tokens)

    depth = jnp.arange(len(c.layers)) / max(1, len(c.layers) - 1)
    first, last = len(c.prefix), len(c.layers) - len(c.suffix)
    old = ModelCache(None, (), (), ()) if cache is None else cache

    def stack(name, layers, depth, x, caches):
      if not layers:
        return x, ()
      return Stack(c, layers, self.dtype, name=name)(
        x, (depth, caches), positions, segment_ids
      )

    x, prefix = stack('prefix', c.prefix, depth[:first], x, old.prefix)
    period = ()
    if c.period and c.repeats:
      scan = nn.scan(
        _repeat,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=c.repeats,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      (x, _, kept), period = scan(
        Stack(c, c.period, self.dtype, name='period'),
        (x, jnp.int32(0), old.period),
        depth[first:last].reshape(c.repeats, len(c.period)),
        positions,
        segment_ids,
      )
      period = period if cache is None else kept
    x, suffix = stack('suffix', c.suffix, depth[last:], x, old.suffix)
    x = RMSNorm(c.norm_eps, c.zero_centred, name='norm')(x)
    if cache is None:
      return x, Reports(prefix, period, suffix)
    length = cache.length + tokens.shape[1]
    return x, ModelCache(length, prefix, period, suffix)


class MTP(nn.Module):
  """Multi-token prediction (arXiv:2412.19437 sec. 2.2): one token further.

    h'_t = N(block([N_e(e_{t+1}) | N_h(h_t)] W))

  h [B,T,D] is Backbone's hidden, e [B,T,D] the embeddings of the tokens after
  (`embed`), the block is `cfg.mtp`. h' [B,T,D], through the model's own head,
  predicts token t + 2. Second result and cache as in Backbone, the cache that
  of `cfg.mtp.mixer`; positions [B,T] are those of h.
  """

  cfg: ModelConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, hidden, embedded, positions, segment_ids=None, cache=None):
    c = self.cfg
    norm = lambda name: RMSNorm(c.norm_eps, c.zero_centred, name=name)
    both = norm('embed_norm')(embedded), norm('hidden_norm')(hidden)
    x = Proj(
      (2 * c.d_model, c.d_model),
      ('mlp', 'embed'),
      'BTF,FD->BTD',
      self.dtype,
      name='proj',
    )(jnp.concatenate(both, axis=-1))
    ctx = Context(positions, segment_ids, jnp.float32(1))
    x, out = Block(c, c.mtp, self.dtype, name='layer')(x, ctx, cache)
    return norm('norm')(x), out


def _positions(tokens, segment_ids, cache):
  """Counted from each segment's first token, or on from the cache's length."""
  index = jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )
  if cache is not None:
    return index + cache.length
  if segment_ids is None:
    return index
  first = jnp.pad(
    segment_ids[:, 1:] != segment_ids[:, :-1],
    ((0, 0), (1, 0)),
    constant_values=True,
  )
  return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def lookup(table, tokens):
  """The embeddings [B,T,D] of tokens."""
  # gathered over fsdp before the lookup: from a table split both ways XLA
  # would copy the whole of it
  table = in_use(table, ('vocab', 'embed'))
  return constrain(table[tokens], 'batch', 'time', 'act_embed')


def embed(params, tokens, dtype=jnp.float32):
  """The embeddings [B,T,D] of tokens, from HybridLM's parameters."""
  return lookup(params['backbone']['embed'].astype(dtype), tokens)


def head_weight(params, cfg):
  """The output head [D,Z], from HybridLM's parameters."""
  if cfg.tied:
    return in_use(params['backbone']['embed'], ('vocab', 'embed')).T
  return in_use(params['head']['w'], ('embed', 'vocab'))


class HybridLM(nn.Module):
  """Next-token logits, float32.

    logits, cache = model.apply({'params': params}, tokens, positions=None,
                                segment_ids=None, cache=None)

  tokens, positions, segment_ids [B,T] int32, logits [B,T,Z]. Without a cache:
  training; positions count from each segment's start unless given, and the
  layers' Reports take the place of the next cache. With one
  (`init_cache`), the tokens continue what it holds: a prompt is a call with a
  fresh cache, decoding a call with one token. Weights are float32, products
  take `dtype`. A cache with segment_ids is a ValueError.
  """

  cfg: ModelConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, positions=None, segment_ids=None, cache=None):
    c = self.cfg
    backbone = Backbone(c, self.dtype, name='backbone')
    hidden, out = backbone(tokens, positions, segment_ids, cache)
    if c.mtp is not None and self.is_initializing():
      # no logits depend on it; its callers apply MTP to params['mtp']
      MTP(c, self.dtype, name='mtp')(
        hidden, hidden, _positions(tokens, segment_ids, cache)
      )
    if c.tied:
      table = nn.unbox(backbone.variables['params'])['embed']
      logits = jnp.einsum(
        'BTD,ZD->BTZ',
        hidden,
        in_use(table.astype(self.dtype), ('vocab', 'embed')),
        preferred_element_type=jnp.float32,
      )
    else:
      logits = Proj(
        (c.d_model, c.vocab),
        ('embed', 'vocab'),
        'BTD,DZ->BTZ',
        self.dtype,
        jnp.float32,
        name='head',
      )(hidden)
    return logits, out
