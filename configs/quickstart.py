"""A small byte-level 3:1 hybrid of Gated DeltaNet and gated attention.

  bash launch/quickstart.sh

or, in an environment of your own,

  python -m launch.quickstart --config=configs/quickstart.py
"""

import sysconfig

from deltanet_jax.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.mixers.config import AttentionConfig, GatedDeltaNetConfig


def get_config():
  ffn = MLPConfig(hidden=512)
  delta = GatedDeltaNetConfig(
    key_heads=3, value_heads=3, key_dim=32, value_dim=64
  )
  attention = AttentionConfig(
    heads=6, kv_heads=2, head_dim=32, rotary_dim=16, qk_norm=True, gate=True
  )
  return Experiment(
    model=ModelConfig(
      vocab=264,
      d_model=192,
      period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
      repeats=1,
      tied=True,
    ),
    # the standard library's own sources, without what is installed beside it
    data=DataConfig(
      path=f'{sysconfig.get_path("stdlib")}/**/*.py,!**/site-packages/**'
      ',!**/dist-packages/**',
      seq_len=512,
      batch=8,
      heldout=0.03,
    ),
    optim=OptimConfig(
      name='muon',
      lr=3e-3,
      muon_lr=0.02,
      schedule='wsd',
      decay=0.4,
      final=0.05,
      warmup=20,
      weight_decay=0.01,
    ),  # fmt: skip
    train=TrainConfig(
      steps=300,
      dtype='float32',
      log_every=10,
      eval_every=100,
      eval_rows=64,
      save_every=100,
    ),
  )
