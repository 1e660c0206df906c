"""Chat templates: what transformers makes of them, and what it may refuse.

The wanted texts are those of `apply_chat_template` of transformers 5.23, with
which the last test compares live.
"""

import datetime

import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.data.tokenizer import FileTokenizer
from tests import token_folders

MESSAGE = 'Why <b> \u00e9 "q"?'
TOKENS = '{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}'
OBJECT = {'content': '<s>', 'lstrip': False, 'normalized': False}
# (template, text)
TEMPLATES = {
  'not given': (
    '{% if tools is not none %}T{% endif %}{% if documents is not none %}D'
    '{% endif %}{{ tools is defined }}{{ documents }}',
    'TrueNone',
  ),
  'given': (
    '{% if add_generation_prompt %}<bot>{% endif %}{{ messages[0]["role"] }}'
    '{{ messages | length }}{{ messages[0].tool_calls is defined }}',
    '<bot>user1False',
  ),
  'json': (
    '{{ messages | tojson }}',
    '[{"role": "user", "content": "Why <b> \u00e9 \\"q\\"?"}]',
  ),
  'json in ASCII': (
    '{{ [messages[0].content, 1] | tojson(ensure_ascii=True, indent=2) }}',
    '[\n  "Why <b> \\u00e9 \\"q\\"?",\n  1\n]',
  ),
  'json in order': (
    '{{ {"b": 1, "a": "<"} | tojson(sort_keys=True, separators=(",", ":")) }}',
    '{"a":"<","b":1}',
  ),
  'generation': (
    '{% set x = 1 %}{% generation %}{% set x = 2 %}a{{ x }}{% endgeneration %}'
    '{{ x }}',
    'a21',
  ),
  'loops': (
    '{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}'
    '{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}',
    '0134',
  ),
  'blocks': (
    'a\n  {% if true %}\n  b\n  {% endif %}\n{%- if true -%}  c  {%- endif %}\n'
    'd\n',
    'a\n  b\ncd',
  ),
  'a name space': (
    '{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}'
    '{% endfor %}{{ ns.n }}{{ dict(a=1)["a"] }}',
    '71',
  ),
}


def folder(path, template, where='jinja', **files):
  said = files.pop('tokenizer_config', {})
  if where == 'jinja':
    token_folders.write(path, jinja=template, tokenizer_config=said, **files)
  else:
    named = [{'name': 'tool_use', 'template': 'no'}]
    named.append({'name': 'default', 'template': template})
    said = said | {'chat_template': template if where == 'text' else named}
    token_folders.write(path, tokenizer_config=said, **files)
  return FileTokenizer(path / 'tokenizer.json')


