r"""Kimi Delta Attention and gated attention, 3:1: 8 layers of width 256.

  python -m launch.train --config=configs/hybrid_kda.py \
    --workdir=runs/hybrid_kda

6,848,792 parameters. Reads the Python standard library's sources as bytes; the
small_ and hybrid_ presets differ in their mixers only, so their losses compare.
"""

import sysconfig

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, KDAConfig


def get_config():
  ffn = MLPConfig(hidden=704)
  mixer = KDAConfig(heads=4, key_dim=64, value_dim=64)
  attention = AttentionConfig(
    heads=8, kv_heads=2, head_dim=32, rotary_dim=16, qk_norm=True, gate=True
  )
  return Experiment(
    model=ModelConfig(
      vocab=264,
      d_model=256,
      tied=True,
      repeats=2,
      period=(Layer(mixer, ffn),) * 3 + (Layer(attention, ffn),),
    ),
    data=DataConfig(
      path=f'{sysconfig.get_path("stdlib")}/**/*.py,!**/site-packages/**'
      ',!**/dist-packages/**',
      seq_len=512,
      batch=16,
    ),
    optim=OptimConfig(lr=1e-3, warmup=100),
    train=TrainConfig(steps=2000, eval_every=250),
  )
