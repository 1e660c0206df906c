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
  """A run of a released architecture on your text, over eight devices.

  Bring the tokenizer.json of the release; --released=DIR starts from its
  weights.
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
  """data.path of the sources of Python's library, which every machine has.

  skipped: folders to leave out, beside installed packages
  """
  folders = ('site-packages', 'dist-packages', *skipped)
  library = f'{sysconfig.get_path("stdlib")}/**/*.py'
  return ','.join([library, *(f'!**/{folder}/**' for folder in folders)])
