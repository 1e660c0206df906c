"""Text with a released model: its tokenizer, chat template and end tokens."""

import json
import pathlib

import jax
import jax.numpy as jnp

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.infer import generate


class Text:
  """tokenizer.json, chat template and end tokens of a released folder.

  Raises:
    ConfigError: no tokenizer.json that can be read.
  """

  def __init__(self, folder):
    import tokenizers

    self._folder = pathlib.Path(folder)
    path = self._folder / 'tokenizer.json'
    if not path.is_file():
      raise ConfigError(f'{path}: no such file; copy it from the release')
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
      raise ConfigError(f'{path}: no tokenizer.json: {error}') from error
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self.ends = self._ends()

  def _settings(self, name):
    path = self._folder / name
    if not path.is_file():
      return {}
    try:
      return json.loads(path.read_text())
    except ValueError as error:
      raise ConfigError(f'{path}: {error}') from error

  def _ends(self):
    """Ids that end a text."""
    for name in ('generation_config.json', 'config.json'):
      found = self._settings(name).get('eos_token_id')
      if found is not None:
        return set(found) if isinstance(found, list) else {found}
    return set()

  def encode(self, text, special=True):
    """Ids; special tokens' names in the text are those tokens. With `special`
    the tokenizer adds those of its own that begin a text."""
    return self._tokenizer.encode(text, add_special_tokens=special).ids

  def decode(self, ids):
    """The text of ids, without special tokens."""
    return self._tokenizer.decode(ids)

  def chat(self, message):
    """A user's message as the model's chat template puts it.

    Raises:
      ConfigError: the folder has no template, or it refuses the message.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = self._settings('tokenizer_config.json')
    path = self._folder / 'chat_template.jinja'
    template = settings.get('chat_template')
    if path.is_file():
      template = path.read_text()
    if not isinstance(template, str):
      raise ConfigError(
        f'{self._folder}: no chat template; leave --chat out, or add a'
        ' chat_template.jinja'
      )
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.globals['raise_exception'] = _refuse
    special = {
      name: _content(settings[name])
      for name in ('bos_token', 'eos_token')
      if settings.get(name)
    }
    try:
      return environment.from_string(template).render(
        messages=[{'role': 'user', 'content': message}],
        add_generation_prompt=True,
        **special,
      )
    except TemplateError as error:
      raise ConfigError(f'{self._folder}: chat template: {error}') from error


def _refuse(message):
  from jinja2 import TemplateError

  raise TemplateError(message)


def _content(token):
  return token['content'] if isinstance(token, dict) else token


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
  """
  text = Text(folder)
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
  stream = generate.TextStream(text.decode)
  tokens = generate.generate(
    params,
    model.cfg,
    ids,
    max_tokens=max_tokens,
    sampling=sampling,
    key=jax.random.key(seed),
    dtype=dtype,
    vocab=min(text.vocab_size, model.cfg.vocab),
  )
  for token in tokens:
    if token in text.ends:
      break
    yield stream.push(token)
  yield stream.close()
