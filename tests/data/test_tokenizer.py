"""What a tokenizer's files say: prompts, ends of texts, documents, refusals."""

import json

import numpy as np
import pytest

from deltanet_jax.data import tokenizer
from deltanet_jax.data.tokenizer import ByteTokenizer, FileTokenizer
from tests import token_folders
from tests.token_folders import (
  begun,
  byte_level,
  documents,
  letters,
  refusal,
  write,
)

BOS, EOS, PAD = 256, 257, 258
WHY = [54, 71, 88]


def test_a_text_is_taken_whole_whatever_tokenizer_json_stores(tmp_path):
  made = byte_level()
  made.enable_truncation(max_length=2)
  made.enable_padding(length=9, pad_id=PAD, pad_token='<pad>')
  found = FileTokenizer(write(tmp_path, made))
  assert found.encode_prompt('Why') == found.encode('Why').tolist() == WHY
  ids = found.encode_documents(documents('Why', 'WhyWhy'))
  assert [x.tolist() for x in ids] == [WHY, WHY * 2]


# (class, add_bos_token, add_eos_token, what tokenizer.json makes of a text):
# the ids of 'Why' by transformers 4.57.6
LLAMA = 'LlamaTokenizerFast'
PROMPTS = [
  (LLAMA, True, None, '$A', [BOS, *WHY]),
  (LLAMA, True, False, '<s> $A', [BOS, *WHY]),
  (LLAMA, None, None, '$A', [BOS, *WHY]),
  (LLAMA, None, None, '<s> $A', [BOS, *WHY]),
  (LLAMA, False, None, '<s> $A', WHY),
  (LLAMA, True, True, '$A', [BOS, *WHY, EOS]),
  (LLAMA, True, None, '<s> $A </s>', [BOS, *WHY]),
  ('LlamaTokenizer', True, None, '$A', [BOS, *WHY]),
  ('GPTNeoXTokenizerFast', None, None, '<s> $A', WHY),
  ('GPTNeoXTokenizer', True, None, '$A', [BOS, *WHY]),
  ('PreTrainedTokenizerFast', None, None, '<s> $A', [BOS, *WHY]),
  ('PreTrainedTokenizerFast', False, None, '<s> $A', [BOS, *WHY]),
  ('PreTrainedTokenizerFast', True, None, '<s> $A </s>', [BOS, *WHY, EOS]),
  ('PreTrainedTokenizerFast', True, None, '$A', WHY),
  ('Qwen2Tokenizer', False, None, '$A', WHY),
  ('GPT2Tokenizer', True, True, '$A', WHY),
]


@pytest.mark.parametrize('name, bos, eos, template, want', PROMPTS)
def test_a_prompt_begins_as_the_tokenizers_class_begins_it(
  tmp_path, name, bos, eos, template, want
):
  said = {'tokenizer_class': name, 'bos_token': '<s>', 'eos_token': '</s>'}
  said |= {} if bos is None else {'add_bos_token': bos}
  said |= {} if eos is None else {'add_eos_token': eos}
  found = FileTokenizer(write(tmp_path, begun(template), tokenizer_config=said))
  assert found.encode_prompt('Why') == want
  assert (
    found.encode_prompt('Why', special=False) == WHY
  )  # as a template wants it
  assert found.encode('Why').tolist() == WHY  # as a document is


@pytest.mark.parametrize('template', ['$A', '<s> $A'])
def test_without_a_class_add_bos_token_alone_decides(tmp_path, template):
  said = {'bos_token': {'content': '<s>'}, 'add_bos_token': True}
  path = write(tmp_path, begun(template), tokenizer_config=said)
  assert FileTokenizer(path).encode_prompt('Why') == [BOS, *WHY]


