"""Text with a released model: its tokenizer, chat template and end tokens."""

import pathlib

import jax.numpy as jnp

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.data.tokenizer import FileTokenizer
from deltanet_jax.infer import generate
from deltanet_jax.infer.sampling import seeded


class Text(FileTokenizer):
  """The tokenizer of a released folder. A text to encode is a prompt."""

  def __init__(self, folder):
    super().__init__(pathlib.Path(folder) / 'tokenizer.json')

  encode = FileTokenizer.prompt


def continue_text(
  folder,
  prompt,
  *,
  chat,
  max_tokens,
  sampling,
  seed,
  dtype=jnp.bfloat16,
  load=None,
):
  """Yields the text that a released model adds to `prompt`, in pieces.

  With `chat` the prompt is a user's message, put into the chat template. It
  ends after `max_tokens` tokens or before one that ends a text. `load` gives
  (model, params) where they are not the folder's own.

  Raises:
    ConfigError: the folder lacks something, or the prompt has no token.
    ValueError: the seed is none.
  """
  key = seeded(seed)
  text = Text(folder)
  ends = text.ends
  if chat:
    ids = text.encode(text.chat(prompt), special=False)  # the template has them
  else:
    ids = text.encode(prompt)
  if not ids:
    raise ConfigError('the prompt has no token; give --prompt')
  model, params = load() if load else hf.load(folder, dtype=dtype)
  if max(ids) >= model.cfg.vocab:
    raise ConfigError(
      f'{folder}: its tokenizer.json gives the id {max(ids)} and the model has'
      f' {model.cfg.vocab}; it is that of another model'
    )
  # an answer is a text of its own; what continues a prompt is not
  stream = generate.TextStream(text.decode, [] if chat else ids)
  tokens = generate.generate(
    params,
    model.cfg,
    ids,
    max_tokens=max_tokens,
    sampling=sampling,
    key=key,
    dtype=dtype,
    vocab=min(text.vocab_size, model.cfg.vocab),
  )
  for token in tokens:
    if token in ends:
      break
    yield stream.push(token)
  yield stream.close()
