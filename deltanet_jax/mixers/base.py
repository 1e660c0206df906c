"""What the token mixers share: the base class, their inputs, the cache of a
recurrence and the call of its rule."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax import kernels
from deltanet_jax.config.mixers import MixerConfig
from deltanet_jax.layers import conv
from deltanet_jax.layers.proj import Init, Proj
from deltanet_jax.ops.attention import Place
from deltanet_jax.ops.compiler import write_slots
from deltanet_jax.ops.documents import Inputs, number_segments
from deltanet_jax.parallel import sequence, sharding

MODES = 'causal', 'bidirectional'

# `describe_parts` of a cache gives each field's kind: 'tokens' (token t in slot
# t, or t modulo the slots), 'positions' (and their number), 'state' and
# 'convolution' (of fixed size)
COUNTED = dict.fromkeys(('positions', 'length'), 'positions')

# position of an unwritten slot: after every query, so that none sees it
UNWRITTEN = 2**30


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['positions', 'segment_ids', 'depth', 'lengths'],
  meta_fields=['mode'],
)
@dataclasses.dataclass(frozen=True)
class Context:
  """What a mixer knows of its tokens besides their vectors.

  positions [B,T] int32: they restart in every document; None: counted
  segment_ids [B,T] int32: a document is a run of equal ids; None: a row is one
  depth: a float scalar, layer index / (layers - 1), 0 for one layer
  lengths [B] int32: the tokens of each row, the rest is padding; None: all T
  mode: a token sees those up to itself ('causal') or all ('bidirectional')
  """

  positions: jax.Array | None = None
  segment_ids: jax.Array | None = None
  depth: jax.Array | float = 0.0
  lengths: jax.Array | None = None
  mode: str = 'causal'

  def replace(self, **changes: jax.Array | float | str | None) -> 'Context':
    return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


WHOLE_ROWS = Context()


class TokenCache(Protocol):
  """A cache with slots for tokens: a NamedTuple that has these fields."""

  @property
  def positions(self) -> jax.Array: ...  # [B,S]
  @property
  def length(self) -> jax.Array: ...  # [B]
  def _replace(self, **fields: jax.Array) -> Self: ...


class RuleConfig(Protocol):
  """The fields that the configuration of a mixer with a rule must have."""

  @property
  def conv(self) -> int: ...
  @property
  def form(self) -> str: ...
  @property
  def chunk(self) -> int: ...


Slots = TypeVar('Slots', bound=TokenCache)
Triple = tuple[jax.Array, jax.Array, jax.Array]  # q, k, v
Past = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


class RecurrentCache(NamedTuple):
  """The cache of a recurrent mixer, of a size that no context changes."""

  state: jax.Array  # [B,H,K,V] float32
  q: jax.Array | None  # [B,W-1,J,K], the convolutions' last inputs
  k: jax.Array | None  # [B,W-1,J,K]
  v: jax.Array | None  # [B,W-1,H,V]

  @staticmethod
  def describe_parts() -> dict[str, str]:
    return {'state': 'state', **dict.fromkeys('qkv', 'convolution')}


class Aux(NamedTuple):
  """What a mixer returns besides its output."""

  cache: tuple[jax.Array | None, ...] | None = None  # the next; None for None
  report: jax.Array | None = None  # an auxiliary loss, as DSA's


class Mixer(nn.Module):
  """Base class: y [B,T,D], aux = module(x [B,T,D], ctx=WHOLE_ROWS, cache=None).

  ctx: by default each row is one document. Positions that it does not give
    count from each document's first token, or on from the cache
  cache: None in training. With one (`cfg.init_cache`) tokens continue their
    row's cache, a single token by the rule's `step`; padding does not change it
  aux: an `Aux` with the next cache, None without a cache

  Raises:
    ValueError: a cache with segment_ids, or a mode that the mixer lacks.
  """

  cfg: MixerConfig
  d_model: int
  dtype: DTypeLike = jnp.float32
  zero_centered: bool = False
  out_scale: float = 1.0  # factor of the output projection's initial values

  def project(
    self,
    x: jax.Array,
    name: str,
    sizes: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    source: str = 'embed',
    dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
  ) -> jax.Array:
    """[B,T,*sizes]: x [B,T,D] times the weight `name` [D,*sizes], a `Proj`.

    source: the logical axis of D   axes: those of `sizes`
    dtype: of the product, None: the mixer's   out_dtype: of y, None: `dtype`
    """
    if source == 'embed' and (x.ndim != 3 or x.shape[-1] != self.d_model):
      raise ValueError(
        f'x has shape {x.shape}; give [B,T,D] with D = {self.d_model}, the'
        ' d_model of this mixer'
      )
    to = 'HK'[: len(sizes)]
    return Proj(
      (x.shape[-1], *sizes),
      (source, *axes),
      f'BTD,D{to}->BT{to}',
      self.dtype if dtype is None else dtype,
      out_dtype,
      name=name,
    )(x)

  def project_keys(
    self, x: jax.Array, name: str, heads: int, width: int
  ) -> jax.Array:
    """[B,T,J,K]: queries or keys, with key heads."""
    return self.project(x, name, (heads, width), ('kv_heads', 'head_k'))

  def project_values(
    self, x: jax.Array, name: str, heads: int, width: int
  ) -> jax.Array:
    """[B,T,H,V]: values, or a gate for each of their channels."""
    return self.project(x, name, (heads, width), ('heads', 'head_v'))

  def project_gate(self, x: jax.Array, name: str, heads: int) -> jax.Array:
    """[B,T,H], float32: a number for each head."""
    return self.project(x, name, (heads,), ('heads',), out_dtype=jnp.float32)

  def heads_out(self, o: jax.Array) -> jax.Array:
    """y [B,T,D] = o W_o of the heads' outputs o [B,T,H,V]."""
    return Proj(
      (*o.shape[2:], self.d_model),
      ('heads', 'head_v', 'embed'),
      'BTHV,HVD->BTD',
      self.dtype,
      scale=self.out_scale,
      name='o',
    )(o)


