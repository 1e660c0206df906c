"""Tokenizers: bytes, or a `tokenizer.json`."""

import functools
import os
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.data import chat_template
from deltanet_jax.data.files import Document
from deltanet_jax.data.token_files import FLAGS, TokenFiles
from deltanet_jax.progress import Progress

# end-of-document tokens of common tokenizers
EOD_NAMES = '<|endoftext|> <|end_of_text|> </s> <eos> <|eos|> [EOS]'.split()
SLICE_BYTES = 8 << 20  # bytes tokenized at once


def load_tokenizer(name: str) -> 'Tokenizer':
  """`ByteTokenizer` for 'bytes', else the `FileTokenizer` of that file.

  Raises:
    ConfigError: no such file, no tokenizer in it, or no end-of-document token.
  """
  if name != 'bytes' and not os.path.isfile(name):
    raise ConfigError(
      f"data.tokenizer={name!r}: no such file; give 'bytes' or the path of a"
      ' tokenizer.json'
    )
  tokenizer = open_tokenizer(name)
  _ = tokenizer.eod  # raises if there is none
  return tokenizer


def open_tokenizer(name: str) -> 'Tokenizer':
  """As `load_tokenizer`, but the end-of-document token may be missing."""
  return ByteTokenizer() if name == 'bytes' else FileTokenizer(name)


def require_utf8(text: str, what: str) -> None:
  """Raises ConfigError for a str that is not valid text: a byte of a command
  line that is not UTF-8, or a lone surrogate."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    code = ord(text[error.start])
    culprit = f'U+{code:04X}'
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
      culprit = f'the byte {code - 0xDC00:#x}'
    raise ConfigError(
      f'{what} is not UTF-8 text: {culprit} at character {error.start + 1}'
    ) from error


class ByteTokenizer:
  """The 256 bytes, and `eod` = 256, end-of-document."""

  vocab_size = 257
  eod = 256
  ends: frozenset[int] = frozenset()
  altered = (0, 0)

  def encode(self, text: str) -> np.ndarray:
    """int32 [T]: the UTF-8 bytes of `text`."""
    require_utf8(text, 'the text')
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_prompt(self, text: str, special: bool = True) -> list[int]:
    """The ids of a prompt: its bytes."""
    del special
    return self.encode(text).tolist()

  def format_chat(self, message: str) -> str:
    """Raises ConfigError: there is no chat template."""
    del message
    raise ConfigError('a model of bytes has no chat template; leave --chat out')

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids` without `eod`; invalid UTF-8 becomes U+FFFD."""
    content = bytes(i for i in np.asarray(ids).tolist() if i != self.eod)
    return content.decode(errors='replace')

  def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
    """The ids (unsigned integers) of every document."""
    return [np.frombuffer(d.content, np.uint8) for d in documents]


