r"""Qwen3.5-122B-A10B: Gated DeltaNet and gated attention 3:1.

  python -m launch.train --config=configs/qwen3_5_122b_a10b.py \
    --workdir=runs/qwen3_5_122b_a10b --config.data.path='text/*.parquet'

122,111,526,912 parameters: 48 layers, every fourth of them gated attention,
width 3072; the text model.
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
    key_heads=16, value_heads=64, key_dim=128, value_dim=128
  )
  attention = AttentionConfig(
    heads=32,
    kv_heads=2,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    qk_norm=True,
    gate=True,
  )
  ffn = MoEConfig(
    experts=256, top=8, hidden=1024, shared=1024, shared_gate=True
  )
  model = ModelConfig(
    vocab=248_320,
    d_model=3072,
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
