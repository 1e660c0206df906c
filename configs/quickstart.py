"""A small byte-level 3:1 hybrid of Gated DeltaNet and gated attention.

  bash launch/quickstart.sh

or, in an environment of your own,

  python -m launch.quickstart --config=configs/quickstart.py

830,348 parameters, 3.1 million training tokens: 5 to 20 minutes on 2 CPU cores.
Expect about 1.67 bits per byte of held-out text, a third less than an order-2
n-gram model and less than an order-3 one. The text is the library of your
Python, so the figure depends on its version.
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
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  ffn = MLPConfig(hidden=344)
  delta = GatedDeltaNetConfig(
    key_heads=2, value_heads=2, key_dim=32, value_dim=64, chunk=32
  )
  attention = AttentionConfig(
    heads=4, kv_heads=2, head_dim=32, rotary_dim=16, qk_norm=True, gate=True
  )
  library = sysconfig.get_path('stdlib')
  # without installed packages and tests, which not every Python has
  others = ('site-packages', 'dist-packages', 'test', 'tests')
  return Experiment(
    model=ModelConfig(
      vocab=264,  # 256 bytes and end-of-document, rounded up to a multiple of 8
      d_model=128,
      period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
      repeats=1,
      tied=True,
    ),
    data=DataConfig(
      path=','.join([f'{library}/**/*.py', *(f'!**/{x}/**' for x in others)]),
      seq_len=512,
      batch=4,
      heldout=0.03,
    ),
    optim=OptimConfig(
      name='muon',
      lr=3e-3,
      muon_lr=0.02,
      schedule='wsd',
      decay=0.4,
      final=0.02,
      warmup=20,
      weight_decay=0.01,
    ),
    train=TrainConfig(
      steps=1500,
      dtype='float32',
      log_every=10,
      eval_every=250,
      eval_rows=64,
      save_every=250,
    ),
  )
