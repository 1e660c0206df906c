"""Parts that several presets share."""

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
  """An Experiment that trains a released model on your text on eight devices.

  tokenizer.json is the model's; --released=DIR starts from its weights.
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
  """The `data.path` of the Python standard library, text on every machine.

  skipped: folders to leave out, besides those of installed packages
  """
  folders = ('site-packages', 'dist-packages', *skipped)
  library = f'{sysconfig.get_path("stdlib")}/**/*.py'
  return ','.join([library, *(f'!**/{folder}/**' for folder in folders)])
