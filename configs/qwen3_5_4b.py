r"""Qwen3.5-4B: Gated DeltaNet and gated attention 3:1.

  python -m launch.train --config=configs/qwen3_5_4b.py \
    --workdir=runs/qwen3_5_4b --config.data.path='text/*.parquet'

4,205,751,296 parameters: 32 layers, every fourth of them gated attention, width
2560; the text model.
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
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  delta = GatedDeltaNetConfig(
    key_heads=16, value_heads=32, key_dim=128, value_dim=128
  )
  attention = AttentionConfig(
    heads=16,
    kv_heads=4,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    qk_norm=True,
    gate=True,
  )
  ffn = MLPConfig(hidden=9216)
  model = ModelConfig(
    vocab=248_320,
    d_model=2560,
    remat='full',
    zero_centred=True,
    tied=True,
    period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
    repeats=8,
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
