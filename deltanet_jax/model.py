"""The language model: layers with any mixers, as prefix, scanned period and
suffix."""

import functools
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
from deltanet_jax.ops.compiler import write_slot
from deltanet_jax.ops.routing import Load
from deltanet_jax.parallel.sharding import Params, constrain, gather_weight

EMBED_STD = 0.02

POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


Cache = tuple[jax.Array | None, ...] | None  # a mixer's, of its own class
Branch = Callable[[jax.Array], tuple[jax.Array, Load | None]]


class ModelCache(NamedTuple):
  """Every layer's cache; those of `period` are stacked over the repeats."""

  length: jax.Array  # [B] int32, tokens so far
  prefix: tuple[Cache, ...]
  period: tuple[Cache, ...]
  suffix: tuple[Cache, ...]


class LayerReport(NamedTuple):
  """What auxiliary losses need of a layer."""

  mixer: jax.Array | None  # the report of the mixer's Aux
  load: Load | None  # of the experts; None without them


class Reports(NamedTuple):
  """Every layer's LayerReport; those of `period` stacked over the repeats."""

  prefix: tuple[LayerReport, ...]
  period: tuple[LayerReport, ...]
  suffix: tuple[LayerReport, ...]


def init_cache(
  cfg: ModelConfig, batch: int, max_len: int, dtype: DTypeLike
) -> ModelCache:
  """An empty cache for `max_len` tokens, prompt included. `jax.eval_shape` of
  it gives the memory that decoding takes."""
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
  """A layer: the mixer, then the ffn, each added to x as in `layer.residual`.

  Returns x [B,T,D], the layer's next cache (None for None) and its LayerReport.
  """

  cfg: ModelConfig
  layer: Layer
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, cache: Cache
  ) -> tuple[jax.Array, Cache, LayerReport]:
    c, ffn = self.cfg, self.layer.ffn
    # the residual stream sums 2 branches per layer: keep its variance
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
    """Adds branch(norm(x)) to x, by `layer.residual`; returns x and the second
    result of `branch`."""
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
  """`layers` in order; depth [len(layers)], a cache for each layer. Returns x,
  the next caches and the LayerReports."""

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
  """Repeat i of the period, a body of nn.scan; carry: x, i, the caches of all
  repeats."""
  x, i, caches = carry
  # caches are carried and updated in place: as scanned inputs and outputs they
  # would take their memory twice
  own = jax.tree.map(lambda x: x[i], caches)
  alone = x.shape[1] == 1
  x, new, reports = stack(x, depth, own, ctx)
  caches = tuple(
    _put_back(i, alone, *layer) for layer in zip(caches, own, new, strict=True)
  )
  return (x, i + 1, caches), reports


def _put_back(i, alone, whole, old, new):
  """The caches `whole` of all repeats of a layer with `new` for `old`, that of
  repeat i. A token that is alone fills one slot, and only that is written."""
  kinds = whole.describe_parts() if hasattr(whole, 'length') and alone else {}

  def put(name, x, y):
    if kinds.get(name) == 'tokens' or kinds and name == 'positions':
      return write_slot(x, i, y, old.length % y.shape[1])
    return x.at[i].set(y)

  if not kinds:
    return jax.tree.map(functools.partial(put, None), whole, new)
  fields = whole._asdict()
  return whole._replace(
    **{name: put(name, x, getattr(new, name)) for name, x in fields.items()}
  )


class Backbone(nn.Module):
  """tokens [B,T] -> normalized hidden [B,T,D] in dtype, the next cache (None
  for None), Reports. Arguments as in `HybridLM`."""

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
  """Multi-token prediction (arXiv:2412.19437 sec. 2.2) of one more token.

    y_t = N(block([N_e(e_{t+1}) | N_h(h_t)] W))

  hidden [B,T,D]: h, the Backbone's output   embedded [B,T,D]: e_{t+1}, the
  embeddings of the following tokens (`embed`)   positions [B,T]: those of h
  The block is `cfg.mtp`. y [B,T,D] predicts token t + 2 through the model's
  head. Returns y, the next cache of `cfg.mtp.mixer` and the LayerReport.
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
  # gathered over fsdp before the lookup: of a table split along both axes XLA
  # would make a full copy
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

  tokens, positions, segment_ids [B,T] int32   logits [B,T,Z]
  positions: None: counted from each segment's first token, or on from the cache
  cache: None in training, and None is returned. With one (`init_cache`) each
    row's tokens continue the row's cache: a prompt is a call with an empty
    cache, decoding is calls with one token
  lengths [B]: the tokens of each row; the rest is padding, which changes no
    cache, and whose logits are undefined
  mode: as in `mixers.base.Context`

  Weights are float32, operands of products have `dtype`. ValueError for a cache
  together with segment_ids.
  """

  cfg: ModelConfig
  dtype: DTypeLike = jnp.float32

  @nn.nowrap
  def init_cache(self, batch: int, max_len: int) -> ModelCache:
    """An empty cache in `dtype` for `max_len` tokens, prompt included. Tokens
    beyond are lost, and the logits after them are wrong."""
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
      # creates its parameters: the objective applies MTP to params['mtp']
      MTP(c, self.dtype, name='mtp')(
        hidden, hidden, count_positions(tokens.shape, segment_ids, None)
      )
    if not c.tied:
      Head(c, name='head')()
    head = get_head_weight(nn.unbox(self.variables['params']), c)
    return compute_logits(hidden, head), new
