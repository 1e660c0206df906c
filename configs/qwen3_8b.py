r"""Qwen3-8B: attention in every layer.

  python -m launch.train --config=configs/qwen3_8b.py \
    --workdir=runs/qwen3_8b --config.data.path='text/*.parquet'

8,190,735,360 parameters: 36 layers of 32 heads over 8 keys, width 4096.
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
    heads=32,
    kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    rope_theta=1e6,
    qk_norm=True,
  )
  ffn = MLPConfig(hidden=12288)
  model = ModelConfig(
    vocab=151_936,
    d_model=4096,
    remat='full',
    period=(Layer(attention, ffn),),
    repeats=36,
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