def test_a_beginning_that_is_not_declared_is_refused(tmp_path):
  said = {'tokenizer_class': LLAMA, 'add_bos_token': True}
  path = write(tmp_path, tokenizer_config=said)
  message = refusal(FileTokenizer(path).encode_prompt, 'Why')
  assert 'tokenizer_config.json' in message and 'add_bos_token' in message
  write(tmp_path, tokenizer_config=said | {'bos_token': '<other>'})
  message = refusal(FileTokenizer(path).encode_prompt, 'Why')
  assert "no token '<other>'" in message and 'bos_token' in message
  # nothing is asked for: the tokenizer.json decides
  write(tmp_path, begun('<s> $A'), tokenizer_config={'tokenizer_class': LLAMA})
  assert FileTokenizer(path).encode_prompt('Why') == [BOS, *WHY]


def test_names_of_special_tokens_are_tokens_in_prompts_alone(tmp_path):
  made = byte_level(ordinary=['<tool>'])
  said = {
    'eos_token': '</s>',
    'additional_special_tokens': ['<tool>', '<never>'],
  }
  found = FileTokenizer(write(tmp_path, made, tokenizer_config=said))
  tool = 256
  assert found.encode_prompt('<tool></s>') == [tool, EOS + 1]
  assert found.vocab_size == 260  # what has no id is given none
  plain = found.encode('<tool></s>').tolist()
  assert found.decode(plain) == '<tool></s>' and max(plain) < 256
  assert found.decode([tool, *WHY, EOS + 1]) == 'Why'
  assert found.encode_prompt('<tool>') == [
    tool
  ]  # the other way of reading is over


NOT_SPECIAL = {'special': False, 'normalized': False, 'lstrip': False,
               'rstrip': False, 'single_word': False}  # fmt: skip


# ids and text of 'a hello<tool> <pad>.', of which 256 and 257 are 'hello' and
# '<tool>', by transformers 5.23
@pytest.mark.parametrize(
  'files, ids, text',
  [
    (
      {'tokenizer_config': {'eos_token': '<tool>'}},
      [64, 220, 71, 68, 75, 75, 78, 257, 220, 260, 13],
      'a hello .',
    ),
    (
      {'special_tokens_map': {'unk_token': {'content': '<tool>',
                                            'rstrip': True}}},
      [64, 220, 71, 68, 75, 75, 78, 257, 260, 13],
      'a hello.',
    ),
    (
      {'tokenizer_config': {
        'added_tokens_decoder': {'256': {'content': 'hello'} | NOT_SPECIAL},
        'pad_token': '<tool>',
      }},
      [64, 220, 256, 257, 220, 260, 13],
      'a hello .',
    ),
    (
      {'tokenizer_config': {'pad_token': {'content': '<pad>', 'lstrip': True,
                                          '__type': 'AddedToken'}}},
      [64, 220, 71, 68, 75, 75, 78, 27, 83, 78, 78, 75, 29, 220, 260, 13],
      'a hello<tool> .',
    ),
  ],
)  # fmt: skip
def test_tokens_that_the_files_beside_declare_are_found(
  tmp_path, files, ids, text
):
  made = byte_level(ordinary=['hello', '<tool>'])
  found = FileTokenizer(write(tmp_path, made, **files))
  assert found.encode_prompt('a hello<tool> <pad>.') == ids
  assert found.decode(ids) == text


