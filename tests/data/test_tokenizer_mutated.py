"""Damaged and senseless files beside a tokenizer.json, and in it: the answer is
a result or one line that names the file, and the value where it is one."""

import json

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from deltanet_jax.config import ConfigError
from tests import token_folders
from tests.token_folders import ask, refusal, write

MALFORMED = [
  ('tokenizer_config', 'bos_token', 3),
  ('tokenizer_config', 'eos_token', True),
  ('tokenizer_config', 'eos_token', ['</s>']),
  ('tokenizer_config', 'eos_token', {'name': '</s>'}),
  ('tokenizer_config', 'eos_token', {'content': 3}),
  ('tokenizer_config', 'pad_token', {'content': '<pad>', 'lstrip': 'no'}),
  ('tokenizer_config', 'additional_special_tokens', 'abc'),
  ('tokenizer_config', 'additional_special_tokens', [3]),
  ('tokenizer_config', 'added_tokens_decoder', []),
  ('tokenizer_config', 'added_tokens_decoder', {'3': 4}),
  ('tokenizer_config', 'add_bos_token', 'true'),
  ('tokenizer_config', 'add_eos_token', 1),
  ('tokenizer_config', 'tokenizer_class', 3),
  ('tokenizer_config', 'chat_template', 3),
  ('tokenizer_config', 'chat_template', ['a']),
  ('tokenizer_config', 'chat_template', {'default': 3}),
  ('special_tokens_map', 'unk_token', [3]),
  ('special_tokens_map', 'extra_special_tokens', 4),
  ('generation_config', 'eos_token_id', '5'),
  ('generation_config', 'eos_token_id', 5.0),
  ('generation_config', 'eos_token_id', True),
  ('generation_config', 'eos_token_id', [5, None]),
  ('generation_config', 'eos_token_id', {'id': 5}),
  ('config', 'eos_token_id', [[7]]),
  ('config', 'text_config', [7]),
  ('config', 'text_config', {'eos_token_id': '7'}),
  ('chat_template', 'chat_template', 7),
]


@pytest.mark.parametrize('name, key, value', MALFORMED)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, name, key, value):
  sound = {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': 'a'}
  files = {'tokenizer_config': sound, name: {key: value}}
  if name == 'tokenizer_config':
    files = {name: sound | {key: value}}
  elif name == 'chat_template':
    files['tokenizer_config'] = {'eos_token': '</s>'}
  message = refusal(ask, write(tmp_path, **files))
  assert message.startswith(str(tmp_path / f'{name}.json'))
  for word in key, 'give':
    assert word in message


@pytest.mark.parametrize(
  'content, words',
  [
    (b'[]', 'holds []'),
    (b'null', 'holds null'),
    (b'{"a": ', 'not JSON'),
    (b'\xff\xfe', 'not JSON'),
    (b'[' * 100_000, 'too deep'),
  ],
)
@pytest.mark.parametrize('name', ['tokenizer_config', 'generation_config'])
def test_a_file_that_is_no_object_is_named(tmp_path, name, content, words):
  path = write(tmp_path, jinja='a')
  (tmp_path / f'{name}.json').write_bytes(content)
  message = refusal(ask, path)
  assert str(tmp_path / f'{name}.json') in message and words in message
  assert len(message) < 300


ORDINARY = st.sampled_from(['<s>', '</s>', '<pad>', 'Why', '<x>', '', '7'])
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | ORDINARY
  | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(
    st.sampled_from(
      ['content', 'special', 'lstrip', 'name', 'template', 'default',
       'eos_token_id', 'config', 'text_config', '1']
    ),
    inner,
    max_size=3,
  ),
  max_leaves=6,
)  # fmt: skip
KEYS = (
  *[f'{name}_token' for name in ('bos', 'eos', 'unk', 'pad')],
  'additional_special_tokens', 'extra_special_tokens', 'added_tokens_decoder',
  'add_bos_token', 'add_eos_token', 'tokenizer_class', 'chat_template',
  'eos_token_id', 'text_config', 'config', 'tokenizer', 'released', 'data',
)  # fmt: skip
FILES = (
  'tokenizer_config', 'special_tokens_map', 'generation_config', 'config',
  'chat_template', 'converted', '../start', '../config',
)  # fmt: skip
PARTS = (
  '{{ messages[0].content }}', '{{ bos_token }}', '{% if tools %}a{% endif %}',
  '{{ messages | tojson(indent=2) }}', '{{ 1 / 0 }}', '{{ none.x.y }}',
  '{% for m in messages %}{{ loop.index }}{% endfor %}', '{{ "\\ud800" }}',
  '{% generation %}b{% endgeneration %}', '{{ strftime_now("%Y") }}',
  '{{ raise_exception("no\nmore") }}', '{{ x() }}', '{{ messages + 1 }}',
  '{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}', '{% include "a" %}',
  '{{ "%d" | format("a") }}', '{{ 2.0 ** 9999 }}', '{{ messages["a"] }}',
  '{{ "".__class__ }}', '{{ messages | tojson(indent=messages) }}',
  '{{ range(10 ** 9) }}', '{{ 1 | tojson(1, 2, 3, 4, 5) }}', '\x00\u00e9',
)  # fmt: skip


