r"""Measures how well a trained or released model predicts a text.

  python -m launch.evaluate --workdir=runs/first --data='texts/**/*.txt'

  python -m launch.evaluate --released=Qwen3-0.6B --data=texts.jsonl \
    --seq_len=4096 --output=score.json

Prints bits per byte, perplexity and loss (nats per token) over the whole text,
as JSON. Documents are packed into rows as in training: a token is predicted
from the tokens before it in the same document and row, the first token of a
document from an end-of-document token. Bits per byte is the loss summed over
all tokens, end-of-document tokens included, per byte of the documents.

Some tokenizers alter a text (unknown characters, capital letters, white space).
Bits per byte does not count what is lost; a line on stderr and
altered_documents and altered_bytes in the JSON say how much text is affected.

--data holds globs separated by commas; '!' before one excludes. Files may be
plain text, .jsonl or .parquet. --released is a released folder, the output of
launch.convert, or ORG/NAME on the Hugging Face hub. With --devices=N weights
and rows are sharded over N devices.

--repeats=4,16 also prints the loss of tokens that complete a repetition: the
last 4 (or 16) tokens stood in the same document before. A table on stderr and
"repeats" in the JSON give it by distance to that earlier place, beside the loss
of all other tokens. It shows what a state of fixed size forgets.
"""

import contextlib
import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command, model_flags
from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import format_json, write_text

flags.adopt_module_key_flags(model_flags)

DATA = flags.DEFINE_string(
  'data', None, 'Globs of the text files, separated by commas.'
)
FIELD = flags.DEFINE_string(
  'field', 'text', 'Field or column of the text in .jsonl and .parquet files.'
)
SEQ_LEN = flags.DEFINE_integer(
  'seq_len',
  None,
  'Tokens per row. Default: that of the run, else 2048.',
  lower_bound=1,
)
BATCH = flags.DEFINE_integer('batch', 1, 'Rows per device.', lower_bound=1)
DTYPE = flags.DEFINE_enum(
  'dtype',
  'bfloat16',
  ['bfloat16', 'float32'],
  'dtype of the computation.',
)
DEVICES = flags.DEFINE_integer('devices', 1, 'Devices to use.', lower_bound=1)
REPEATS = flags.DEFINE_list(
  'repeats', [], 'Lengths of repetitions, such as 4,16. Default: no table.'
)
OUTPUT = flags.DEFINE_string('output', None, 'File to write the JSON to.')


@command.as_main()
def main(_: None) -> int:
  """The command."""
  if DATA.value is None:
    raise ConfigError("no --data=GLOB given, such as --data='texts/**/*.txt'")
  bad = [n for n in REPEATS.value if not n.isdecimal() or int(n) < 1]
  if bad:
    raise ConfigError(
      f'--repeats has {bad[0]!r}; give lengths of 1 or more, such as 4,16'
    )
  output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
  if output and not output.parent.is_dir():
    raise ConfigError(f'--output={output}: no folder {output.parent}')
  source = model_flags.open_source()
  source.require_tokenizer()
  result = _score(source, SEQ_LEN.value or source.seq_len)
  if isinstance(result, int):
    return result
  text = format_json(result).rstrip('\n')
  if output:
    write_text(output, text + '\n')
  print(text)
  return 0


def _score(source, seq_len):
  from deltanet_jax.data import files
  from deltanet_jax.data.tokenizer import load_tokenizer

  with _named_as_flags():
    documents = list(
      files.read_documents(files.find_files(DATA.value), FIELD.value)
    )
  if not documents:
    raise ConfigError(f'--data={DATA.value}: its files hold no text')
  tokenizer = load_tokenizer(source.tokenizer)
  if tokenizer.vocab_size > source.model.vocab:
    raise ConfigError(
      f'{source.tokenizer} has {tokenizer.vocab_size} ids and the model'
      f' {source.model.vocab}; give the tokenizer of this model'
    )
  source.check()
  import jax.numpy as jnp

  from deltanet_jax.config.experiment import MeshConfig
  from deltanet_jax.parallel import sharding
  from deltanet_jax.runs.checkpoint import CheckpointError

  try:
    mesh = sharding.make_mesh(MeshConfig(fsdp=DEVICES.value))
    params = source.load(mesh, jnp.dtype(DTYPE.value))
  except CheckpointError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except ValueError as error:
    raise ConfigError(str(error)) from error
  scored = source.model, params, documents, tokenizer
  settings = {
    'dtype': DTYPE.value,
    'mesh': mesh,
    'seq_len': seq_len,
    'batch': BATCH.value * DEVICES.value,
  }
  with _named_as_flags():
    score, repeats = _evaluate(scored, settings)
  size = sum(len(document.content) for document in documents)
  return {
    'model': source.name,
    'bits_per_byte': score.bits_per_byte(size),
    'perplexity': score.perplexity,
    'loss': score.loss,
    'tokens': score.tokens,
    'bytes': size,
    'documents': len(documents),
    'altered_documents': tokenizer.altered[0],
    'altered_bytes': tokenizer.altered[1],
    'seq_len': seq_len,
    'dtype': DTYPE.value,
    **repeats,
  }


def _evaluate(scored, settings):
  """(Score, entries that --repeats adds to the JSON)."""
  from deltanet_jax.evals import perplexity, repeats

  if not REPEATS.value:
    return perplexity.score_documents(*scored, **settings), {}
  lengths = sorted({int(n) for n in REPEATS.value})
  score, shares = repeats.score_documents(*scored, lengths, **settings)
  print(repeats.format_shares(shares), file=sys.stderr)
  return score, {'repeats': [share._asdict() for share in shares]}


@contextlib.contextmanager
def _named_as_flags():
  """Renames configuration fields in an error to the flags of this command."""
  try:
    yield
  except ConfigError as error:
    text = str(error).replace('data.path', '--data')
    raise ConfigError(text.replace('data.field', '--field')) from error


if __name__ == '__main__':
  main()
