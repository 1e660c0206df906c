"""A language model of any pattern of mixers: prefix, scanned period, suffix."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import Layer, ModelConfig, MoEConfig
from deltanet_jax.layers.mlp import MLP
from deltanet_jax.layers.moe import MoE
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.layers.proj import Proj, name_axes, scaled_normal
from deltanet_jax.mixers.base import Context, count_positions, count_tokens
from deltanet_jax.ops.routing import Load
from deltanet_jax.parallel.sharding import Params, constrain, gather_weight

EMBED_STD = 0.02

POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


Cache = tuple[jax.Array | None, ...] | None  # of a mixer, by its own class


Branch = Callable[[jax.Array], tuple[jax.Array, Load | None]]


class ModelCache(NamedTuple):
  """Every layer's cache; those of `period` are stacked over the repeats."""

  length: jax.Array  # [B] int32, tokens so far
  prefix: tuple[Cache, ...]
  period: tuple[Cache, ...]
  suffix: tuple[Cache, ...]


class LayerReport(NamedTuple):
  """What a layer tells beside its output and its cache."""

  mixer: jax.Array | None  # the mixer's report, or None
  load: Load | None  # of the experts; None without them


class Reports(NamedTuple):
  """Every layer's LayerReport; those of `period` stacked over the repeats."""

  prefix: tuple[LayerReport, ...]
  period: tuple[LayerReport, ...]
  suffix: tuple[LayerReport, ...]


def init_cache(
  cfg: ModelConfig, batch: int, max_len: int, dtype: DTypeLike
) -> ModelCache:
  """A fresh cache for `max_len` tokens, prompt included. A value: its shapes
  under `jax.eval_shape` are the memory that decoding takes."""
  fresh = lambda layers: tuple(
    layer.mixer.init_cache(batch, max_len, dtype) for layer in layers
  )
  stack = lambda x: jnp.broadcast_to(x, (cfg.repeats, *x.shape))
  return ModelCache(
    jnp.zeros((batch,), jnp.int32),
    fresh(cfg.prefix),
    jax.tree.map(stack, fresh(cfg.period)) if cfg.repeats else (),
    fresh(cfg.suffix),
  )


class Block(nn.Module):
  """The mixer, then the ffn, each joined to x as `layer.residual` says.

  Returns x, the layer's next cache (None after None) and its LayerReport.
  """

  cfg: ModelConfig
  layer: Layer
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, cache: Cache
  ) -> tuple[jax.Array, Cache, LayerReport]:
    c, ffn = self.cfg, self.layer.ffn
    # 2 branches a layer add up in the residual: keep their sum's size
    out_scale = (2 * len(c.layers)) ** -0.5
    mixer = self.layer.mixer.make(
      d_model=c.d_model,
      dtype=self.dtype,
      zero_centered=c.zero_centered,
      out_scale=out_scale,
      name='mixer',
    )
    x, aux = self._join(x, lambda h: mixer(h, ctx, cache), 'mixer_norm')
    if isinstance(ffn, MoEConfig):
      branch: Branch = MoE(ffn, self.dtype, out_scale, name='ffn')
    else:
      mlp = MLP(ffn.hidden, self.dtype, out_scale, name='ffn')
      branch = lambda h: (mlp(h), None)
    x, load = self._join(x, branch, 'ffn_norm')
    return x, aux.cache, LayerReport(aux.report, load)

  def _join(self, x, branch, name):
    """x joined with what `branch` makes, and what else it returns."""
    c, r = self.cfg, self.layer.residual
    norm = RMSNorm(c.norm_eps, c.zero_centered, name=name)
    if r.form == 'post':
      y, other = branch(x)
      x = x + norm(y)
    else:
      h = norm(x)
      y, other = branch(h)
      x = x + y if r.form == 'pre' else r.alpha * h + r.beta * y
    return constrain(x, 'batch', 'time', 'act_embed'), other