TOKENIZERS = [
  made.to_str()
  for made in (
    token_folders.begun('<s> $A'),
    token_folders.words(['\u2581a', 'a', '<0x41>'], llama=True),
    token_folders.letters(unknown='?'),
  )
]


@st.composite
def mutations(draw):
  """{file: its bytes}: files with values of any kind, or damaged."""
  made = {}
  for name in draw(st.sets(st.sampled_from(FILES), max_size=3)):
    found = draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
    made[f'{name}.json'] = json.dumps(found).encode()
  if draw(st.booleans()):
    text = ''.join(draw(st.lists(st.sampled_from(PARTS), max_size=3)))
    made['chat_template.jinja'] = text.encode()
  for name in list(made):
    if draw(st.integers(0, 3)) == 0:
      at = draw(st.integers(0, len(made[name])))
      rest = made[name][at + draw(st.integers(0, 4)) :]
      made[name] = made[name][:at] + draw(st.binary(max_size=3)) + rest
  if draw(st.integers(0, 3)) == 0:
    found = json.loads(draw(st.sampled_from(TOKENIZERS)))
    change(found, draw(st.lists(st.integers(0, 9), max_size=4)), draw(VALUES))
    made['tokenizer.json'] = json.dumps(found).encode()
  return made


def change(found, way, value):
  """Puts a value where a way of numbers of children leads in a tree."""
  keys = list(found) if isinstance(found, dict) else range(len(found))
  if not keys:
    return
  key = keys[way[0] % len(keys) if way else 0]
  if len(way) > 1 and isinstance(found[key], dict | list):
    change(found[key], way[1:], value)
  else:
    found[key] = value


def put(folder, made):
  """Writes what `mutations` drew beside a sound tokenizer."""
  for name in [f'{name}.json' for name in FILES] + ['chat_template.jinja']:
    (folder / name).unlink(missing_ok=True)
  path = write(folder, tokenizer_config={'eos_token': '</s>'})
  for name, content in made.items():
    (folder / name).write_bytes(content)
  return path


def answered(path):
  try:
    ask(path)
  except ConfigError as error:
    message = str(error)
    assert '\n' not in message and '\r' not in message and len(message) < 1000
    return message
  return None


@settings(
  derandomize=True,
  deadline=None,
  max_examples=150,
  suppress_health_check=list(HealthCheck),
)
@given(made=mutations())
def test_mutated_files_give_a_result_or_one_line(tmp_path_factory, made):
  folder = tmp_path_factory.getbasetemp() / 'mutated' / 'tokenizer'
  answered(put(folder, made))
