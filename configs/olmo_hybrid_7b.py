r"""Olmo-Hybrid-7B: Gated DeltaNet and attention 3:1.

  python -m launch.train --config=configs/olmo_hybrid_7b.py \
    --workdir=runs/olmo_hybrid_7b --config.data.path='text/*.parquet'

7,430,870,688 parameters: 32 layers, width 3840; the recurrences may have
negative eigenvalues, the attention has no positions and is normed after its
branch.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  Residual,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  ffn = MLPConfig(hidden=11008)
  delta = GatedDeltaNetConfig(
    key_heads=30,
    value_heads=30,
    key_dim=96,
    value_dim=192,
    negative_eigenvalues=True,
    norm_eps=1e-5,
  )
  attention = AttentionConfig(
    heads=30, kv_heads=30, head_dim=128, qk_norm=True, joint_norm=True
  )
  model = ModelConfig(
    vocab=100_352,
    d_model=3840,
    remat='full',
    repeats=8,
    period=(Layer(delta, ffn),) * 3
    + (Layer(attention, ffn, Residual('post')),),
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
