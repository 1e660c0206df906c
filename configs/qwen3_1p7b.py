r"""Qwen3-1.7B: attention in every layer.

  python -m launch.train --config=configs/qwen3_1p7b.py \
    --workdir=runs/qwen3_1p7b --config.data.path='text/*.parquet'

1,720,574,976 parameters: 28 layers of 16 heads over 8 keys, width 2048, tied
embedding.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig


def get_config():
  attention = AttentionConfig(
    heads=16,
    kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    rope_theta=1e6,
    qk_norm=True,
  )
  ffn = MLPConfig(hidden=6144)
  model = ModelConfig(
    vocab=151_936,
    d_model=2048,
    remat='full',
    tied=True,
    period=(Layer(attention, ffn),),
    repeats=28,
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