@pytest.mark.parametrize(
  'files, want',
  [
    ({'generation_config': {'eos_token_id': 5}}, {5}),
    ({'generation_config': {'eos_token_id': [5, 6]}}, {5, 6}),
    ({'config': {'eos_token_id': 7}}, {7}),
    (
      {
        'generation_config': {'eos_token_id': 5},
        'config': {'eos_token_id': 7},
      },
      {5},
    ),
    (
      {
        'generation_config': {'max_length': 5},
        'config': {'eos_token_id': [7, 8]},
      },
      {7, 8},
    ),
    ({'config': {'text_config': {'eos_token_id': 7}}}, {7}),
    ({'config': {'eos_token_id': None, 'text_config': {'eos_token_id': 0}}},
     {0}),
    ({'config': {'eos_token_id': 4, 'text_config': {'eos_token_id': 7}}}, {4}),
    ({'config': {'text_config': None}}, set()),
    ({'converted': {'config': {'eos_token_id': 7}}}, {7}),
    ({'converted': {'config': {'text_config': {'eos_token_id': [7]}}}}, {7}),
    ({'tokenizer_config': {'eos_token': '</s>'}}, set()),
    ({}, set()),
  ],
)  # fmt: skip
def test_a_text_ends_where_the_models_files_say(tmp_path, files, want):
  assert FileTokenizer(write(tmp_path, **files)).ends == want


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(
  'config',
  [
    {'eos_token_id': 7},
    {'eos_token_id': [7, 8]},
    {'text_config': {'eos_token_id': 7}},
    {'eos_token_id': None, 'text_config': {'eos_token_id': 0}},
    {'eos_token_id': 4, 'text_config': {'eos_token_id': 7}},
  ],
)
def test_transformers_ends_a_text_there_too(tmp_path, config):
  transformers = pytest.importorskip('transformers')
  found = FileTokenizer(write(tmp_path, config=config)).ends
  want = transformers.GenerationConfig.from_model_config(config).eos_token_id
  assert found == set(want if isinstance(want, list) else [want])


@pytest.mark.parametrize(
  'own, want', [('/r/tokenizer.json', {7}), ('bytes.json', set())]
)
def test_a_run_ends_texts_as_what_it_began_with(tmp_path, own, want):
  begun = {
    'tokenizer': '/r/tokenizer.json',
    'released': {'config': {'text_config': {'eos_token_id': 7}}},
  }
  (tmp_path / 'start.json').write_text(json.dumps(begun))
  path = write(tmp_path / 'tokenizer')
  assert FileTokenizer(path).ends == {7}
  run = {'_type': 'Experiment', 'data': {'tokenizer': own}}
  (tmp_path / 'config.json').write_text(json.dumps(run))
  # with another tokenizer, the ids mean something else
  assert FileTokenizer(path).ends == want


@pytest.mark.parametrize(
  'special, ordinary, said, want',
  [
    # the declared one, whatever the vocabulary spells besides
    (['<|eot|>'], ['</s>'], {'tokenizer_config': '<|eot|>'}, '<|eot|>'),
    (['<eos>'], ['</s>'], {'special_tokens_map': '<eos>'}, '<eos>'),
    (['</s>', '<|eos|>'], [], {'tokenizer_config': '<|eos|>'}, '<|eos|>'),
    (
      ['<|endoftext|>', '<|im_end|>'],
      [],
      {'tokenizer_config': {'content': '<|im_end|>'}},
      '<|im_end|>',
    ),
    # an older map says more than the settings, as in the reference
    (
      ['<a>', '<b>'],
      [],
      {'tokenizer_config': '<a>', 'special_tokens_map': '<b>'},
      '<b>',
    ),
    # without one, a special token of a known name
    (['<eos>'], ['</s>', '<|endoftext|>'], {}, '<eos>'),
    (['</s>', '<|endoftext|>'], [], {}, '<|endoftext|>'),
    (['</s>'], [], {'tokenizer_config': None}, '</s>'),
    ([], ['</s>', '<|endoftext|>'], {}, None),
  ],
)
def test_documents_end_with_the_declared_token_or_a_special_one(
  tmp_path, special, ordinary, said, want
):
  made = byte_level(special, ordinary)
  files = {name: {'eos_token': value} for name, value in said.items()}
  path = write(tmp_path, made, **files)
  if want is None:
    assert 'no end-of-document token' in refusal(tokenizer.load_tokenizer, path)
    return
  found = tokenizer.load_tokenizer(path)
  assert found.eod == made.token_to_id(want)
  text = f'<b>{want}</b></s><|endoftext|>'
  assert found.eod not in found.encode_documents(documents(text))[0]


