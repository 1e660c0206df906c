"""Continues a text with a model."""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from deltanet_jax.config import ConfigError
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.data.tokenizer import Tokenizer, open_tokenizer
from deltanet_jax.infer.generate import generate
from deltanet_jax.infer.sampling import make_key
from deltanet_jax.runs.source import Source


def continue_text(
  source: Source,
  prompt: str,
  *,
  max_tokens: int,
  sampling: Sampling,
  seed: int,
  chat: bool = False,
) -> Iterator[str]:
  """Yields the continuation of `prompt` in pieces.

  Ends after `max_tokens` tokens, or before an end token: those that the files
  of the tokenizer name and, of a model trained by a run, end-of-document. Such
  a model sees the prompt as the start of a document, a released one as its
  tokenizer encodes prompts. With `chat` the prompt is a user's message in the
  chat template.

  Raises:
    ConfigError: the folder is incomplete, or the prompt has no token.
    ValueError: the seed is out of range.
    CheckpointError: no checkpoint of a run can be read.
  """
  key = make_key(seed)
  source.require_tokenizer()
  tokenizer = open_tokenizer(source.tokenizer)
  ids = encode_prompt(source, tokenizer, prompt, chat)
  ends = set(tokenizer.ends)
  if not ids:
    raise ConfigError('the prompt has no token; give --prompt')
  if source.trained and not chat:
    ends.add(tokenizer.eod)
  if max(ids) >= source.model.vocab:
    raise ConfigError(
      f'{source.tokenizer} gives the id {max(ids)} and the model has'
      f' {source.model.vocab}; give the tokenizer of this model'
    )
  dtype = jnp.dtype(source.dtype)
  # an answer starts a text, a continuation does not
  stream = TextStream(tokenizer.decode, [] if chat else ids)
  tokens = generate(
    source.load(dtype=dtype),
    source.model,
    ids,
    max_tokens=max_tokens,
    sampling=sampling,
    key=key,
    dtype=dtype,
    vocab=min(tokenizer.vocab_size, source.model.vocab),
  )
  for token in tokens:
    if token in ends:
      break
    yield stream.push(token)
  yield stream.close()


def encode_prompt(
  source: Source, tokenizer: Tokenizer, prompt: str, chat: bool
) -> list[int]:
  """The ids of a prompt."""
  if chat:  # the template contains the special tokens
    return tokenizer.encode_prompt(tokenizer.format_chat(prompt), special=False)
  if source.trained:
    # in training a document follows an end-of-document token
    return [tokenizer.eod, *tokenizer.encode(prompt).tolist()]
  return tokenizer.encode_prompt(prompt)


class TextStream:
  """Decodes a stream of token ids into text of whole characters.

  Ids are decoded together with those `before`, as a decoder may drop the space
  before the first word of a text. A trailing U+FFFD may be an incomplete
  character and is held back until the next id.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], before: Sequence[int] = ()
  ):
    self._decode = decode
    self._ids = _last_word(decode, list(before))
    self._shown = len(decode(self._ids))

  def push(self, token: int) -> str:
    """The text that `token` completes, possibly empty."""
    self._ids.append(token)
    return self._new(self._decode(self._ids).rstrip('\ufffd'))

  def close(self) -> str:
    """The text that was held back."""
    return self._new(self._decode(self._ids))

  def _new(self, text):
    new = text[self._shown :]
    self._shown = max(self._shown, len(text))
    return new


def _last_word(decode, ids):
  """The last ids that decode to the end of the text of all, so that a long
  prompt is not decoded with every token."""
  whole, count = decode(ids), 8
  while count < len(ids):
    last = decode(ids[-count:])
    if last.strip() and whole.endswith(last) and '\ufffd' not in last:
      return ids[-count:]
    count *= 4
  return ids
