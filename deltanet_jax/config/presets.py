"""What the runs of several presets share."""

import sysconfig

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)


def train_released(model: ModelConfig) -> Experiment:
  """A released model on text of yours, over eight devices.

  Its tokenizer.json is the one released with it; --released=DIR starts from
  the weights.
  """
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


def python_sources(*skipped: str) -> str:
  """The path of the Python library's sources, text that every machine has.

  skipped: folders, beside what is installed there
  """
  folders = ('site-packages', 'dist-packages', *skipped)
  library = f'{sysconfig.get_path("stdlib")}/**/*.py'
  return ','.join([library, *(f'!**/{folder}/**' for folder in folders)])
