r"""Qwen3 (arXiv:2505.09388): attention in every layer, dense or with experts.

  python -m launch.train --config=configs/qwen3.py:8b \
    --workdir=runs/qwen3_8b --config.data.path='text/*.parquet'
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.config.presets import train_released

# width, layers, heads, key heads, ffn, tied                         parameters
SIZES = {
  '0p6b': (1024, 28, 16, 8, MLPConfig(3072), True),               # 596,049,920
  '1p7b': (2048, 28, 16, 8, MLPConfig(6144), True),             # 1,720,574,976
  '4b': (2560, 36, 32, 8, MLPConfig(9728), True),               # 4,022,468,096
  '8b': (4096, 36, 32, 8, MLPConfig(12288), False),             # 8,190,735,360
  '14b': (5120, 40, 40, 8, MLPConfig(17408), False),           # 14,768,307,200
  '32b': (5120, 64, 64, 8, MLPConfig(25600), False),           # 32,762,123,264
  '30b_a3b': (2048, 48, 32, 4, MoEConfig(128, 8, 768), False), # 30,532,122,624
  '235b_a22b':
    (4096, 94, 64, 4, MoEConfig(128, 8, 1536), False),        # 235,093,634,560
}  # fmt: skip


def get_config(size: str = '8b') -> Experiment:
  width, layers, heads, kv_heads, ffn, tied = SIZES[size]
  attention = AttentionConfig(
    heads, kv_heads, head_dim=128, rotary_dim=128, rope_theta=1e6, qk_norm=True
  )
  model = ModelConfig(
    vocab=151_936,
    d_model=width,
    tied=tied,
    remat='full',
    period=(Layer(attention, ffn),),
    repeats=layers,
  )
  return train_released(model)
