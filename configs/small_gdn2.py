r"""Gated DeltaNet-2 (separate erase and write gates): 8 layers of width 256.

  python -m launch.train --config=configs/small_gdn2.py \
    --workdir=runs/small_gdn2

8,094,496 parameters. Reads the Python standard library's sources as bytes; the
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
from deltanet_jax.config.mixers import KDAConfig


def get_config():
  ffn = MLPConfig(hidden=704)
  mixer = KDAConfig(heads=4, key_dim=64, value_dim=64, separate_gates=True)
  return Experiment(
    model=ModelConfig(
      vocab=264,
      d_model=256,
      tied=True,
      repeats=8,
      period=(Layer(mixer, ffn),),
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
