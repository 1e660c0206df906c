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

from deltanet_jax.cli import command, model_flags
from deltanet_jax.config.sampling import SEEDS, Sampling
from deltanet_jax.data.tokenizer import require_utf8

flags.adopt_module_key_flags(model_flags)

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
  'seed', 0, 'Another seed, another text.',
  lower_bound=SEEDS[0], upper_bound=SEEDS[-1],
)  # fmt: skip


@command.as_main()
def main(_: None) -> int:
  """The command."""
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  with command.bad_input():
    sampling.check()
  require_utf8(PROMPT.value, '--prompt')
  source = model_flags.open_source()
  source.check()
  from deltanet_jax.infer import text

  parts = text.continue_text(
    source, PROMPT.value, chat=CHAT.value, max_tokens=MAX_TOKENS.value,
    sampling=sampling, seed=SEED.value,
  )  # fmt: skip
  return _show(parts)


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
