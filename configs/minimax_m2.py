r"""MiniMax-M2: attention in every layer, a mixture of experts.

  python -m launch.train --config=configs/minimax_m2.py \
    --workdir=runs/minimax_m2 --config.data.path='text/*.parquet'

228,689,764,864 parameters: 62 layers, width 3072, 256 experts of which 8 are
used; queries and keys are normalised over all heads together.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig


def get_config():
  attention = AttentionConfig(
    heads=48,
    kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5e6,
    qk_norm=True,
    joint_norm=True,
  )
  ffn = MoEConfig(experts=256, top=8, hidden=1536, score='sigmoid', bias=True)
  model = ModelConfig(
    vocab=200_064,
    d_model=3072,
    period=(Layer(attention, ffn),),
    repeats=62,
    remat='full',
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