class Stack(nn.Module):
  """`layers` in order; depth [len(layers)], caches one for each. Returns x, the
  next caches and the LayerReports."""

  cfg: ModelConfig
  layers: tuple[Layer, ...]
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    depth: jax.Array,
    caches: tuple[Cache, ...],
    ctx: Context,
  ) -> tuple[jax.Array, tuple[Cache, ...], tuple[LayerReport, ...]]:
    block, new, reports = Block, [], []
    if self.cfg.remat != 'none':
      block = nn.remat(Block, policy=POLICIES[self.cfg.remat])
    for i, layer in enumerate(self.layers):
      x, cache, report = block(self.cfg, layer, self.dtype, name=f'layer_{i}')(
        x, ctx.replace(depth=depth[i]), caches[i]
      )
      new.append(cache)
      reports.append(report)
    return x, tuple(new), tuple(reports)


def _repeat(stack, carry, depth, ctx):
  """One of the period's repeats: carry (x, its index, all repeats' caches)."""
  x, i, caches = carry
  # carried and written in place: scanned over, they would be there twice
  own = jax.tree.map(lambda x: x[i], caches)
  x, new, reports = stack(x, depth, own, ctx)
  caches = jax.tree.map(lambda x, y: x.at[i].set(y), caches, new)
  return (x, i + 1, caches), reports


class Backbone(nn.Module):
  """tokens [B,T] -> normed hidden [B,T,D] in dtype, the next cache (None after
  None), Reports. Arguments as in `HybridLM`."""

  cfg: ModelConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: ModelCache | None = None,
    lengths: jax.Array | None = None,
    mode: str = 'causal',
  ) -> tuple[jax.Array, ModelCache | None, Reports]:
    c = self.cfg
    if positions is None:
      length = None if cache is None else cache.length
      positions = count_positions(tokens.shape, segment_ids, length)
    ctx = Context(positions, segment_ids, lengths=lengths, mode=mode)
    table = self.param(
      'embed',
      name_axes(scaled_normal(EMBED_STD), ('vocab', 'embed')),
      (c.vocab, c.d_model),
      jnp.float32,
    )
    x = lookup(table.astype(self.dtype), tokens)

    depth = jnp.arange(len(c.layers)) / max(1, len(c.layers) - 1)
    first, last = len(c.prefix), len(c.layers) - len(c.suffix)
    parts = c.prefix, c.period, c.suffix
    caches: Sequence[tuple[Cache, ...]] = (
      [(None,) * len(layers) for layers in parts]
      if cache is None
      else cache[1:]
    )

    def stack(name, layers, depth, x, caches):
      if not layers:
        return x, (), ()
      return Stack(c, layers, self.dtype, name=name)(x, depth, caches, ctx)

    x, prefix, first_reports = stack(
      'prefix', c.prefix, depth[:first], x, caches[0]
    )
    period, reports = (), ()
    if c.period and c.repeats:
      scan = nn.scan(
        _repeat,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast),
        length=c.repeats,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      (x, _, period), reports = scan(
        Stack(c, c.period, self.dtype, name='period'),
        (x, jnp.int32(0), caches[1]),
        depth[first:last].reshape(c.repeats, len(c.period)),
        ctx,
      )
    x, suffix, last_reports = stack(
      'suffix', c.suffix, depth[last:], x, caches[2]
    )
    x = RMSNorm(c.norm_eps, c.zero_centered, name='norm')(x)
    if cache is not None:
      length = cache.length + count_tokens(ctx, tokens.shape[1])
      cache = ModelCache(length, prefix, period, suffix)
    return x, cache, Reports(first_reports, reports, last_reports)


