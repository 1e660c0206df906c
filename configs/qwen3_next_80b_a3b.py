r"""Qwen3-Next-80B-A3B: Gated DeltaNet and gated attention 3:1.

  python -m launch.train --config=configs/qwen3_next_80b_a3b.py \
    --workdir=runs/qwen3_next_80b_a3b --config.data.path='text/*.parquet'

79,674,391,296 parameters: 48 layers, width 2048, 512 experts of which 10 and a
shared one are used. With its block of multi-token prediction (model.mtp) it has
81,324,862,720.
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
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  delta = GatedDeltaNetConfig(
    key_heads=16, value_heads=32, key_dim=128, value_dim=128
  )
  attention = AttentionConfig(
    heads=16,
    kv_heads=2,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    qk_norm=True,
    gate=True,
  )
  ffn = MoEConfig(experts=512, top=10, hidden=512, shared=512, shared_gate=True)
  model = ModelConfig(
    vocab=151_936,
    d_model=2048,
    remat='full',
    zero_centred=True,
    period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
    repeats=12,
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