def test_a_declared_end_that_is_no_token_is_refused(tmp_path):
  path = write(tmp_path, tokenizer_config={'eos_token': '<|end|>'})
  message = refusal(tokenizer.load_tokenizer, path)
  assert "no token '<|end|>'" in message and 'eos_token' in message


def test_a_document_that_spells_its_own_end_is_refused(tmp_path):
  merges = [('<', '/'), ('</', 's'), ('</s', '>')]
  made = byte_level(special=[], merges=merges)
  path = write(tmp_path, made, tokenizer_config={'eos_token': '</s>'})
  found = tokenizer.load_tokenizer(path)
  assert len(found.encode_documents(documents('<b>old</b>'))) == 1
  bad = documents('<b>old</b>', '<s>old</s>')
  message = refusal(found.encode_documents, bad)
  assert message.startswith('1.txt: ') and "'</s>'" in message


@pytest.mark.parametrize(
  'made, texts, altered',
  [
    # characters that vanish, or become one that stands for all
    (letters(), ['ab', 'axxxb', 'b a'], [1]),
    (letters(unknown='?'), ['ab', 'axxxb', 'a?'], [1]),
    (letters(normalizer='Lowercase'), ['ab', 'aB'], [1]),
    (letters('ab \u00e9', normalizer='NFC'), ['e\u0301', 'a\u00e9'], []),
    (letters(normalizer='Strip'), [' ab\n', 'a b', 'a\nb'], [2]),
    (letters('a1', normalizer='NFKC'), ['a\u2460', 'a1'], [0]),
    (byte_level(), ['\u4f60\U0001f600', 'a  b\r\n', '</s>', '\ufffd'], []),
    (
      token_folders.words(['\u2581', '\u2581a', 'a', 'b', '\u2581\u2581']),
      ['a', ' a', 'a  b', 'a b'],
      [],
    ),
  ],
)
def test_documents_that_their_ids_do_not_spell_are_counted(
  tmp_path, capsys, made, texts, altered
):
  found = FileTokenizer(write(tmp_path, made))
  given = documents(*texts)
  assert len(found.encode_documents(given)) == len(texts)
  size = sum(len(given[i].content) for i in altered)
  assert found.altered == (len(altered), size)
  said = capsys.readouterr().err
  if not altered:
    assert said == ''
    return
  assert said.count('\n') == 1 and said.startswith('warning: ')
  assert f'{len(altered)} of {len(texts)} documents ({size} of ' in said
  assert f'{altered[0]}.txt' in said
  found.encode_documents(documents('a'))
  assert found.altered == (0, 0)


def test_a_character_that_unknown_ones_become_is_itself_no_loss(tmp_path):
  said = {'unk_token': '?'}
  path = write(tmp_path, letters(unknown='?'), tokenizer_config=said)
  found = FileTokenizer(path)
  found.encode_documents(documents('a?'))
  assert found.altered == (0, 0)


def test_what_was_lost_is_shown(tmp_path, capsys):
  found = FileTokenizer(write(tmp_path, letters(unknown='?')))
  found.encode_documents(documents('abab\u4f60ab'))
  assert "0.txt: '\\u4f60ab' became '?ab'" in capsys.readouterr().err


@pytest.mark.parametrize('text', ['a\udcff', '\ud800'])
def test_a_text_that_is_no_utf8_is_refused(tmp_path, text):
  found = FileTokenizer(write(tmp_path, jinja="{{ '\\ud800' }}"))
  for call in found.encode_prompt, found.encode, ByteTokenizer().encode:
    assert 'not UTF-8' in refusal(call, text)
  assert 'not UTF-8' in refusal(found.encode_prompt, found.format_chat('Why'))


def test_ids_of_documents_fit_what_holds_them(tmp_path):
  found = tokenizer.load_tokenizer(write(tmp_path))
  ids = found.encode_documents(documents('Why'))
  assert ids[0].dtype == np.int32 and found.encode('').shape == (0,)
