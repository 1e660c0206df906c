"""Sizes, models and settings of a profile. Standard library only."""

import dataclasses

from deltanet_jax.config import mixers
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig

STEPS = 64  # timed tokens of decoding
WARM = 2  # untimed tokens before them
# the shortest context: the timed tokens and a prompt
SHORTEST = 2 * STEPS


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
  """Everything that a result depends on beside models and machine."""

  contexts: tuple[int, ...]  # tokens, ascending
  dtype: str  # of computation and caches
  budget_gib: float  # for parameters and caches at the largest batch
  max_batch: int  # most sequences
  seconds: float  # for all rounds of one model, context and quantity
  rounds: int = 6  # the range of 6 holds the median with 97%


@dataclasses.dataclass(frozen=True)
class Size:
  """The models of a size and their settings."""

  d_model: int
  layers: int  # a multiple of 4
  heads: int
  models: tuple[str, ...]  # of MODELS; ratios are to the first
  settings: ProfileSettings


def _doubling(first, last):
  return tuple(1 << n for n in range(first.bit_length() - 1, last.bit_length()))


def _list_mixers(d_model, heads):
  """{name: (mixer of three of four layers, mixer of the fourth)}."""
  width = d_model // heads
  latent = {
    'heads': heads, 'latent': d_model // 2, 'key_dim': width,
    'shared_dim': width // 2, 'value_dim': width,
  }  # fmt: skip
  full = mixers.AttentionConfig(heads, heads, width, rotary_dim=width // 2)
  mla = mixers.MLAConfig(**latent)
  dsa = mixers.DSAConfig(
    **latent, query_latent=d_model // 2, index_heads=max(1, heads // 2),
    index_dim=width, top=4 * d_model,
  )  # fmt: skip
  gdn = mixers.GatedDeltaNetConfig(heads, heads, width, width)
  kda = mixers.KDAConfig(heads, width, width)
  return {
    'full': (full, full),
    'mla': (mla, mla),
    'dsa': (dsa, dsa),
    'gdn3': (gdn, full),  # as Qwen3-Next
    'kda3': (kda, mla),  # as Kimi Linear
    'gdn': (gdn, gdn),
    'kda': (kda, kda),
  }


MODELS = {
  'full': 'multi-head attention in every layer',
  'mla': 'multi-head latent attention in every layer',
  'dsa': 'DeepSeek sparse attention in every layer',
  'gdn3': 'Gated DeltaNet and multi-head attention, 3:1',
  'kda3': 'Kimi Delta Attention and multi-head latent attention, 3:1',
  'gdn': 'Gated DeltaNet alone',
  'kda': 'Kimi Delta Attention alone',
}


def make_models(size, names):
  """{name: ModelConfig} of the same width and depth."""
  ffn = MLPConfig(size.d_model * 11 // 4)
  out = {}
  for name in names:
    most, fourth = _list_mixers(size.d_model, size.heads)[name]
    period = (Layer(most, ffn),) * 3 + (Layer(fourth, ffn),)
    if most == fourth:
      period = period[:1]
    out[name] = ModelConfig(
      264, size.d_model, period, size.layers // len(period), tied=True
    )
  return out


ALL = tuple(MODELS)
SIZES = {
  'smoke': Size(
    32, 4, 2, ('full', 'gdn3', 'gdn'),
    ProfileSettings((256, 1024), 'float32', 0.004, 16, 5.0, rounds=3),
  ),
  'cpu': Size(
    128, 8, 4, ALL,
    ProfileSettings(_doubling(1024, 32_768), 'float32', 0.25, 16, 30.0),
  ),
  'gpu': Size(
    1024, 16, 16, ALL,
    ProfileSettings(_doubling(1024, 1 << 20), 'bfloat16', 64.0, 1024, 60.0),
  ),
}  # fmt: skip
