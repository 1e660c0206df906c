"""Continues a text with the model of a training run, or a released one.

  python -m launch.generate --workdir=runs/first --prompt='def main(' \\
    --max_tokens=200 --temperature=0.8

  python -m launch.generate --released=Qwen3-0.6B --chat --prompt='Why?'

--released is a folder of released weights with its tokenizer.json, what
launch.convert made of one, or ORG/NAME on the Hugging Face hub (needs
huggingface_hub). With --chat the prompt is a user's message; a run that began
with released weights has their chat template too.

The text appears as it is made. It ends after --max_tokens, or where the model
ends the document.
"""

import sys

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.sampling import SEEDS, Sampling
from deltanet_jax.data.tokenizer import require_utf8
from deltanet_jax.runs.folder import Workdir

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
RELEASED = flags.DEFINE_string(
  'released', None, 'Released weights: a folder, or ORG/NAME on the hub.'
)
CHAT = flags.DEFINE_bool(
  'chat', False, "Put the prompt into a released model's chat template."
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
SEED = flags.DEFINE_integer(
  'seed',
  0,
  'Another seed, another text.',
  lower_bound=SEEDS[0],
  upper_bound=SEEDS[-1],
)


def main():
  """The command."""
  command.run(_main)


def _main(taken):
  del taken
  if (WORKDIR.value is None) == (RELEASED.value is None):
    raise ConfigError('give one of --workdir and --released')
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  try:
    sampling.check()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  require_utf8(PROMPT.value, '--prompt')
  how = {
    'max_tokens': MAX_TOKENS.value,
    'sampling': sampling,
    'seed': SEED.value,
  }
  make = _of_run if RELEASED.value is None else _of_released
  return _show(make(how))


def _of_run(how):
  workdir = Workdir(WORKDIR.value)
  experiment = workdir.read()
  if not workdir.checkpoints.is_dir():
    raise ConfigError(f'{workdir.path} has no checkpoint yet; train first')
  if CHAT.value:
    return _chat_of_run(workdir, experiment, how)
  from deltanet_jax.infer import generate

  return generate.continue_text(workdir, experiment, PROMPT.value, **how)


def _chat_of_run(workdir, experiment, how):
  if not workdir.start.is_file():
    raise ConfigError(
      f'--chat: {workdir.path} did not begin with released weights and has no'
      ' chat template; leave it out'
    )
  from deltanet_jax.hf import text
  from deltanet_jax.infer import generate
  from deltanet_jax.model import HybridLM

  def load():
    params = generate.load_params(workdir, experiment.model)
    return HybridLM(experiment.model), params

  return text.continue_text(
    workdir.text, PROMPT.value, chat=True, load=load, **how
  )


def _of_released(how):
  from deltanet_jax.hf import hub
  from deltanet_jax.runs import start

  folder = hub.find(RELEASED.value)
  if start.is_run(folder):
    raise ConfigError(f'{folder} is a training run; give it as --workdir')
  from deltanet_jax.hf import text

  return text.continue_text(folder, PROMPT.value, chat=CHAT.value, **how)


def _show(parts):
  from deltanet_jax.runs.checkpoint import CheckpointError

  try:
    shown = False
    for part in parts:
      if not shown:  # nothing before the model is read: it may be refused
        sys.stdout.write(PROMPT.value + ('\n' if CHAT.value else ''))
        shown = True
      sys.stdout.write(part)
      sys.stdout.flush()
  except CheckpointError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print()
  return 0


if __name__ == '__main__':
  main()
