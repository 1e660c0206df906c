"""The configurations of the token mixers. Standard library only, so that a
command line is checked before jax is imported; each class names the Flax module
that implements it.

conv: taps of the short convolutions of q, k and v; 0: no convolution
"""

import dataclasses
import importlib
import math
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Self

from deltanet_jax.config import ranges
from deltanet_jax.config.forms import FORMS, SOFTMAX
from deltanet_jax.config.ranges import (
  Count,
  Doubled,
  Finite,
  Negative,
  NotNegative,
  OneOf,
  Positive,
  Size,
)

if TYPE_CHECKING:
  import flax.linen as nn
  import jax
  from jax.typing import DTypeLike


class FormOf(NamedTuple):
  """A range: the names of a rule's forms."""

  rule: str

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""
    return OneOf(('auto', *FORMS[self.rule])).advise(value)


Chunk = Annotated[int, Doubled(16)]  # see `ops.inverse`


@dataclasses.dataclass(frozen=True)
class MixerConfig:
  """Base class: a mixer's configuration makes its module and its cache."""

  module: ClassVar[str]  # 'package.module:Class' of the Flax module

  def __post_init__(self):
    ranges.check_ranges(self)

  def _class(self):
    path, name = self.module.split(':')
    return getattr(importlib.import_module(path), name)

  def make(self, **kwargs: object) -> 'nn.Module':
    """Returns the Flax module; kwargs: name, fields of `mixers.base.Mixer`."""
    return self._class()(self, **kwargs)

  def init_cache(
    self, batch: int, max_len: int, dtype: 'DTypeLike'
  ) -> 'tuple[jax.Array | None, ...]':
    """Returns an empty cache for rows of up to max_len tokens."""
    return self._class().init_cache(self, batch, max_len, dtype)


