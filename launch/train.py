"""Trains a model, or continues where a killed run stopped.

  python -m launch.train --config=configs/quickstart.py --workdir=runs/first

Any field of the configuration is set by its name, and tuples by index:

  --config.train.steps=100 --config.model.period.0.mixer.chunk=32

The fields, with their meaning, are in deltanet_jax/experiment.py and
deltanet_jax/mixers/config.py; a misspelt one is answered with the nearest.

Started again with the same --workdir, the run continues from its newest
checkpoint. There only train.log_every, eval_every, eval_rows, save_every, keep
and the mesh may change. SIGTERM and Ctrl-C save after the current step.

Exit status: 0 done; 1 the run failed; 2 bad input, before any device is
touched; 128 + n stopped and saved after signal n.

JAX_PLATFORMS chooses the devices. Eight simulated ones on a CPU:
  JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import json
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.workdir import Workdir
from launch import cli

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: made, or continued.', required=True
)


def main(experiment):
  result = run(experiment, Workdir(WORKDIR.value))
  if isinstance(result, int):
    return 128 + result
  print(json.dumps(result, indent=2))
  return 0


def run(experiment, workdir):
  """The results of the run, or the signal that stopped it."""
  workdir.check(experiment)
  result = workdir.finished()
  if result is not None:
    print(f'finished before: {workdir.path}', file=sys.stderr)
    return result
  return _train(experiment, workdir, _read(experiment))


def _read(experiment):
  from deltanet_jax.data.text import TextData

  data = TextData(experiment.data)
  need = data.tokenizer.vocab_size
  if need > experiment.model.vocab:
    raise ConfigError(
      f'the tokenizer has {need} ids and model.vocab is'
      f' {experiment.model.vocab}; raise model.vocab'
    )
  return data


def _train(experiment, workdir, data):
  from deltanet_jax.checkpoint import CheckpointError
  from deltanet_jax.train import loop

  try:
    return loop.train(experiment, workdir, data)
  except (loop.NonFiniteError, CheckpointError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main, config.from_argv)
