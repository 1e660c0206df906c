r"""Olmo-Hybrid: Gated DeltaNet and attention 3:1.

  python -m launch.train --config=configs/olmo_hybrid.py:7b \
    --workdir=runs/olmo_hybrid --config.data.path='text/*.parquet'

beta is up to 2 (negative eigenvalues). Attention has no positions and is normed
after its branch.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  Residual,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.config.presets import train_released

# width, layers, heads, hidden                                       parameters
SIZES = {
  '7b': (3840, 32, 30, 11008),                                  # 7,430,870,688
}  # fmt: skip


def get_config(size: str = '7b') -> Experiment:
  width, layers, heads, hidden = SIZES[size]
  ffn = MLPConfig(hidden)
  delta = GatedDeltaNetConfig(
    heads,
    heads,
    key_dim=96,
    value_dim=192,
    negative_eigenvalues=True,
    norm_eps=1e-5,
  )
  attention = AttentionConfig(
    heads, heads, head_dim=128, qk_norm=True, joint_norm=True
  )
  model = ModelConfig(
    vocab=100_352,
    d_model=width,
    remat='full',
    period=(Layer(delta, ffn),) * 3
    + (Layer(attention, ffn, Residual('post')),),
    repeats=layers // 4,
  )
  return train_released(model)
