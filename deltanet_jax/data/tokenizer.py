"""Which ids stand for a text? Bytes, or a `tokenizer.json`."""

import json
import os
import sys

import numpy as np

from deltanet_jax.config import ConfigError

# how the common tokenizers name the token between two documents
EOD_NAMES = (
  '<|endoftext|>',
  '<|end_of_text|>',
  '</s>',
  '<eos>',
  '<|eos|>',
  '[EOS]',
)
SLICE_BYTES = 8 << 20  # tokenised between two progress lines


def load(name):
  """`ByteTokenizer` for 'bytes', else the `FileTokenizer` of that file."""
  return ByteTokenizer() if name == 'bytes' else FileTokenizer(name)


class ByteTokenizer:
  """The 256 bytes, and `eod` = 256 between documents."""

  vocab_size = 257
  eod = 256

  def encode(self, text):
    """int32 [T]: the UTF-8 bytes of `text`."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids):
    """The text of `ids`, without `eod`; broken UTF-8 becomes U+FFFD."""
    content = bytes(i for i in np.asarray(ids).tolist() if i != self.eod)
    return content.decode(errors='replace')

  def encode_documents(self, documents):
    """A list with the ids (unsigned, any width) of every `Document`."""
    return [np.frombuffer(d.content, np.uint8) for d in documents]


class FileTokenizer:
  """A `tokenizer.json` of the `tokenizers` library.

  `eod` is its own end-of-text token, one of EOD_NAMES, or the eos_token of a
  tokenizer_config.json beside it. The names of special tokens inside a text are
  encoded as the plain text that they are there.

  Raises:
    ConfigError: no such file, no tokenizer in it, or no end-of-text token.
  """

  def __init__(self, path):
    import tokenizers

    if not os.path.isfile(path):
      raise ConfigError(
        f"data.tokenizer={path!r}: no such file; give 'bytes' or the path of a"
        ' tokenizer.json'
      )
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
      raise ConfigError(
        f'data.tokenizer={path!r}: no tokenizer.json: {error}'
      ) from error
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    names = (*EOD_NAMES, _eos_token(path))
    found = [vocabulary[name] for name in names if name in vocabulary]
    if not found:
      raise ConfigError(
        f'data.tokenizer={path!r}: no end-of-text token; add one of'
        f' {" ".join(EOD_NAMES)}, or name its own as eos_token in a'
        ' tokenizer_config.json beside it'
      )
    self.eod = found[0]
    self.vocab_size = max(vocabulary.values()) + 1

  def encode(self, text):
    """int32 [T]: the ids of `text`, no special token added."""
    found = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(found.ids, np.int32)

  def decode(self, ids):
    """The text of `ids`, without special tokens."""
    return self._tokenizer.decode(np.asarray(ids).tolist())

  def encode_documents(self, documents):
    """A list with the ids (int32) of every `Document`.

    Raises:
      ConfigError: a document that is not UTF-8.
    """
    total = sum(len(d.content) for d in documents)
    arrays, batch, size, done = [], [], 0, 0
    for i, document in enumerate(documents):
      batch.append(_decode(document))
      size += len(document.content)
      if size < SLICE_BYTES and i + 1 < len(documents):
        continue
      found = self._tokenizer.encode_batch(batch, add_special_tokens=False)
      arrays += [np.array(f.ids, np.int32) for f in found]
      done += size
      batch, size = [], 0
      if total > SLICE_BYTES:
        end = '\n' if done == total else ''
        text = f'\rtokenised {done >> 20} of {total >> 20} MiB'
        print(text, end=end, file=sys.stderr, flush=True)
    return arrays


def _eos_token(path):
  """The eos_token that a tokenizer_config.json beside `path` names, or None."""
  beside = os.path.join(os.path.dirname(path), 'tokenizer_config.json')
  try:
    with open(beside) as file:
      found = json.load(file).get('eos_token')
  except (OSError, ValueError, AttributeError):
    return None
  return found.get('content') if isinstance(found, dict) else found


def _decode(document):
  try:
    return document.content.decode()
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{document.source}: no UTF-8 text (byte {error.start}); exclude the file'
      " by a '!' glob in data.path, or use data.tokenizer=bytes"
    ) from error
