"""Reads the files beside a tokenizer.json.

Any of them may be missing. A value of the wrong kind is a `ConfigError` of one
line with file, key and value.
"""

import json
import os

from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import JsonObject

NAMED = [f'{x}_token' for x in 'bos eos unk sep pad cls mask'.split()]
# several tokens: a list, or an object with the names that templates use
LISTS = (
  'model_specific_special_tokens',
  'additional_special_tokens',
  'extra_special_tokens',
)
TokenFields = dict[str, str | bool]  # content, special and FLAGS, if given
FLAGS = ('lstrip', 'rstrip', 'single_word', 'normalized')
# classes that obey add_bos_token whatever tokenizer.json says, and its default
# in them (transformers 4.57)
BOS_CLASSES = {
  'LlamaTokenizer': True,
  'CodeLlamaTokenizer': True,
  'GemmaTokenizer': True,
  'CohereTokenizer': True,
  'GPTNeoXTokenizer': False,
}


class TokenFiles:
  """The files in the folder of a tokenizer.

  Attributes:
    named: {'bos_token': '<s>', ...}: special tokens with a role, and those of
      the model, such as image_token
    added: fields (content, special, FLAGS) of all tokens that are matched
      before a text is tokenized
  """

  def __init__(self, folder: str):
    self._folder = folder
    self._config_path = os.path.join(folder, 'tokenizer_config.json')
    self._config = read_json(self._config_path)
    self.named: dict[str, str] = {}
    self.added: list[TokenFields] = []
    for name, fields in self._tokens():
      self.added.append(fields)
      if name is not None:
        self.named[name] = fields['content']

  def _tokens(self):
    """Yields (name or None, fields) of all declared tokens; the last one of a
    name counts."""
    path = os.path.join(self._folder, 'special_tokens_map.json')
    over = {}
    if 'added_tokens_decoder' not in self._config:
      over = read_json(path)  # older than that key; it has precedence

    def look_up(key):
      file, settings = (
        (path, over) if key in over else (self._config_path, self._config)
      )
      return file, key, settings.get(key)

    own = {
      key
      for key, value in (self._config | over).items()
      if key.endswith('_token')
      and (isinstance(value, str) or 'content' in _inner({key: value}, key))
    }
    for key in (*NAMED, *sorted(own.difference(NAMED))):
      yield from _named(key, *look_up(key))
    for key in LISTS:
      file, key, value = look_up(key)
      if not isinstance(value, list | dict | None):
        raise make_refusal(file, key, value, 'a list of tokens')
      if isinstance(value, dict):
        for name, token in value.items():
          yield from _named(name, file, f'{key}.{name}', token)
        continue
      for i, token in enumerate(value or ()):
        yield from _named(None, file, f'{key}[{i}]', token)
    file, key, value = look_up('added_tokens_decoder')
    if not isinstance(value, dict | None):
      raise make_refusal(file, key, value, 'an object of tokens')
    for i, token in (value or {}).items():
      yield from _named(None, file, f'{key}.{i}', token)

  def find_affixes(self) -> tuple[bool, bool, bool]:
    """(own, bos, eos) of a prompt. With `own`, tokenizer.json decides which
    tokens stand before and after it, and bos: bos_token must be first. Else bos
    and eos: whether these tokens are added."""
    name = self._checked('tokenizer_class', str, 'a name')
    default = BOS_CLASSES.get((name or '').removesuffix('Fast'))
    bos = self._checked('add_bos_token', bool, 'true or false')
    eos = self._checked('add_eos_token', bool, 'true or false')
    unsaid = bos is None and default and 'bos_token' not in self.named
    if default is None or unsaid:
      # a named class that does not know add_bos_token ignores it
      return True, name is None and bool(bos), False
    return False, default if bos is None else bos, bool(eos)

  def _checked(self, key, kind, wanted):
    value = self._config.get(key)
    if not isinstance(value, kind | None):
      raise make_refusal(self._config_path, key, value, wanted)
    return value

  def find_template(self) -> tuple[str, str] | None:
    """(file, text) of the chat template, or None.

    Raises:
      ConfigError: there are several named ones, and none is `default`.
    """
    path = os.path.join(self._folder, 'chat_template.jinja')
    if os.path.isfile(path):
      return path, _read_text(path)
    older = os.path.join(self._folder, 'chat_template.json')
    for path, settings in (
      (self._config_path, self._config),
      (older, read_json(older)),
    ):
      value = settings.get('chat_template')
      if value is not None:
        return path, _default(path, value)
    return None

  def find_ends(self) -> set[int]:
    """Ids that end a text: of generation_config.json, else of config.json, else
    of its text_config."""
    path = os.path.join(self._folder, 'generation_config.json')
    ids = _ids(path, 'eos_token_id', read_json(path))
    if ids:
      return ids
    path, config = self._model()
    inner = config.get('text_config')
    if not isinstance(inner, dict | None):
      raise make_refusal(path, 'text_config', inner, 'an object')
    return _ids(path, 'eos_token_id', config) or _ids(
      path, 'text_config.eos_token_id', inner or {}
    )

  def _model(self):
    """(file, released config.json) of the folder, of the converted folder, or
    of the run that this copy of the tokenizer belongs to."""
    path = os.path.join(self._folder, 'config.json')
    if os.path.isfile(path):
      return path, read_json(path)
    path = os.path.join(self._folder, 'converted.json')
    if os.path.isfile(path):
      return path, _inner(read_json(path), 'config')
    run = os.path.dirname(os.path.abspath(self._folder))
    path = os.path.join(run, 'start.json')
    start = read_json(path)
    data = _inner(read_json(os.path.join(run, 'config.json')), 'data')
    if data and data.get('tokenizer') != start.get('tokenizer'):
      return path, {}  # its ids are those of another tokenizer
    return path, _inner(_inner(start, 'released'), 'config')


