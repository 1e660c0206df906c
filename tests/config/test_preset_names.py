"""Names of presets and of a user's own files on a command line."""

import subprocess
import sys

import pytest

from deltanet_jax import config
from deltanet_jax.config import preset_names
from deltanet_jax.config.preset_names import find_folder

SIZED = """
from deltanet_jax import config
SIZES = {'a': 1, 'b': 2}

def get_config(size='a'):
  steps = str(SIZES[size])
  return config.override_field(config.load('quickstart'), 'train.steps', steps)
"""


def refusal(name, released=None):
  with pytest.raises(config.ConfigError) as error:
    config.load(name, released)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(SIZED)
  return path


def test_a_file_of_ones_own_takes_a_size(file):
  steps = lambda name: config.load(name).train.steps
  assert [steps(x) for x in (file, f'{file}:a', f'{file}:b')] == [1, 1, 2]
  assert preset_names.label_preset(f'{file}:b') == 'mine:b'
  assert refusal(f'{file}:c') == f"{file} has no size 'c'; there is a, b"
  assert "has no size ''" in refusal(f'{file}:')


def test_a_size_that_has_no_default_is_asked_for(file):
  file.write_text(SIZED.replace("size='a'", 'size'))
  assert f'write {file}:SIZE; there is a, b' in refusal(file)
  assert config.load(f'{file}:b').train.steps == 2


def test_a_file_without_a_table_looks_its_sizes_up_itself(file):
  file.write_text(SIZED.replace('SIZES', 'TABLE'))
  assert config.load(f'{file}:b').train.steps == 2
  assert f"{file}:6: KeyError: 'c'" in refusal(f'{file}:c')


def test_a_file_without_sizes_takes_none(file):
  file.write_text(SIZED.replace("(size='a')", '()').replace('[size]', "['b']"))
  assert config.load(file).train.steps == 2
  assert refusal(f'{file}:b') == f'{file} has no sizes; leave out :b'


def test_a_parameter_of_another_name_is_a_released_model(file):
  file.write_text(
    SIZED.replace("size='a'", 'begun').replace('[size]', '[begun]')
  )
  assert '--released=DIR' in refusal(file)
  assert config.load(file, 'b').train.steps == 2
  both = SIZED.replace("size='a'", "released, size='a'")
  file.write_text(both.replace('[size]', '[size] + released'))
  assert config.load(f'{file}:b', 10).train.steps == 12


def test_a_file_with_a_colon_in_its_path_is_that_file(file):
  odd = file.with_name('mine.py:b')
  odd.write_text(
    SIZED.replace("'b': 2", "'b': 3").replace("size='a'", "size='b'")
  )
  assert config.load(odd).train.steps == 3
  assert config.load(f'{odd}:a').train.steps == 1
  assert preset_names.locate_preset(f'{odd}:a') == (odd, 'a')


def test_a_name_answers_from_any_folder_and_a_file_there_comes_first(
  file, monkeypatch
):
  monkeypatch.chdir(file.parent)
  assert config.load('qwen3:4b').model.d_model == 2560
  assert config.load('qwen3') == config.load('qwen3:8b')
  file.parent.joinpath('configs').mkdir()
  file.rename('configs/qwen3_8b.py')
  assert config.load('configs/qwen3_8b.py:b').train.steps == 2
  # another folder's qwen3.py is not the preset that qwen3_4b.py was
  file.with_name('configs').joinpath('qwen3.py').write_text(SIZED)
  assert 'no preset or file' in refusal('configs/qwen3_4b.py')
  with pytest.warns(UserWarning, match='qwen3_4b is now qwen3:4b'):
    assert config.load('qwen3_4b').model.d_model == 2560


@pytest.mark.parametrize(
  'name, words',
  [
    ('qwen3:9b', "qwen3 has no size '9b'; there is 0p6b, 1p7b, 4b, 8b, 14b"),
    ('qwen3:8B', "qwen3 has no size '8B'; there is 0p6b"),
    ('qwen3_nxt', 'no preset or file qwen3_nxt; did you mean qwen3_next?'),
    ('qwen3_8bb', 'did you mean qwen3:8b?'),
    ('hybrid_gnd', 'did you mean small:hybrid_gdn?'),
    ('xyz', 'no preset or file xyz; there is deepseek, finetune, gdn, kimi'),
    ('quickstart:1', 'quickstart has no sizes; leave out :1'),
    ('finetune', 'finetune trains a released model further; give its folder'),
    ('qwen3_8b:1', 'no preset or file qwen3_8b:1'),
    (f'{find_folder()}/qwen4.py', f'did you mean {find_folder()}/qwen3.py?'),
    (
      f'{find_folder()}/qwen3_8bb.py',
      f'did you mean {find_folder()}/qwen3.py:8b?',
    ),
    ('no/such/folder.py', 'no preset or file no/such/folder.py'),
    ('', 'no preset or file '),
    ('/', 'no preset or file /'),
    ('x' * 5000, 'no preset or file xxx'),
    (f'{"x" * 5000}/y.py:z', 'no preset or file xxx'),
  ],
)
def test_a_wrong_name_is_answered_in_one_line(name, words):
  assert words in refusal(name)


@pytest.mark.parametrize(
  'flag, status, words',
  [
    ('--config=qwen3:9b', 2, "error: qwen3 has no size '9b'; there is 0p6b"),
    (
      '--config=qwen3_8b',
      2,
      'warning: qwen3_8b is now qwen3:8b\nerror: no --w',
    ),
  ],
)
def test_a_command_says_it_before_jax(flag, status, words):
  code = (
    'import runpy, sys\n'
    'sys.modules["jax"] = None\n'
    'runpy.run_module("launch.train", run_name="__main__", alter_sys=True)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, flag],
    cwd=find_folder().parent,
    capture_output=True,
    text=True,
  )
  assert done.returncode == status and done.stdout == ''
  assert done.stderr.startswith(words)
  assert done.stderr.count('\n') == words.count('\n') + 1


def test_a_file_is_run_under_its_own_name_and_leaves_nothing(file):
  file.write_text('class Mixer: pass\n')
  module = preset_names.run_file(file)
  assert module['Mixer'].__module__ == 'mine'  # as it is stored
  assert 'mine' not in sys.modules
  assert list(file.parent.iterdir()) == [file]
