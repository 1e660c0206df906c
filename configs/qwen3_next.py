r"""Qwen3-Next: Gated DeltaNet and gated attention 3:1, a mixture of experts.

  python -m launch.train --config=configs/qwen3_next.py:80b_a3b \
    --workdir=runs/qwen3_next --config.data.path='text/*.parquet'

Every token uses 10 of 512 experts and a shared one. With its block of
multi-token prediction (model.mtp) it has 81,324,862,720 parameters.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.config.presets import train_released

# width, layers, experts                                             parameters
SIZES = {
  '80b_a3b': (2048, 48, 512),                                  # 79,674,391,296
}  # fmt: skip


def get_config(size: str = '80b_a3b') -> Experiment:
  width, layers, experts = SIZES[size]
  delta = GatedDeltaNetConfig(16, 32, key_dim=128, value_dim=128)
  attention = AttentionConfig(
    heads=16,
    kv_heads=2,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    qk_norm=True,
    gate=True,
  )
  ffn = MoEConfig(experts, top=10, hidden=512, shared=512, shared_gate=True)
  model = ModelConfig(
    vocab=151_936,
    d_model=width,
    zero_centered=True,
    remat='full',
    period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
    repeats=layers // 4,
  )
  return train_released(model)