def check_mode(
  ctx: Context,
  cache: tuple[jax.Array | None, ...] | None,
  modes: Sequence[str] = ('causal',),
) -> None:
  """Raises ValueError for a mode not in `modes` or arguments that conflict."""
  if ctx.mode not in modes:
    raise ValueError(
      f'the mode is {ctx.mode!r}; this mixer has {" and ".join(modes)} alone'
    )
  if ctx.mode != 'causal' and (cache, ctx.lengths) != (None, None):
    raise ValueError(
      f'mode {ctx.mode} with a cache or lengths; give whole rows, padding as a'
      ' document of its own'
    )
  if cache is not None and ctx.segment_ids is not None:
    raise ValueError(
      'segment_ids with a cache; a cache holds one document per row, give one'
      ' of them'
    )


def index_tokens(count: int, cache: TokenCache | None) -> jax.Array:
  """Indices along the sequence, int32: [T], or, after a cache, [B,T]."""
  index = jnp.arange(count, dtype=jnp.int32)
  return index if cache is None else cache.length[:, None] + index[None]


def count_positions(
  shape: tuple[int, ...],
  segment_ids: jax.Array | None,
  length: jax.Array | None,
) -> jax.Array:
  """Positions [B,T] from each segment's start, or from a row's length [B]."""
  index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  if length is not None:
    return index + length[:, None]
  if segment_ids is None:
    return index
  first = jnp.pad(
    segment_ids[:, 1:] != segment_ids[:, :-1],
    ((0, 0), (1, 0)),
    constant_values=True,
  )
  return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def add_positions(
  ctx: Context, x: jax.Array, length: jax.Array | None
) -> Context:
  """Returns ctx with positions of the tokens x [B,T,D], if it gives none;
  length: as for `count_positions`."""
  if ctx.positions is not None:
    return ctx
  positions = count_positions(x.shape[:2], ctx.segment_ids, length)
  return ctx.replace(positions=positions)


def place_tokens(ctx: Context, index: jax.Array) -> tuple[Place, Place | None]:
  """The Places of tokens as queries and as keys, None: the same; index: of
  `index_tokens`. Bidirectional queries have the last index: they see all."""
  segments = number_segments(ctx.segment_ids)
  if ctx.mode == 'causal':
    return Place(index, segments), None
  last = jnp.full_like(index, index.shape[-1] - 1)
  return Place(last, segments), Place(index, segments)


def count_tokens(ctx: Context, count: int) -> int | jax.Array:
  """The number of each row's tokens without padding: [B], or `count`."""
  return count if ctx.lengths is None else ctx.lengths


def find_padding(ctx: Context, count: int) -> jax.Array | None:
  """[B,T] bool: true for padding among `count` tokens; None: there is none."""
  if ctx.lengths is None:
    return None
  return jnp.arange(count)[None] >= ctx.lengths[:, None]


def clear_tokens(x: jax.Array, where: jax.Array | None) -> jax.Array:
  """Sets x [B,T,...] to zero where `where` [B,T] is true; None: nowhere."""
  if where is None:
    return x
  where = where.reshape(where.shape + (1,) * (x.ndim - 2))
  return jnp.where(where, jnp.zeros((), x.dtype), x)


