"""A released folder answers in text, with its own tokenizer and template."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tokenizers

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import text
from deltanet_jax.infer.settings import Sampling

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
TEMPLATE = (
  '{% for m in messages %}\n<user>{{ m.content }}\n{% endfor %}\n'
  '{% if add_generation_prompt %}<bot>{% endif %}'
)
GREEDY = {'max_tokens': 6, 'sampling': Sampling(0.0), 'seed': 0}


@pytest.fixture
def folder(tmp_path):
  made = ROOT / 'tests' / 'fixtures' / 'qwen3'
  shutil.copy(made / 'model.safetensors', tmp_path)
  settings = json.loads((made / 'config.released.json').read_text())
  letters = [chr(ord('A') + i) for i in range(58)]
  vocabulary = {letter: i for i, letter in enumerate(letters)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary | {' ': 58}, unk_token=' ')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens(['<user>', '<bot>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'config.json').write_text(json.dumps(settings))
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  return tmp_path


def test_a_message_is_put_into_the_chat_template(folder):
  found = text.Text(folder)
  message = found.chat('Why')
  assert message == '<user>Why\n<bot>'
  ids = found.encode(message)
  assert (ids[0], ids[-1]) == (59, 60)


def test_a_template_in_the_tokenizers_settings_is_used_too(folder):
  (folder / 'chat_template.jinja').unlink()
  settings = {
    'chat_template': '{{ bos_token }}{{ messages[0].content }}',
    'bos_token': {'content': '<user>'},
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  assert text.Text(folder).chat('Why') == '<user>Why'


def test_what_is_missing_or_refused_is_named(folder):
  path = folder / 'chat_template.jinja'
  path.write_text('{{ raise_exception("no system here") }}')
  with pytest.raises(ConfigError, match='no system here'):
    text.Text(folder).chat('Why')
  path.unlink()
  with pytest.raises(ConfigError, match='no chat template'):
    text.Text(folder).chat('Why')
  (folder / 'tokenizer.json').unlink()
  with pytest.raises(ConfigError, match='tokenizer.json: no such file'):
    text.Text(folder)


def test_text_ends_before_an_end_token(folder):
  parts = list(text.continue_text(folder, 'ABC', chat=False, **GREEDY))
  ids = text.Text(folder).encode(''.join(parts))
  assert len(ids) == 6
  settings = {'eos_token_id': [ids[3], 63]}
  (folder / 'generation_config.json').write_text(json.dumps(settings))
  parts = list(text.continue_text(folder, 'ABC', chat=False, **GREEDY))
  found = text.Text(folder).encode(''.join(parts))
  assert found == ids[: ids.index(ids[3])]


def test_the_command_answers_and_refuses(folder):
  def run(*args):
    return subprocess.run(
      [sys.executable, '-m', 'launch.generate', *args],
      cwd=ROOT,
      text=True,
      capture_output=True,
      env={**os.environ, 'XLA_FLAGS': ''},
    )

  done = run(
    f'--released={folder}',
    '--chat',
    '--prompt=Why',
    '--max_tokens=3',
    '--temperature=0',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Why\n')
  assert len(done.stdout) > len('Why\n\n')
  both = run(f'--released={folder}', '--workdir=x')
  assert (both.returncode, both.stdout) == (2, '')
  assert both.stderr == 'error: give one of --workdir and --released\n'
  nothing = run(f'--released={folder / "no"}', '--prompt=A')
  assert nothing.returncode == 2
  assert len(nothing.stderr.splitlines()) == 1
