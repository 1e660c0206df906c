r"""Qwen3.5: Gated DeltaNet and gated attention 3:1, dense or with experts.

  python -m launch.train --config=configs/qwen3_5.py:9b \
    --workdir=runs/qwen3_5_9b --config.data.path='text/*.parquet'

The text models; every fourth layer is attention.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.config.presets import train_released


def _experts(experts, top, hidden):
  return MoEConfig(experts, top, hidden, shared=hidden, shared_gate=True)


# width, layers, value heads; of attention heads, key heads; ffn, tied
SIZES = {                                                          # parameters
  '0p8b': (1024, 24, 16, 8, 2, MLPConfig(3584), True),            # 752,393,024
  '2b': (2048, 24, 16, 8, 2, MLPConfig(6144), True),            # 1,881,825,088
  '4b': (2560, 32, 32, 16, 4, MLPConfig(9216), True),           # 4,205,751,296
  '9b': (4096, 32, 32, 16, 4, MLPConfig(12288), False),         # 8,953,803,264
  '27b': (5120, 64, 48, 24, 4, MLPConfig(17408), False),       # 26,895,998,464
  '35b_a3b':
    (2048, 40, 32, 16, 2, _experts(256, 8, 512), False),       # 34,660,610,688
  '122b_a10b':
    (3072, 48, 64, 32, 2, _experts(256, 8, 1024), False),     # 122,111,526,912
  '397b_a17b':
    (4096, 60, 64, 32, 2, _experts(512, 10, 1024), False),    # 396,346,350,336
}  # fmt: skip


def get_config(size: str = '9b') -> Experiment:
  width, layers, value_heads, heads, kv_heads, ffn, tied = SIZES[size]
  delta = GatedDeltaNetConfig(16, value_heads, key_dim=128, value_dim=128)
  attention = AttentionConfig(
    heads,
    kv_heads,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    qk_norm=True,
    gate=True,
  )
  model = ModelConfig(
    vocab=248_320,
    d_model=width,
    tied=tied,
    zero_centered=True,
    remat='full',
    period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
    repeats=layers // 4,
  )
  return train_released(model)
