"""The token mixers' configurations. Standard library only, so that a command
line is checked before jax is imported; each class names the module that
implements it.

Sizes: H value heads, J key heads (H a multiple of J), K and V key and value
width per head, W taps of the short convolution (0: none).
"""

import dataclasses
import importlib
from typing import ClassVar

FORMS = ('recurrent', 'associative', 'chunked')


@dataclasses.dataclass(frozen=True)
class MixerConfig:
  """What a layer needs of its mixer: a module and a fresh cache."""

  module: ClassVar[str]  # 'package.module:Class' of the Flax module

  def _class(self):
    path, name = self.module.split(':')
    return getattr(importlib.import_module(path), name)

  def make(self, **kwargs):
    """The Flax module; `kwargs`: name and the fields of `mixers.base:Mixer`."""
    return self._class()(self, **kwargs)

  def init_cache(self, batch, max_len, dtype):
    """A fresh cache; shapes only under `jax.eval_shape`."""
    return self._class().init_cache(self, batch, max_len, dtype)


def _require(ok, message):
  if not ok:
    raise ValueError(message)


def _positive(cfg, *names):
  for name in names:
    value = getattr(cfg, name)
    _require(
      value > 0, f'{type(cfg).__name__}.{name} is {value}; give 1 or more'
    )


def _check_rule(cfg):
  _require(
    cfg.form in FORMS,
    f'{type(cfg).__name__}.form is {cfg.form!r}; give one of'
    f' {", ".join(FORMS)}',
  )
  _require(
    cfg.conv >= 0,
    f'{type(cfg).__name__}.conv is {cfg.conv}; give 0 (none) or the taps',
  )
  _require(
    cfg.chunk > 0 and cfg.chunk % 16 == 0,
    f'{type(cfg).__name__}.chunk is {cfg.chunk}; give a multiple of 16',
  )


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
  """Softmax attention: grouped queries, optional window, QK-norm, gate."""

  heads: int
  kv_heads: int
  head_dim: int
  window: int | None = None  # keys seen, the current one included
  rotary_dim: int = 0  # 0: no positions (NoPE)
  rope_theta: float = 10_000.0
  qk_norm: bool = False  # RMS norm of every query and key head, before rotary
  gate: bool = False  # sigmoid output gate per channel (Qwen3-Next)
  norm_eps: float = 1e-6

  module = 'deltanet_jax.mixers.attention:Attention'

  def __post_init__(self):
    _positive(self, 'heads', 'kv_heads', 'head_dim')
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
      self.window is None or self.window > 0,
      f'AttentionConfig.window is {self.window}; give 1 or more, or None',
    )

  @classmethod
  def tiny(cls):
    return cls(
      heads=4, kv_heads=2, head_dim=8, rotary_dim=4, qk_norm=True, gate=True
    )


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
  """Classical linear attention with phi = elu + 1 and its normaliser."""

  heads: int
  key_dim: int
  value_dim: int
  conv: int = 0
  form: str = 'chunked'
  chunk: int = 64  # tokens; the recurrent form has none

  module = 'deltanet_jax.mixers.linear_attention:LinearAttention'

  def __post_init__(self):
    _positive(self, 'heads', 'key_dim', 'value_dim')
    _check_rule(self)

  @classmethod
  def tiny(cls):
    return cls(heads=2, key_dim=8, value_dim=8)


@dataclasses.dataclass(frozen=True)
class LightningConfig(MixerConfig):
  """Lightning attention (MiniMax-01): constant decay per head and depth."""

  heads: int
  head_dim: int
  conv: int = 0
  norm_eps: float = 1e-6
  form: str = 'chunked'
  chunk: int = 64  # tokens; the recurrent form has none

  module = 'deltanet_jax.mixers.linear_attention:Lightning'

  def __post_init__(self):
    _positive(self, 'heads', 'head_dim')
    _check_rule(self)

  @classmethod
  def tiny(cls):
    return cls(heads=4, head_dim=8)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
  """DeltaNet (arXiv:2406.06484): the delta rule without decay."""

  heads: int
  key_dim: int
  value_dim: int
  conv: int = 4
  negative_eigenvalues: bool = False  # beta in (0, 2) instead of (0, 1)
  norm_eps: float = 1e-6
  form: str = 'chunked'
  chunk: int = 64  # tokens; the recurrent form has none

  module = 'deltanet_jax.mixers.delta_net:DeltaNet'

  def __post_init__(self):
    _positive(self, 'heads', 'key_dim', 'value_dim')
    _check_rule(self)

  @classmethod
  def tiny(cls):
    return cls(heads=2, key_dim=8, value_dim=16)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
  """Gated DeltaNet (arXiv:2412.06464; Qwen3-Next when heads differ)."""

  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  conv: int = 4
  negative_eigenvalues: bool = False
  norm_eps: float = 1e-6
  form: str = 'chunked'
  chunk: int = 64  # tokens; the recurrent form has none

  module = 'deltanet_jax.mixers.gated_deltanet:GatedDeltaNet'

  def __post_init__(self):
    _positive(self, 'key_heads', 'value_heads', 'key_dim', 'value_dim')
    _require(
      self.value_heads % self.key_heads == 0,
      f'GatedDeltaNetConfig.value_heads {self.value_heads} is no multiple of'
      f' key_heads {self.key_heads}; change one of them',
    )
    _check_rule(self)

  @classmethod
  def tiny(cls):
    return cls(key_heads=2, value_heads=4, key_dim=8, value_dim=16)


@dataclasses.dataclass(frozen=True)
class KDAConfig(MixerConfig):
  """Kimi Delta Attention (Kimi Linear): a decay for every key channel."""

  heads: int
  key_dim: int
  value_dim: int
  conv: int = 4
  gate_rank: int | None = None  # of the decay and gate maps; None: value_dim
  lower_bound: float | None = None  # g = lower_bound * sigmoid(.): Kimi K3's -5
  separate_gates: bool = False  # erase and write gates (Gated DeltaNet-2)
  norm_eps: float = 1e-5
  form: str = 'chunked'
  chunk: int = 64  # tokens; the recurrent form has none

  module = 'deltanet_jax.mixers.kda:KDA'

  def __post_init__(self):
    _positive(self, 'heads', 'key_dim', 'value_dim')
    _require(
      self.lower_bound is None or self.lower_bound < 0,
      f'KDAConfig.lower_bound is {self.lower_bound}; a log-decay is below 0',
    )
    _check_rule(self)

  @classmethod
  def tiny(cls):
    return cls(heads=2, key_dim=8, value_dim=16, gate_rank=4)
