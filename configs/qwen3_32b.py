r"""Qwen3-32B: attention in every layer.

  python -m launch.train --config=configs/qwen3_32b.py \
    --workdir=runs/qwen3_32b --config.data.path='text/*.parquet'

32,762,123,264 parameters: 64 layers of 64 heads over 8 keys, width 5120.
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
    heads=64,
    kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    rope_theta=1e6,
    qk_norm=True,
  )
  ffn = MLPConfig(hidden=25600)
  model = ModelConfig(
    vocab=151_936,
    d_model=5120,
    remat='full',
    period=(Layer(attention, ffn),),
    repeats=64,
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
