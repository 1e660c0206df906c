r"""Kimi Linear: Kimi Delta Attention and latent attention, with experts.

  python -m launch.train --config=configs/kimi_linear.py:48b_a3b \
    --workdir=runs/kimi_linear --config.data.path='text/*.parquet'

27 layers, 20 of them recurrent. The first has a dense MLP; in the others every
token uses 8 of 256 experts and a shared one. No positions anywhere.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import KDAConfig, MLAConfig
from deltanet_jax.config.presets import train_released

# width, heads, experts                                              parameters
SIZES = {
  '48b_a3b': (2304, 32, 256),                                  # 49,122,681,728
}  # fmt: skip


def get_config(size: str = '48b_a3b') -> Experiment:
  width, heads, experts = SIZES[size]
  kda = KDAConfig(heads, key_dim=128, value_dim=128)
  mla = MLAConfig(
    heads, latent=512, key_dim=128, shared_dim=64, value_dim=128, rotary=False
  )
  moe = MoEConfig(
    experts,
    top=8,
    hidden=1024,
    score='sigmoid',
    bias=True,
    eps=1e-20,
    scale=2.446,
    shared=1024,
  )
  model = ModelConfig(
    vocab=163_840,
    d_model=width,
    norm_eps=1e-5,
    remat='full',
    prefix=(Layer(kda, MLPConfig(9216)),),
    period=(Layer(kda, moe),) * 2 + (Layer(mla, moe), Layer(kda, moe)),
    repeats=6,
    suffix=(Layer(kda, moe), Layer(mla, moe)),
  )
  return train_released(model)
