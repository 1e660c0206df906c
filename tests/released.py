"""Released folders, small and whole: a fixture with a tokenizer of letters."""

import pathlib
import shutil
import string

import numpy as np
import tokenizers

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
WORDS = 'the cat sat on a mat and ran off with my hat'.split()
TEMPLATE = '{% for m in messages %}<user>{{ m.content }}{% endfor %}<bot>'


def make(name, folder, parts=('model',)):
  """Copies a fixture into `folder` and adds what its users expect there."""
  folder.mkdir(parents=True, exist_ok=True)
  for part in parts:
    shutil.copy(FIXTURES / name / f'{part}.safetensors', folder)
  shutil.copy(FIXTURES / name / 'config.released.json', folder / 'config.json')
  tokenizer().save(str(folder / 'tokenizer.json'))
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  return folder


def tokenizer(end='<|endoftext|>'):
  letters = string.ascii_lowercase + string.digits + ' .,\n?'
  vocabulary = {letter: i for i, letter in enumerate(letters)}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='?')
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  made.decoder = tokenizers.decoders.Fuse()
  made.add_special_tokens([end, '<user>', '<bot>'])
  return made


def write_texts(folder):
  """Short texts of few words; returns the glob that finds them."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for i in range(40):
    (folder / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, 40)))
  return f'{folder}/*.txt'
