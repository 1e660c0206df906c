r"""Qwen3-30B-A3B: attention in every layer, a mixture of experts.

  python -m launch.train --config=configs/qwen3_30b_a3b.py \
    --workdir=runs/qwen3_30b_a3b --config.data.path='text/*.parquet'

30,532,122,624 parameters: 48 layers of 32 heads over 4 keys, width 2048.
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
    heads=32,
    kv_heads=4,
    head_dim=128,
    rotary_dim=128,
    rope_theta=1e6,
    qk_norm=True,
  )
  ffn = MoEConfig(experts=128, top=8, hidden=768)
  model = ModelConfig(
    vocab=151_936,
    d_model=2048,
    remat='full',
    period=(Layer(attention, ffn),),
    repeats=48,
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
