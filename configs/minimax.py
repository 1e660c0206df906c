r"""MiniMax-Text-01, M1: Lightning attention and attention 7:1; M2: attention.

  python -m launch.train --config=configs/minimax.py:m1 \
    --workdir=runs/minimax_m1 --config.data.path='text/*.parquet'

All are mixtures of experts: every token uses 2 of 32, in M2 8 of 256. Text-01
and M1 have the same architecture: every branch is added to its normed input
(DeepNorm). M2 normalizes queries and keys over all heads together.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  ModelConfig,
  MoEConfig,
  Residual,
)
from deltanet_jax.config.mixers import AttentionConfig, LightningConfig
from deltanet_jax.config.presets import train_released


def _lightning():
  ffn = MoEConfig(experts=32, top=2, hidden=9216)
  residual = Residual('normed', alpha=3.5565588200778455)
  attention = AttentionConfig(
    64, 8, head_dim=128, rotary_dim=64, rope_theta=1e7, norm_eps=1e-5
  )
  recurrent = Layer(LightningConfig(64, head_dim=128), ffn, residual)
  return (recurrent,) * 7 + (Layer(attention, ffn, residual),)


def _attention():
  ffn = MoEConfig(experts=256, top=8, hidden=1536, score='sigmoid', bias=True)
  attention = AttentionConfig(
    heads=48,
    kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5e6,
    qk_norm=True,
    joint_norm=True,
  )
  return (Layer(attention, ffn),)


# width, repeating block, repeats, norm_eps                           parameters
SIZES = {
  'text_01': (6144, _lightning(), 10, 1e-5),                  # 456,089,655,296
  'm1': (6144, _lightning(), 10, 1e-5),                       # 456,089,655,296
  'm2': (3072, _attention(), 62, 1e-6),                       # 228,689,764,864
}  # fmt: skip


def get_config(size: str = 'm1') -> Experiment:
  width, period, repeats, norm_eps = SIZES[size]
  model = ModelConfig(
    vocab=200_064,
    d_model=width,
    norm_eps=norm_eps,
    remat='full',
    period=period,
    repeats=repeats,
  )
  return train_released(model)