class FileTokenizer:
  """A `tokenizer.json` of the `tokenizers` library, with the files beside it.

  Documents are encoded as plain text: names of special tokens in them are
  ordinary text. In a prompt they are the special tokens.

  Attributes:
    vocab_size: one more than the largest id
    altered: (documents, bytes) of the last `encode_documents` whose ids decode
      to another text

  Raises:
    ConfigError: no such file, or no tokenizer in it.
  """

  def __init__(self, path: str | os.PathLike[str]):
    import tokenizers

    self._path = str(path)
    if not os.path.isfile(path):
      raise ConfigError(f'{path}: no such file; copy it from the release')
    self._tokenizer = _guarded(
      f'{path} holds no tokenizer', tokenizers.Tokenizer.from_file, self._path
    )
    # no truncation and padding, whatever was saved
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._folder = os.path.dirname(self._path) or '.'
    self._files = TokenFiles(self._folder)
    self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
    if self.vocab_size > 1 << 31:
      raise ConfigError(
        f'{path}: a token has the id {self.vocab_size - 1}; ids have 31 bits'
      )
    self._add(tokenizers.AddedToken)
    self.altered = (0, 0)

  def _add(self, make):
    """Adds special and other tokens that only the files beside declare; ids and
    entries of tokenizer.json stay."""
    added = self._tokenizer.get_added_tokens_decoder().values()
    tokens = {token.content: token for token in added}
    for fields in self._files.added:
      name, special = fields['content'], fields.get('special', False)
      if name not in self._vocabulary:
        continue
      if name not in tokens:
        token = make(**({'normalized': not special} | fields))
      elif special and not tokens[name].special:
        flags = {flag: getattr(tokens[name], flag) for flag in FLAGS}
        token = make(name, special=True, **flags)
      else:
        continue
      self._tokenizer.add_tokens([token])
      tokens[name] = token

  def _call(self, name, *args, **kwargs):
    """Calls a method of the library, which finds some faults of a file late."""
    what = f'{self._path}: it cannot {name}'
    return _guarded(what, getattr(self._tokenizer, name), *args, **kwargs)

  @functools.cached_property
  def eod(self) -> int:
    """The id of end-of-document: the eos_token that the files declare, else the
    special token of one of EOD_NAMES.

    Raises:
      ConfigError: there is none.
    """
    if 'eos_token' in self._files.named:
      return self._id('eos_token')
    # an ordinary token of that name may occur in texts
    added = self._tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    for name in EOD_NAMES:
      if name in special:
        return self._vocabulary[name]
    raise ConfigError(
      f'{self._path}: no end-of-document token; add one of'
      f' {" ".join(EOD_NAMES)} as a special token, or declare an eos_token in a'
      ' tokenizer_config.json beside it'
    )

  def _id(self, role):
    name = self._files.named[role]
    if name not in self._vocabulary:
      raise ConfigError(
        f'{self._path} has no token {name!r}, which the files beside it declare'
        f' as {role}; copy all of them from one release'
      )
    return self._vocabulary[name]

  @functools.cached_property
  def ends(self) -> set[int]:
    """The ids that end a text, by the files of the model."""
    return self._files.find_ends()

  @functools.cached_property
  def _affixes(self) -> tuple[bool, list[int], list[int]]:
    """(own, ids before a prompt, ids after it), see `TokenFiles`."""
    own, bos, eos = self._files.find_affixes()
    for role, wanted in (('bos_token', bos), ('eos_token', eos)):
      if wanted and role not in self._files.named:
        raise ConfigError(
          f'{self._folder}/tokenizer_config.json: add_{role} is'
          f' true and there is no {role}; declare it, or remove add_{role}'
        )
    before = [self._id('bos_token')] if bos else []
    after = [self._id('eos_token')] if eos else []
    if own and before:
      already = self._call('encode', '', add_special_tokens=True).ids
      before = [i for i in before if i not in already]
    return own, before, after

  def encode_prompt(self, text: str, special: bool = True) -> list[int]:
    """The ids of a prompt.

    special: with the tokens that the tokenizer puts before and after a prompt;
    a chat template writes them itself

    Raises:
      ConfigError: it is not valid text, or its first token is unknown.
    """
    require_utf8(text, 'the prompt')
    self._tokenizer.encode_special_tokens = False
    if not special:
      return self._call('encode', text, add_special_tokens=False).ids
    own, before, after = self._affixes
    ids = self._call('encode', text, add_special_tokens=own).ids
    return [*before, *ids, *after]

  def format_chat(self, message: str) -> str:
    """A user's message in the chat template of the model.

    Raises:
      ConfigError: there is no template, or it refuses the message or fails.
    """
    template = self._files.find_template()
    if template is None:
      raise ConfigError(
        f'{self._folder}: no chat template; leave --chat out, or'
        ' add a chat_template.jinja'
      )
    return chat_template.render_template(*template, message, self._files.named)

  def encode(self, text: str) -> np.ndarray:
    """int32 [T]: the ids of plain text, without special tokens."""
    require_utf8(text, 'the text')
    return np.array(self._plain([text])[0], np.int32)

  def _plain(self, texts):
    self._tokenizer.encode_special_tokens = True
    encodings = self._call('encode_batch', texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids`, without special tokens."""
    return self._call('decode', np.asarray(ids, np.int64).tolist())

  def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
    """The ids (int32) of every document. Warns on stderr of documents whose ids
    decode to another text, see `find_difference`.

    Raises:
      ConfigError: a document is not UTF-8, or contains `eod`.
    """
    total = sum(len(d.content) for d in documents)
    progress = Progress('tokenized', total, 'MB', 10**6)
    arrays: list[np.ndarray] = []
    altered: list[Document] = []
    example = ''
    for batch in _slices(documents):
      for document, ids, difference in self._encode(batch):
        arrays.append(ids)
        if difference:
          altered.append(document)
          example = example or f'{document.source}: {difference}'
      if total > SLICE_BYTES:
        progress.add(sum(len(d.content) for d in batch))
    if total > SLICE_BYTES:
      progress.end()
    lost = sum(len(d.content) for d in altered)
    self.altered = len(altered), lost
    if altered:
      print(
        f'warning: {self._path}: {len(altered)} of {len(documents)} documents'
        f' ({lost} of {total} bytes) are altered by the tokenizer ({example});'
        ' bits per byte do not count what is lost',
        file=sys.stderr,
      )
    return arrays

  def _encode(self, documents):
    """Yields (document, ids, how their text differs)."""
    texts = [_decode(document) for document in documents]
    ids = self._plain(texts)
    decoded = self._call('decode_batch', ids, skip_special_tokens=False)
    for row in zip(documents, texts, ids, decoded, strict=True):
      document, text, own, again = row
      if self.eod in own:
        name = self._tokenizer.id_to_token(self.eod)
        raise ConfigError(
          f'{document.source}: its text contains {name!r}, the end-of-document'
          f' token of {self._path}; exclude it, or declare an eos_token that no'
          ' text contains'
        )
      yield document, np.array(own, np.int32), find_difference(text, again)


def _guarded(what, function, *args, **kwargs):
  """Calls a function of the library; its errors become a ConfigError."""
  try:
    return function(*args, **kwargs)
  except BaseException as error:
    # it raises plain Exception, or a PanicException that is no Exception
    panic = type(error).__name__ == 'PanicException'
    if not (panic or isinstance(error, Exception)):
      raise
    text = ' '.join(str(error).split())
    raise ConfigError(f'{what}: {text}') from error


Tokenizer = ByteTokenizer | FileTokenizer


def find_difference(text: str, again: str) -> str:
  """Where a text and the decoded text of its ids differ, or ''.

  Canonically equal characters (NFC) count as equal, and white space at either
  end is ignored, as decoders may change it. Anything else, such as an unknown
  character, the case of a letter or a line break, is lost: bytes of a document
  that no token predicts.
  """
  if text == again:
    return ''
  text, again = (unicodedata.normalize('NFC', x).strip() for x in (text, again))
  if text == again:
    return ''
  at = len(os.path.commonprefix([text, again]))
  return f'{ascii(text[at : at + 8])} became {ascii(again[at : at + 8])}'


def _slices(documents):
  """Yields lists of documents of about SLICE_BYTES."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.content)
    if size >= SLICE_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _decode(document):
  try:
    return document.content.decode()
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{document.source}: not UTF-8 text (byte {error.start}); exclude it by a'
      " '!' glob in data.path, or use data.tokenizer=bytes"
    ) from error
