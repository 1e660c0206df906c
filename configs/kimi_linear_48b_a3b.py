r"""Kimi-Linear-48B-A3B: Kimi Delta Attention and latent attention 20:7.

  python -m launch.train --config=configs/kimi_linear_48b_a3b.py \
    --workdir=runs/kimi_linear_48b_a3b --config.data.path='text/*.parquet'

49,122,681,728 parameters: 27 layers, width 2304; the first has a dense MLP, the
others 256 experts of which 8 and a shared one are used. No positions anywhere.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import KDAConfig, MLAConfig


def get_config():
  kda = KDAConfig(heads=32, key_dim=128, value_dim=128)
  mla = MLAConfig(
    heads=32,
    latent=512,
    key_dim=128,
    shared_dim=64,
    value_dim=128,
    rotary=False,
  )
  moe = MoEConfig(
    experts=256,
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
    d_model=2304,
    norm_eps=1e-5,
    remat='full',
    prefix=(Layer(kda, MLPConfig(hidden=9216)),),
    period=(Layer(kda, moe),) * 2 + (Layer(mla, moe), Layer(kda, moe)),
    repeats=6,
    suffix=(Layer(kda, moe), Layer(mla, moe)),
  )
  return Experiment(
    model=model,
    data=DataConfig(
      path='text/*.parquet',
      tokenizer='tokenizer.json',
      seq_len=4096,
      batch=64,
      heldout=0.001,
    ),
    optim=OptimConfig(lr=1e-5, warmup=100),
    train=TrainConfig(steps=1000),
    mesh=MeshConfig(fsdp=8),
  )
