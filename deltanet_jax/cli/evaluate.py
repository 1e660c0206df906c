r"""Scores text with the model of a training run, or a released one.

  python -m launch.evaluate --workdir=runs/first --data='texts/**/*.txt'

  python -m launch.evaluate --released=Qwen3-0.6B --data=texts.jsonl \
    --seq_len=4096 --output=score.json

Prints, as JSON, bits per byte, perplexity and loss (nats per token) of all the
text. Documents are packed into rows as in training: a token is predicted from
those before it in its document and row, the first of a document from the end
of another one. Bits per byte counts the end of every document in the sum, and
the bytes of the documents alone. Where a tokenizer cannot spell a document (an
unknown character, no capital letters, white space made one), bits per byte
leaves out what that costs: a line says how much text it is, and the JSON as
altered_documents and altered_bytes.

--data is globs separated by commas, '!' before one excludes: plain text, .jsonl
and .parquet. --released is a folder, what launch.convert made of one, or
ORG/NAME on the Hugging Face hub. With --devices the weights and rows are laid
over so many.

--repeats=4,16 also tells what tokens cost that end 4 or 16 tokens which stood
in their document before, by how far back, and what new ones do: where a memory
of fixed size shows, whatever the loss over all tokens (the table on stderr).
"""

import contextlib
import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command, model_flags
from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import format_json, write_text

flags.adopt_module_key_flags(model_flags)

DATA = flags.DEFINE_string('data', None, 'Globs of the text, with commas.')
FIELD = flags.DEFINE_string(
  'field', 'text', "The text's field in .jsonl and .parquet files."
)
SEQ_LEN = flags.DEFINE_integer(
  'seq_len', None, "Tokens of a row; a run's own, or 2048.", lower_bound=1
)
BATCH = flags.DEFINE_integer('batch', 1, 'Rows on a device.', lower_bound=1)
DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the computation.'
)
DEVICES = flags.DEFINE_integer('devices', 1, 'How many to use.', lower_bound=1)
REPEATS = flags.DEFINE_list(
  'repeats', [], 'Lengths of repeats to tell apart, as 4,16; none: no table.'
)
OUTPUT = flags.DEFINE_string('output', None, 'File to keep the JSON in.')


@command.as_main()
def main(_: None) -> int:
  """The command."""
  if DATA.value is None:
    raise ConfigError("no --data=GLOB given, as in --data='texts/**/*.txt'")
  bad = [n for n in REPEATS.value if not n.isdecimal() or int(n) < 1]
  if bad:
    raise ConfigError(f'--repeats has {bad[0]!r}; give lengths from 1, as 4,16')
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
      f' {source.model.vocab}; it is the tokenizer of another model'
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
  """(Score, the part of the result that --repeats asks for)."""
  from deltanet_jax.evals import perplexity, repeats

  if not REPEATS.value:
    return perplexity.score_documents(*scored, **settings), {}
  lengths = sorted({int(n) for n in REPEATS.value})
  score, shares = repeats.score_documents(*scored, lengths, **settings)
  print(repeats.format_shares(shares), file=sys.stderr)
  return score, {'repeats': [share._asdict() for share in shares]}


@contextlib.contextmanager
def _named_as_flags():
  """What reads text knows the names of a configuration."""
  try:
    yield
  except ConfigError as error:
    text = str(error).replace('data.path', '--data')
    raise ConfigError(text.replace('data.field', '--field')) from error


if __name__ == '__main__':
  main()