def append_tokens(
  cache: Slots, ctx: Context, now: jax.Array, **new: jax.Array
) -> Slots:
  """Returns `cache` with the new tokens of each row behind its last one.

  now [B,T]: of `index_tokens`   new [B,T,...]: the tokens' values, by field
  Padding is not written, nor tokens beyond S in all. ValueError where T > S.
  """
  T, S = now.shape[1], cache.positions.shape[1]
  if T > S:
    raise ValueError(
      f'{T} tokens for a cache of max_len {S}; make a longer cache'
    )
  length = cache.length + count_tokens(ctx, T)
  slots = jnp.where(now < length[:, None], now, S + now)
  new = {'positions': now, **new}
  return cache._replace(
    length=length,
    **{
      name: write_slots(getattr(cache, name), x, slots)
      for name, x in new.items()
    },
  )


def init_recurrent_cache(
  cfg: RuleConfig,
  batch: int,
  dtype: DTypeLike,
  key_shape: tuple[int, int],
  value_shape: tuple[int, int],
  state_shape: tuple[int, int, int],
) -> RecurrentCache:
  """An empty cache; key_shape (J,K), value_shape (H,V), state_shape (H,K,V)."""
  past = lambda shape: (
    conv.init_state(batch, cfg.conv, shape, dtype) if cfg.conv else None
  )
  return RecurrentCache(
    jnp.zeros((batch, *state_shape), jnp.float32),
    past(key_shape),
    past(key_shape),
    past(value_shape),
  )


def convolve_inputs(
  cfg: RuleConfig,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ctx: Context,
  cache: RecurrentCache | None,
) -> tuple[Triple, Past]:
  """q, k and v after the short convolutions, if any, and the convolutions' next
  states; for use inside a module."""
  past: Past = (None, None, None) if cache is None else cache[1:]
  if not cfg.conv:
    return (q, k, v), past
  axes = ('kv_heads', 'head_k'), ('kv_heads', 'head_k'), ('heads', 'head_v')
  pairs = [
    conv.ShortConv(cfg.conv, axes, name=f'{name}_conv')(
      x, state, ctx.segment_ids, ctx.lengths
    )
    for name, x, axes, state in zip('qkv', (q, k, v), axes, past, strict=True)
  ]
  qkv, past = zip(*pairs, strict=True)
  return qkv, past


def run_rule(
  rule: ModuleType,
  cfg: RuleConfig,
  inputs: Inputs,
  ctx: Context,
  cache: RecurrentCache | None,
  **gates: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs `cfg.form` of a rule, or its `step` for a single token with a cache.

  inputs: the rule's arguments [B,T,...] or None, in its order
  gates: its keyword arguments; for `step` they follow the inputs

  Returns (o, state), state None where time is split over devices. Padding is
  set to zero, which changes no state.
  """
  check_mode(ctx, cache)
  padding = find_padding(ctx, inputs[0].shape[1])
  inputs, gates = jax.tree.map(
    lambda x: clear_tokens(x, padding), (inputs, gates)
  )
  if cache is not None and inputs[0].shape[1] == 1:
    token = [None if x is None else x[:, 0] for x in (*inputs, *gates.values())]
    o, state = rule.step(*token, cache.state)
    return o[:, None], state
  name = kernels.choose_form(cfg.form, rule, inputs, gates)
  kernels.report_form(type(cfg).__name__.removesuffix('Config'), name)
  chunk = {} if name == 'recurrent' else {'chunk': cfg.chunk}
  form = functools.partial(kernels.forms(rule)[name], **chunk)
  if cache is None and sequence.is_split(inputs[0].shape[1]):
    return sequence.run_rule(rule, form, inputs, ctx.segment_ids, gates), None
  state = None if cache is None else cache.state
  # a kernel cannot be split by the compiler; the tree's groups have the size
  # that a device's share asks for
  whole = name == 'tree' or name not in rule.FORMS
  if whole and sharding.get_current_mesh() is not None:
    how = state, ctx.segment_ids, gates
    return sequence.run_on_shares(rule, form, inputs, *how)
  return form(*inputs, state=state, segment_ids=ctx.segment_ids, **gates)


def make_aux(
  cache: RecurrentCache | None, state: jax.Array | None, past: Past
) -> Aux:
  """The Aux with the RecurrentCache after `cache`; empty without a cache."""
  if cache is None or state is None:
    return Aux()
  return Aux(RecurrentCache(state, *past))


def log_uniform_dt(
  key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """x with softplus(x) log-uniform in [1e-3, 1e-1], as Mamba's dt bias."""
  low, high = jnp.log(1e-3), jnp.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return dt + jnp.log(-jnp.expm1(-dt))


def log_uniform_decay(low: float) -> Init:
  """Returns an initializer: log A with A uniform in [low, 16]."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, 16.0))

  return init
