r"""MiniMax-Text-01: Lightning attention and softmax attention 7:1.

  python -m launch.train --config=configs/minimax_text_01.py \
    --workdir=runs/minimax_text_01 --config.data.path='text/*.parquet'

456,089,655,296 parameters: 80 layers, width 6144, 32 experts of which 2 are
used; every branch is added to its own normed input (DeepNorm). The weights of
MiniMax-M1 have the same form.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  Residual,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, LightningConfig


def get_config():
  ffn = MoEConfig(experts=32, top=2, hidden=9216)
  residual = Residual('normed', alpha=3.5565588200778455)
  lightning = Layer(LightningConfig(heads=64, head_dim=128), ffn, residual)
  attention = Layer(
    AttentionConfig(
      heads=64,
      kv_heads=8,
      head_dim=128,
      rotary_dim=64,
      rope_theta=1e7,
      norm_eps=1e-5,
    ),
    ffn,
    residual,
  )
  model = ModelConfig(
    vocab=200_064,
    d_model=6144,
    norm_eps=1e-5,
    remat='full',
    period=(lightning,) * 7 + (attention,),
    repeats=10,
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
