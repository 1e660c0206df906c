"""Continues a text with a trained or released model.

  python -m launch.generate --workdir=runs/first --prompt='def main(' \\
    --max_tokens=200 --temperature=0.8

  python -m launch.generate --released=Qwen3-0.6B --chat --prompt='Why?'

--released is a folder of released weights with its tokenizer.json, the output
of launch.convert, or ORG/NAME on the Hugging Face hub. With --chat the prompt
is a user's message in the model's chat template; a run that was started from a
release keeps its template.

The text is printed as it is sampled. It ends after --max_tokens, or at the
model's end-of-document token.
"""

import sys

from absl import flags

from deltanet_jax.cli import command, model_flags
from deltanet_jax.config.sampling import SEEDS, Sampling
from deltanet_jax.data.tokenizer import require_utf8

flags.adopt_module_key_flags(model_flags)

CHAT = flags.DEFINE_bool(
  'chat', False, "Put the prompt into the model's chat template."
)
PROMPT = flags.DEFINE_string('prompt', '', 'Text to continue.')
MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 200, 'Most tokens to sample.', lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'Of the softmax. 0: always the most likely token.'
)
TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Sample from the K most likely tokens. 0: from all.'
)
TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Sample from the most likely tokens that sum to this.'
)
SEED = flags.DEFINE_integer(
  'seed', 0, 'Seed of the sampling.',
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
      if not shown:  # only after the model is loaded, which may fail
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
