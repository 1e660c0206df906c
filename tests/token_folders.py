"""Folders with a small tokenizer and the files beside it."""

import json

import pytest
from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from deltanet_jax.config import ConfigError
from deltanet_jax.data.files import Document
from deltanet_jax.data.tokenizer import FileTokenizer

SPECIAL = '<s>', '</s>', '<pad>'  # ids 256, 257, 258


def byte_level(special=SPECIAL, ordinary=(), merges=()):
  """A tokenizer of the 256 bytes in the order of their letters, of `merges`,
  `ordinary` tokens and `special` ones."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  names = [*letters, *(a + b for a, b in merges), *ordinary]
  vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
  made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(
    [AddedToken(x, special=True, normalized=False) for x in special]
  )
  return made


def begun(template):
  """`byte_level` whose post-processor makes this of a text, as '<s> $A'."""
  made = byte_level()
  ids = [(name, made.token_to_id(name)) for name in SPECIAL]
  made.post_processor = processors.TemplateProcessing(
    single=template, special_tokens=ids
  )
  return made


def letters(known='ab ', unknown=None, normalizer=None):
  """A tokenizer of few letters: others vanish, or are `unknown`."""
  names = [*known, *([unknown] if unknown else [])]
  vocabulary = {name: i for i, name in enumerate(names)}
  made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
  if normalizer:
    made.normalizer = getattr(normalizers, normalizer)()
  made.decoder = decoders.Fuse()
  made.add_special_tokens(['</s>'])
  return made


def words(vocabulary, llama=False):
  """A tokenizer of words that begin with a space; `llama`: its decoder, which
  knows bytes, too."""
  made = Tokenizer(
    models.BPE(
      vocab={name: i for i, name in enumerate(vocabulary)},
      merges=[],
      byte_fallback=llama,
      ignore_merges=True,
    )
  )
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  if llama:
    made.decoder = decoders.Sequence(
      [
        decoders.Replace('\u2581', ' '),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(' ', 1, 0),
      ]
    )
  made.add_special_tokens(['</s>'])
  return made


def write(folder, tokenizer=None, jinja=None, **files):
  """Writes tokenizer.json, a template and NAME.json of `files`; returns the
  path of the first."""
  folder.mkdir(parents=True, exist_ok=True)
  (tokenizer or byte_level()).save(str(folder / 'tokenizer.json'))
  if jinja is not None:
    (folder / 'chat_template.jinja').write_text(jinja, encoding='utf-8')
  for name, value in files.items():
    (folder / f'{name}.json').write_text(json.dumps(value))
  return str(folder / 'tokenizer.json')


def documents(*texts):
  return [Document(f'{i}.txt', text.encode()) for i, text in enumerate(texts)]


def refusal(call, *args):
  with pytest.raises(ConfigError) as error:
    call(*args)
  message = str(error.value)
  assert '\n' not in message
  return message


def ask(path):
  """Everything that may be asked of the files of a folder."""
  found = FileTokenizer(path)
  calls = (
    lambda: found.encode_prompt('Why'),
    lambda: found.encode_prompt(found.format_chat('Why'), special=False),
    lambda: found.ends,
    lambda: found.eod and found.encode_documents(documents('Why')),
  )
  errors = []
  for call in calls:
    try:
      call()
    except ConfigError as error:
      errors.append(error)
  if errors:
    raise errors[0]
