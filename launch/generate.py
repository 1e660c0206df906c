"""Continues a text with the model of a training run.

  python -m launch.generate --workdir=runs/first --prompt='def main(' \\
    --max_tokens=200 --temperature=0.8

The text appears as it is made. It ends after --max_tokens, or where the model
ends the document.
"""

import sys

from absl import flags

from deltanet_jax.config import ConfigError
from deltanet_jax.infer.settings import Sampling
from deltanet_jax.workdir import Workdir
from launch import cli

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of a training run.', required=True
)
PROMPT = flags.DEFINE_string('prompt', '', 'Text to continue.')
MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 200, 'Tokens to add at most.', lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, '0: always the most likely token.'
)
TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Choose among so many most likely tokens; 0: all.'
)
TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Choose among the most likely tokens of this probability.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Another seed, another text.')


def main(taken):
  del taken
  workdir = Workdir(WORKDIR.value)
  experiment = workdir.read()
  if not workdir.checkpoints.is_dir():
    raise ConfigError(f'{workdir.path} has no checkpoint yet; train first')
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  try:
    sampling.check()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  from deltanet_jax.checkpoint import CheckpointError
  from deltanet_jax.infer import generate

  try:
    parts = generate.continue_text(
      workdir, experiment, PROMPT.value,
      max_tokens=MAX_TOKENS.value, sampling=sampling, seed=SEED.value,
    )  # fmt: skip
    sys.stdout.write(PROMPT.value)
    for part in parts:
      sys.stdout.write(part)
      sys.stdout.flush()
  except CheckpointError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print()
  return 0


if __name__ == '__main__':
  cli.run(main)