def read_json(path: str) -> JsonObject:
  """The object in a JSON file; {} if there is no such file."""
  try:
    with open(path, 'rb') as file:
      tree = json.loads(file.read())
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except RecursionError as error:
    raise ConfigError(f'{path}: not JSON: nested too deep') from error
  except ValueError as error:  # not JSON, or not UTF-8
    raise ConfigError(f'{path}: not JSON: {error}') from error
  if not isinstance(tree, dict):
    raise ConfigError(f'{path} holds {format_value(tree)}; give an object')
  return tree


def make_refusal(
  path: str, key: str, value: object, wanted: str
) -> ConfigError:
  """The ConfigError of a wrong value in a file."""
  return ConfigError(f'{path}: {key} is {format_value(value)}; give {wanted}')


def format_value(value: object, most: int = 60) -> str:
  """`value` as JSON in one short line."""
  try:
    text = json.dumps(value)
  except RecursionError:
    text = f'a nested {type(value).__name__}'
  return text if len(text) <= most else f'{text[: most - 3]}...'


def _named(name, path, key, value):
  """Yields (name, fields) of a token given as a name or an object, if any.

  Only added_tokens_decoder has tokens that are not special.
  """
  if value is None or value == '':
    return
  if isinstance(value, str):
    value = {'content': value}
  if not isinstance(value, dict) or not isinstance(value.get('content'), str):
    raise make_refusal(path, key, value, 'a token: its name or an object')
  fields = {k: value[k] for k in ('content', 'special', *FLAGS) if k in value}
  for flag in fields.keys() - {'content'}:
    if not isinstance(value[flag], bool):
      raise make_refusal(path, f'{key}.{flag}', value[flag], 'true or false')
  if not key.startswith('added_tokens_decoder'):
    fields['special'] = True
  yield name, fields


def _inner(tree: JsonObject, key: str) -> JsonObject:
  """The object under `key`; {} if it is anything else."""
  value = tree.get(key)
  return value if isinstance(value, dict) else {}


def _read_text(path):
  try:
    with open(path, encoding='utf-8') as file:
      return file.read()
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path}: not UTF-8 text (byte {error.start})') from error


def _default(path, value):
  """The template of a value: a text, or the default of named ones."""
  if isinstance(value, str):
    return value
  named = value
  if isinstance(value, list) and all(isinstance(x, dict) for x in value):
    named = {str(item.get('name')): item.get('template') for item in value}
  if not isinstance(named, dict):
    raise make_refusal(
      path, 'chat_template', value, 'a text or a list of named texts'
    )
  if 'default' not in named:
    raise ConfigError(
      f'{path}: none of the chat templates {format_value(list(named))} is'
      " 'default'; copy the one to use into a chat_template.jinja"
    )
  template = named['default']
  if not isinstance(template, str):
    raise make_refusal(path, 'the chat_template default', template, 'a text')
  return template


def _ids(path: str, key: str, tree: JsonObject) -> set[int]:
  """The ids of a number, a list of numbers, or nothing."""
  value = tree.get(key.rpartition('.')[2])
  if value is None:
    return set()
  ids = set()
  for i in value if isinstance(value, list) else [value]:
    if not isinstance(i, int) or isinstance(i, bool):
      raise make_refusal(path, key, value, 'an id or a list of ids')
    ids.add(i)
  return ids
