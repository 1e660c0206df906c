"""Text that a model adds to a prompt."""

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
  """Yields the text that a model adds to `prompt`, in pieces.

  It ends after `max_tokens` tokens, or before one that ends a text: by the
  files of the tokenizer, and in a run, the end of a document. To a model that a
  run trained the prompt is the beginning of a document, to a released one what
  its tokenizer makes of a prompt. With `chat` it is a user's message, put into
  the chat template.

  Raises:
    ConfigError: the folder lacks something, or the prompt has no token.
    ValueError: the seed is none.
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
      f' {source.model.vocab}; it is that of another model'
    )
  dtype = jnp.dtype(source.dtype)
  # an answer is a text of its own; what continues a prompt is not
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
  """The ids that a model is given of a prompt."""
  if chat:  # the template has the special tokens
    return tokenizer.encode_prompt(tokenizer.format_chat(prompt), special=False)
  if source.trained:
    # a document is trained on from the end of the one before
    return [tokenizer.eod, *tokenizer.encode(prompt).tolist()]
  return tokenizer.encode_prompt(prompt)


class TextStream:
  """Token ids in, text out, whole characters only.

  The pieces are what the ids add to the text of those `before`: a decoder may
  take the space off the first word of a text, and off no other. A trailing
  U+FFFD may be a character whose other bytes are yet to come: it is held back
  until the next id shows.
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
    """What was held back."""
    return self._new(self._decode(self._ids))

  def _new(self, text):
    new = text[self._shown :]
    self._shown = max(self._shown, len(text))
    return new


def _last_word(decode, ids):
  """As many of the last ids as decode to the end of what all do, so that a long
  prompt is not decoded with every token: some text in whole characters."""
  whole, count = decode(ids), 8
  while count < len(ids):
    last = decode(ids[-count:])
    if last.strip() and whole.endswith(last) and '\ufffd' not in last:
      return ids[-count:]
    count *= 4
  return ids