def _require(ok, message):
  if not ok:
    raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN (arXiv:2309.00071): rotary positions for a context `factor` times as
  long. The comments give the fields' names in released configurations."""

  factor: Positive
  original: Count  # original_max_position_embeddings
  fast: Positive = 32.0  # beta_fast
  slow: Positive = 1.0  # beta_slow
  mscale: Finite = 0.0  # used with mscale_all_dim; 0: not given
  mscale_all_dim: Finite = 0.0
  attention_factor: Finite | None = None  # None: from mscale and factor
  truncate: bool = True  # round the ends of the ramp to whole pairs

  def __post_init__(self):
    ranges.check_ranges(self)

  @property
  def length(self) -> float:
    """The factor of rotated queries and keys."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return self._m(self.mscale) / self._m(self.mscale_all_dim)
    return self._m(1.0)

  @property
  def softmax_scale(self) -> float:
    """The factor m^2 of the softmax scale in DeepSeek's latent attention; 1
    without mscale_all_dim."""
    return self._m(self.mscale_all_dim) ** 2

  def _m(self, mscale):
    return 0.1 * mscale * math.log(max(1.0, self.factor)) + 1


def _require_turning(cfg):
  _require(
    cfg.yarn is None or cfg.rope_theta > 1,
    f'{type(cfg).__name__}.rope_theta is {cfg.rope_theta}; with yarn give more'
    ' than 1',
  )


def _turn(cfg, rotary_dim, **changes):
  """Keywords of `ops.rope.rotate`."""
  return {
    'rotary_dim': rotary_dim,
    'theta': cfg.rope_theta,
    'yarn': cfg.yarn,
    'interleaved': cfg.interleaved,
    'length': cfg.yarn.length if cfg.yarn else 1.0,
  } | changes


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
  """Softmax attention: grouped queries, optional window, QK-norm, gate."""

  heads: Count
  kv_heads: Count
  head_dim: Count
  window: Count | None = None  # a query sees so many keys, its own included
  rotary_dim: Size = 0  # 0: no positions (NoPE)
  rope_theta: Positive = 10_000.0
  qk_norm: bool = False  # RMS norm of each query and key head, before rotary
  joint_norm: bool = False  # that norm over all heads together (MiniMax-M2)
  gate: bool = False  # sigmoid output gate per channel (Qwen3-Next)
  norm_eps: NotNegative = 1e-6
  interleaved: bool = False  # rotary pairs (2i, 2i+1), not (i, i + P/2)
  yarn: YarnConfig | None = None
  # of whole rows; caches, and time split over devices, have 'blocks'
  form: Annotated[str, OneOf(('auto', *SOFTMAX))] = 'auto'

  module = 'deltanet_jax.mixers.attention:Attention'

  def __post_init__(self):
    super().__post_init__()
    _require_turning(self)
    _require(
      self.heads % self.kv_heads == 0,
      f'AttentionConfig.heads {self.heads} is no multiple of kv_heads'
      f' {self.kv_heads}; change one of them',
    )
    _require(
      0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
      f'AttentionConfig.rotary_dim is {self.rotary_dim}; give an even number'
      f' from 0 to head_dim {self.head_dim}',
    )
    _require(
      self.qk_norm or not self.joint_norm,
      'AttentionConfig.joint_norm without qk_norm; set qk_norm too',
    )

  @property
  def turn(self) -> dict[str, int | float | bool | YarnConfig | None]:
    """Keywords of `ops.rope.rotate`."""
    return _turn(self, self.rotary_dim)

  @classmethod
  def tiny(cls) -> Self:
    return cls(
      heads=4, kv_heads=2, head_dim=8, rotary_dim=4, qk_norm=True, gate=True
    )


@dataclasses.dataclass(frozen=True)
class MLAConfig(MixerConfig):
  """Multi-head latent attention (DeepSeek-V2, Kimi Linear)."""

  heads: Count
  latent: Count  # width of the cached latent (kv_lora_rank)
  key_dim: Count  # per head, without positions (qk_nope_head_dim)
  shared_dim: Count  # key channels that all heads share (qk_rope_head_dim)
  value_dim: Count
  query_latent: Count | None = None  # q_lora_rank; None: no query latent
  rotary: bool = True  # rotate the shared channels; False: NoPE
  rope_theta: Positive = 10_000.0
  interleaved: bool = True
  yarn: YarnConfig | None = None
  # a sigmoid output gate, if any
  gate: Annotated[str, OneOf(('none', 'head', 'channel'))] = 'none'
  norm_eps: NotNegative = 1e-6
  # of whole rows; caches, and time split over devices, have 'blocks'
  form: Annotated[str, OneOf(('auto', *SOFTMAX))] = 'auto'

  module = 'deltanet_jax.mixers.mla:MLA'

  def __post_init__(self):
    super().__post_init__()
    _require_turning(self)
    _require(
      self.shared_dim % 2 == 0 or not self.rotary,
      f'{type(self).__name__}.shared_dim is {self.shared_dim}; rotary pairs'
      ' need an even one',
    )

  @property
  def turn(self) -> dict[str, int | float | bool | YarnConfig | None]:
    """Keywords of `ops.rope.rotate`."""
    return _turn(self, self.shared_dim)

  @property
  def scale(self) -> float:
    """The factor of the scores before the softmax."""
    m2 = self.yarn.softmax_scale if self.yarn else 1.0
    return (self.key_dim + self.shared_dim) ** -0.5 * m2

  @classmethod
  def tiny(cls) -> Self:
    return cls(
      heads=4,
      latent=12,
      key_dim=8,
      shared_dim=4,
      value_dim=6,
      query_latent=10,
      gate='channel',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSAConfig(MLAConfig):
  """DeepSeek sparse attention: MLA over the keys that an indexer chooses."""

  index_heads: Count
  index_dim: Count  # its first shared_dim channels are rotated
  top: Count  # keys that a query attends to
  # 'dense': attend to all keys, for the indexer's warm-up
  stage: Annotated[str, OneOf(('sparse', 'dense'))] = 'sparse'

  module = 'deltanet_jax.mixers.dsa:DSA'

  def __post_init__(self):
    super().__post_init__()
    _require(
      self.form in ('auto', 'blocks'),
      f"DSAConfig.form is '{self.form}'; sparse attention has 'blocks' alone",
    )
    _require(
      self.query_latent is not None,
      'DSAConfig.query_latent is None; the indexer starts from it, give one',
    )
    _require(
      self.index_dim >= self.shared_dim or not self.rotary,
      f'DSAConfig.index_dim is {self.index_dim} and its first shared_dim'
      f' {self.shared_dim} channels are rotated; make it as wide',
    )

  @classmethod
  def tiny(cls) -> Self:
    return cls(
      heads=4,
      latent=12,
      key_dim=8,
      shared_dim=4,
      value_dim=6,
      query_latent=10,
      index_heads=2,
      index_dim=6,
      top=8,
    )


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
  """Linear attention with phi = elu + 1 and a normalizer (arXiv:2006.16236)."""

  heads: Count
  key_dim: Count
  value_dim: Count
  conv: Size = 0
  form: Annotated[str, FormOf('linear_attention')] = 'auto'
  chunk: Chunk = 64  # tokens; not used by the recurrent form and kernels

  module = 'deltanet_jax.mixers.linear_attention:LinearAttention'

  @classmethod
  def tiny(cls) -> Self:
    return cls(heads=2, key_dim=8, value_dim=8)


@dataclasses.dataclass(frozen=True)
class LightningConfig(MixerConfig):
  """Lightning attention (MiniMax-01, arXiv:2501.08313): a constant decay for
  each head and depth."""

  heads: Count
  head_dim: Count
  conv: Size = 0
  norm_eps: NotNegative = 1e-6
  form: Annotated[str, FormOf('linear_attention')] = 'auto'
  chunk: Chunk = 64  # tokens; not used by the recurrent form and kernels

  module = 'deltanet_jax.mixers.linear_attention:Lightning'

  @classmethod
  def tiny(cls) -> Self:
    return cls(heads=4, head_dim=8)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
  """DeltaNet (arXiv:2406.06484): the delta rule without decay."""

  heads: Count
  key_dim: Count
  value_dim: Count
  conv: Size = 4
  negative_eigenvalues: bool = False  # beta in (0, 2) instead of (0, 1)
  norm_eps: NotNegative = 1e-6
  form: Annotated[str, FormOf('delta_rule')] = 'auto'
  chunk: Chunk = 64  # tokens; not used by the recurrent form and kernels

  module = 'deltanet_jax.mixers.delta_net:DeltaNet'

  @classmethod
  def tiny(cls) -> Self:
    return cls(heads=2, key_dim=8, value_dim=16)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
  """Gated DeltaNet (arXiv:2412.06464); with key_heads < value_heads, that of
  Qwen3-Next."""

  key_heads: Count
  value_heads: Count
  key_dim: Count
  value_dim: Count
  conv: Size = 4
  negative_eigenvalues: bool = False
  norm_eps: NotNegative = 1e-6
  form: Annotated[str, FormOf('delta_rule')] = 'auto'
  chunk: Chunk = 64  # tokens; not used by the recurrent form and kernels

  module = 'deltanet_jax.mixers.gated_deltanet:GatedDeltaNet'

  def __post_init__(self):
    super().__post_init__()
    _require(
      self.value_heads % self.key_heads == 0,
      f'GatedDeltaNetConfig.value_heads {self.value_heads} is no multiple of'
      f' key_heads {self.key_heads}; change one of them',
    )

  @classmethod
  def tiny(cls) -> Self:
    return cls(key_heads=2, value_heads=4, key_dim=8, value_dim=16)


@dataclasses.dataclass(frozen=True)
class KDAConfig(MixerConfig):
  """Kimi Delta Attention (arXiv:2510.26692): a decay for every key channel."""

  heads: Count
  key_dim: Count
  value_dim: Count
  conv: Size = 4
  gate_rank: Count | None = None  # of the decay and gate maps; None: value_dim
  # with it g = lower_bound * sigmoid(.); Kimi K3 has -5
  lower_bound: Negative | None = None
  separate_gates: bool = False  # erase and write gates (Gated DeltaNet-2)
  norm_eps: NotNegative = 1e-5
  form: Annotated[str, FormOf('kda')] = 'auto'
  chunk: Chunk = 64  # tokens; not used by the recurrent form and kernels

  module = 'deltanet_jax.mixers.kda:KDA'

  @classmethod
  def tiny(cls) -> Self:
    return cls(heads=2, key_dim=8, value_dim=16, gate_rank=4)


# mixers whose cache grows with the tokens
ATTENTION = AttentionConfig, MLAConfig