@pytest.mark.parametrize('where', ['jinja', 'text', 'named'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_a_template_says_what_transformers_says(tmp_path, name, where):
  template, want = TEMPLATES[name]
  assert folder(tmp_path, template, where).format_chat(MESSAGE) == want


@pytest.mark.parametrize(
  'files, want',
  [
    (
      {
        'tokenizer_config': {
          'bos_token': OBJECT | {'__type': 'AddedToken'},
          'pad_token': '<pad>',
        }
      },
      '<s>||<pad>|',
    ),
    (
      {'special_tokens_map': {'bos_token': OBJECT, 'unk_token': '<unk>'}},
      '<s>|||<unk>',
    ),
    (
      {
        'tokenizer_config': {'bos_token': '<x>', 'eos_token': '</s>'},
        'special_tokens_map': {'bos_token': '<s>'},
      },
      '<s>|</s>||',
    ),
    # tokenizer_config.json is of a time when it says everything
    (
      {
        'tokenizer_config': {
          'bos_token': '<s>',
          'added_tokens_decoder': {'256': {'content': '<s>', 'special': True}},
        },
        'special_tokens_map': {'bos_token': '</s>', 'pad_token': '<pad>'},
      },
      '<s>|||',
    ),
    (
      {
        'tokenizer_config': {'bos_token': None},
        'special_tokens_map': {'eos_token': '</s>'},
      },
      '|</s>||',
    ),
  ],
)
def test_a_template_has_the_special_tokens_of_both_files(tmp_path, files, want):
  found = folder(tmp_path, TOKENS, **files)
  assert found.format_chat(MESSAGE) == want
  ids = found.encode_prompt(want, special=False)
  assert ids.count(256) == want.count('<s>')


def test_the_day_is_todays(tmp_path):
  template = (
    '{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% endif %}'
  )
  found = folder(tmp_path, template).format_chat('Why')
  assert abs(int(found) - datetime.datetime.now().year) <= 1


def test_a_file_of_the_template_alone_comes_first_and_json_last(tmp_path):
  path = token_folders.write(tmp_path, chat_template={'chat_template': 'json'})
  assert FileTokenizer(path).format_chat('Why') == 'json'
  token_folders.write(tmp_path, tokenizer_config={'chat_template': 'config'})
  assert FileTokenizer(path).format_chat('Why') == 'config'
  token_folders.write(tmp_path, jinja='jinja')
  assert FileTokenizer(path).format_chat('Why') == 'jinja'


def refusal(found):
  with pytest.raises(ConfigError) as error:
    found.format_chat(MESSAGE)
  message = str(error.value)
  assert '\n' not in message
  return message


def test_templates_without_a_default_one_are_named(tmp_path):
  named = [{'name': name, 'template': 'a'} for name in ('rag', 'tool_use')]
  token_folders.write(tmp_path, tokenizer_config={'chat_template': named})
  message = refusal(FileTokenizer(tmp_path / 'tokenizer.json'))
  assert '["rag", "tool_use"]' in message and 'default' in message
  path = token_folders.write(tmp_path, jinja='b')
  assert FileTokenizer(path).format_chat('Why') == 'b'


@pytest.mark.parametrize(
  'template, words',
  [
    ('{{ raise_exception("only\nthese") }}', 'only these'),
    ('{{ 1 / 0 }}', 'division by zero'),
    ('{{ messages + 1 }}', 'can only concatenate'),
    ('{{ "%d" | format("a") }}', 'format'),
    ('{{ 2.0 ** 9999 }}', 'out of range'),
    ('{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}', 'recursion'),
    ('{% for %}', 'Expected'),
    ('{{ x.y }}', "'x' is undefined"),
    ('{{ "".__class__.__mro__ }}', 'unsafe'),
    ('{{ messages.append(1) }}', 'unsafe'),
    ('{{ range(10 ** 9) }}', 'Range too big'),
    ('{% include "a" %}', 'loader'),
    ('{{ messages | tojson(indent=messages) }}', 'list'),
    ('{% generation %}a', 'endgeneration'),
  ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, words):
  message = refusal(folder(tmp_path, template))
  assert 'chat_template.jinja: chat template: ' in message and words in message
  message = refusal(folder(tmp_path / 'b', template, 'text'))
  assert 'tokenizer_config.json: chat template: ' in message


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize('name', [*TEMPLATES, 'special tokens'])
def test_transformers_says_it_too(tmp_path, name):
  transformers = pytest.importorskip('transformers')
  template, _ = TEMPLATES.get(name, (TOKENS, ''))
  found = folder(
    tmp_path,
    template,
    'named',
    tokenizer_config={'eos_token': '</s>'},
    special_tokens_map={'bos_token': OBJECT, 'pad_token': '<pad>'},
  )
  reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  chat = [{'role': 'user', 'content': MESSAGE}]
  want = reference.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=False
  )
  assert found.format_chat(MESSAGE) == want
  ids = reference.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=False
  )
  assert found.encode_prompt(want, special=False) == ids


# from apply_chat_template of transformers 5.23.0
OWN_TOKENS = {
  'by key': ({'image_token': '<pad>'}, '[<pad>|<s>]'),
  'extra': ({'extra_special_tokens': {'image_token': '<pad>'}}, '[<pad>|<s>]'),
  'of the model': (
    {'model_specific_special_tokens': {'image_token': '<pad>'}},
    '[<pad>|<s>]',
  ),
  'additional': (
    {'additional_special_tokens': {'image_token': '<pad>'}},
    '[<pad>|<s>]',
  ),
  'both': (
    {'image_token': '</s>', 'extra_special_tokens': {'image_token': '<pad>'}},
    '[<pad>|<s>]',
  ),
  'a role': ({'extra_special_tokens': {'bos_token': '<pad>'}}, '[|<pad>]'),
  'a list': ({'extra_special_tokens': ['<pad>']}, '[|<s>]'),
  'no token': ({'image_token': 5}, '[|<s>]'),
  'an object': ({'image_token': {'a': 5}}, '[|<s>]'),
}
OWN_TEMPLATE = '[{{ image_token }}|{{ bos_token }}]'


@pytest.mark.parametrize('name', OWN_TOKENS)
def test_a_template_has_a_models_own_tokens_by_their_names(tmp_path, name):
  said, want = OWN_TOKENS[name]
  said = {'bos_token': '<s>', 'eos_token': '</s>'} | said
  found = folder(tmp_path, OWN_TEMPLATE, tokenizer_config=said)
  assert found.format_chat(MESSAGE) == want


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize('name', OWN_TOKENS)
def test_transformers_has_these_tokens_too(tmp_path, name):
  transformers = pytest.importorskip('transformers')
  said, want = OWN_TOKENS[name]
  said = {'bos_token': '<s>', 'eos_token': '</s>'} | said
  folder(tmp_path, OWN_TEMPLATE, tokenizer_config=said)
  found = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  asked = [{'role': 'user', 'content': MESSAGE}]
  assert found.apply_chat_template(asked, tokenize=False) == want
