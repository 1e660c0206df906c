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
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.data.tokenizer import FileTokenizer
from deltanet_jax.hf import convert
from deltanet_jax.infer import text
from deltanet_jax.runs import start
from deltanet_jax.runs.source import open_model
from tests import released

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
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
  found = FileTokenizer(folder / 'tokenizer.json')
  message = found.format_chat('Why')
  assert message == '<user>Why\n<bot>'
  ids = found.encode_prompt(message)
  assert (ids[0], ids[-1]) == (59, 60)


def test_a_template_in_the_tokenizers_settings_is_used_too(folder):
  (folder / 'chat_template.jinja').unlink()
  settings = {
    'chat_template': '{{ bos_token }}{{ messages[0].content }}',
    'bos_token': {'content': '<user>'},
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  assert (
    FileTokenizer(folder / 'tokenizer.json').format_chat('Why') == '<user>Why'
  )


def test_what_is_missing_or_refused_is_named(folder):
  path = folder / 'chat_template.jinja'
  path.write_text('{{ raise_exception("no system here") }}')
  with pytest.raises(ConfigError, match='no system here'):
    FileTokenizer(folder / 'tokenizer.json').format_chat('Why')
  path.unlink()
  with pytest.raises(ConfigError, match='no chat template'):
    FileTokenizer(folder / 'tokenizer.json').format_chat('Why')
  (folder / 'tokenizer.json').unlink()
  with pytest.raises(ConfigError, match='tokenizer.json: no such file'):
    FileTokenizer(folder / 'tokenizer.json')


def test_text_ends_before_an_end_token(folder):
  parts = list(
    text.continue_text(open_model(str(folder)), 'ABC', chat=False, **GREEDY)
  )
  ids = FileTokenizer(folder / 'tokenizer.json').encode_prompt(''.join(parts))
  assert len(ids) == 6
  settings = {'eos_token_id': [ids[3], 63]}
  (folder / 'generation_config.json').write_text(json.dumps(settings))
  parts = list(
    text.continue_text(open_model(str(folder)), 'ABC', chat=False, **GREEDY)
  )
  found = FileTokenizer(folder / 'tokenizer.json').encode_prompt(''.join(parts))
  assert found == ids[: ids.index(ids[3])]


@pytest.mark.parametrize('nested', [False, True])
def test_ends_of_config_json_survive_conversion_and_training(folder, nested):
  path = folder / 'config.json'
  settings = json.loads(path.read_text()) | {'eos_token_id': [5, 7]}
  if nested:  # as it is where a model has more than text
    settings = {'model_type': settings['model_type'], 'text_config': settings}
  path.write_text(json.dumps(settings))
  assert FileTokenizer(folder / 'tokenizer.json').ends == {5, 7}
  out = folder / 'converted'
  convert.convert_to_orbax(folder, out)
  assert FileTokenizer(out / 'tokenizer.json').ends == {5, 7}
  back = folder / 'back'
  convert.convert_to_released(out, back)
  assert FileTokenizer(back / 'tokenizer.json').ends == {5, 7}
  for i, source in enumerate((folder, out)):
    run, begun = folder / f'run{i}', open_model(str(source))
    for name, value in start.make_texts(begun, begun.tokenizer).items():
      (run / name).parent.mkdir(parents=True, exist_ok=True)
      (run / name).write_text(value)
    assert FileTokenizer(run / 'tokenizer' / 'tokenizer.json').ends == {5, 7}


def test_a_run_keeps_all_that_declares_its_end_of_documents(folder):
  made = released.tokenizer('<end>')
  made.save(str(folder / 'tokenizer.json'))
  said = folder / 'special_tokens_map.json'
  said.write_text(json.dumps({'eos_token': '<end>'}))
  kept = start.make_texts(None, str(folder / 'tokenizer.json'))
  assert kept['tokenizer/special_tokens_map.json'] == said.read_text()


def test_an_answer_is_a_text_and_a_continuation_is_not(folder, monkeypatch):
  class Spaced:
    """Takes the space off the first word, as a decoder of words does."""

    def decode(self, ids):
      return ''.join(f' {i}' for i in ids)[1:]

  monkeypatch.setattr(FileTokenizer, 'decode', Spaced.decode)
  monkeypatch.setattr(text, 'generate', lambda *a, **k: iter([3, 4]))
  for chat, want in (False, ' 3 4'), (True, '3 4'):
    parts = text.continue_text(
      open_model(str(folder)), 'ABC', chat=chat, **GREEDY
    )
    assert ''.join(parts) == want


def test_a_seed_beyond_32_bits_is_refused(folder):
  how = GREEDY | {'seed': 2**32}
  with pytest.raises(ValueError, match='seed is 4294967296; give 0 to'):
    next(text.continue_text(open_model(str(folder)), 'ABC', chat=False, **how))


def test_the_score_tells_of_text_that_the_tokenizer_loses(folder):
  # a tokenizer of letters with an end of documents
  made = released.tokenizer()
  made.save(str(folder / 'tokenizer.json'))
  for i, words in enumerate(('the cat', 'the caf\u00e9', 'my hat')):
    (folder / f'{i}.txt').write_text(words, encoding='utf-8')
  done = run('evaluate', f'--released={folder}', f'--data={folder}/*.txt')
  assert done.returncode == 0, done.stderr
  score = json.loads(done.stdout)
  assert (score['altered_documents'], score['altered_bytes']) == (1, 9)
  assert 'warning: ' in done.stderr
  assert "1.txt: '\\xe9' became '?'" in done.stderr


def run(main, *args, shell='exec "$@"', **env):
  return subprocess.run(
    ['bash', '-c', f'set -o pipefail; {shell}', 'bash', sys.executable, '-m',
     f'launch.{main}', *args],
    cwd=ROOT,
    text=True,
    capture_output=True,
    env={**os.environ, 'XLA_FLAGS': '', **env},
  )  # fmt: skip


@pytest.mark.long
def test_the_commands_output_may_be_cut_or_of_few_letters(folder):
  given = f'--released={folder}', '--prompt=A\u00e9'
  cut = run('generate', *given, '--max_tokens=5000', shell='"$@" | head -c 3')
  assert (cut.returncode, cut.stdout) == (141, 'A\u00e9'), cut.stderr
  assert cut.stderr == ''
  few = run('generate', *given, '--max_tokens=1', PYTHONIOENCODING='ascii')
  assert (few.returncode, few.stderr) == (0, '')
  assert few.stdout.startswith('A\\xe9')


def test_the_command_answers_and_refuses(folder):
  done = run(
    'generate',
    f'--released={folder}',
    '--chat',
    '--prompt=Why',
    '--max_tokens=3',
    '--temperature=0',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Why\n')
  assert len(done.stdout) > len('Why\n\n')
  both = run('generate', f'--released={folder}', '--workdir=x')
  assert (both.returncode, both.stdout) == (2, '')
  assert both.stderr == 'error: give one of --workdir and --released\n'
  nothing = run('generate', f'--released={folder / "no"}', '--prompt=A')
  assert nothing.returncode == 2
  assert len(nothing.stderr.splitlines()) == 1