class MTP(nn.Module):
  """Multi-token prediction (arXiv:2412.19437 sec. 2.2): one token further.

    h'_t = N(block([N_e(e_{t+1}) | N_h(h_t)] W))

  h [B,T,D] is Backbone's hidden, e [B,T,D] the embeddings of the tokens after
  (`embed`), the block is `cfg.mtp`. h' [B,T,D], through the model's own head,
  predicts token t + 2. Returns h', the next cache, that of `cfg.mtp.mixer`, and
  the LayerReport; positions [B,T] are those of h.
  """

  cfg: ModelConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    hidden: jax.Array,
    embedded: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: Cache = None,
  ) -> tuple[jax.Array, Cache, LayerReport]:
    c = self.cfg
    norm = lambda name: RMSNorm(c.norm_eps, c.zero_centered, name=name)
    both = norm('embed_norm')(embedded), norm('hidden_norm')(hidden)
    x = Proj(
      (2 * c.d_model, c.d_model),
      ('mlp', 'embed'),
      'BTF,FD->BTD',
      self.dtype,
      name='proj',
    )(jnp.concatenate(both, axis=-1))
    ctx = Context(positions, segment_ids, jnp.float32(1))
    block = Block(c, c.mtp, self.dtype, name='layer')  # type: ignore[arg-type]
    x, cache, report = block(x, ctx, cache)
    return norm('norm')(x), cache, report


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """The embeddings [B,T,D] of tokens."""
  # gathered over fsdp before the lookup: from a table split both ways XLA
  # would copy the whole of it
  table = gather_weight(table, ('vocab', 'embed'))
  return constrain(table[tokens], 'batch', 'time', 'act_embed')


def embed(
  params: Params, tokens: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """The embeddings [B,T,D] of tokens, from HybridLM's parameters."""
  backbone: Any = params['backbone']
  return lookup(backbone['embed'].astype(dtype), tokens)


def get_head_weight(params: Params, cfg: ModelConfig) -> jax.Array:
  """The output head [D,Z], from HybridLM's parameters."""
  modules: Any = params
  if cfg.tied:
    return gather_weight(modules['backbone']['embed'], ('vocab', 'embed')).T
  return gather_weight(modules['head']['w'], ('embed', 'vocab'))


def compute_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Next-token logits [...,Z], float32, of hidden [...,D] and the output head
  [D,Z], which is cast to the type of `hidden`."""
  return jnp.einsum(
    '...D,DZ->...Z',
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


class Head(nn.Module):
  """The weight of an output head that is not the embedding table."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self) -> None:
    D, Z = self.cfg.d_model, self.cfg.vocab
    init = name_axes(scaled_normal(D**-0.5), ('embed', 'vocab'))
    self.param('w', init, (D, Z), jnp.float32)


class HybridLM(nn.Module):
  """Next-token logits, float32.

    logits, cache = model.apply({'params': params}, tokens, positions=None,
                                segment_ids=None, cache=None, lengths=None,
                                mode='causal')

  tokens, positions, segment_ids [B,T] int32, logits [B,T,Z]. Without a cache:
  training; positions count from each segment's start unless given, and None
  takes the place of the next cache. With one (`init_cache`), the tokens of
  each row continue what it holds: prompts are a call with a fresh cache,
  decoding a call with one token. Rows of a call may differ: the first `lengths`
  [B] of a row's tokens count, the rest is padding, which changes no cache and
  whose logits mean nothing. Weights are float32, products take `dtype`. mode:
  as in `mixers.base.Context`. A cache with segment_ids is a ValueError.
  """

  cfg: ModelConfig
  dtype: DTypeLike = jnp.float32

  @nn.nowrap
  def init_cache(self, batch: int, max_len: int) -> ModelCache:
    """A fresh cache in `dtype` for `max_len` tokens, prompt included."""
    return init_cache(self.cfg, batch, max_len, self.dtype)

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: ModelCache | None = None,
    lengths: jax.Array | None = None,
    mode: str = 'causal',
  ) -> tuple[jax.Array, ModelCache | None]:
    c = self.cfg
    backbone = Backbone(c, self.dtype, name='backbone')
    hidden, new, _ = backbone(
      tokens, positions, segment_ids, cache, lengths, mode
    )
    if c.mtp is not None and self.is_initializing():
      # no logits depend on it; its callers apply MTP to params['mtp']
      MTP(c, self.dtype, name='mtp')(
        hidden, hidden, count_positions(tokens.shape, segment_ids, None)
      )
    if not c.tied:
      Head(c, name='head')()
    head = get_head_weight(nn.unbox(self.variables['params']), c)
    return compute_logits(hidden, head), new
