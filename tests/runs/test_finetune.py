"""Training further: from released weights to a folder that loads again."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.data.text import TextData
from deltanet_jax.hf import families
from deltanet_jax.runs import checkpoint, start
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.release import write_release
from deltanet_jax.runs.source import Source, open_model, read_start
from deltanet_jax.train import loop
from tests import released

ROOT = pathlib.Path(__file__).parents[2]
FINETUNE = ROOT / 'configs' / 'finetune.py'
SHORT = {
  'data.seq_len': 32, 'data.batch': 4, 'data.heldout': 0.2, 'train.steps': 4,
  'train.dtype': 'float32', 'train.log_every': 1, 'train.save_every': 2,
  'train.eval_rows': 4, 'optim.lr': 3e-3, 'optim.warmup': 0,
}  # fmt: skip


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  return released.write_texts(tmp_path_factory.mktemp('texts'))


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """One quick compilation for all runs that differ in their folders alone."""
  make = functools.cache(loop.make_program)

  def program(asked, mesh):
    data = dataclasses.replace(asked.data, tokenizer='')
    return make(dataclasses.replace(asked, data=data), mesh)

  jax.config.update('jax_disable_most_optimizations', True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'make_program', program)
    yield
  jax.config.update('jax_disable_most_optimizations', False)


def experiment(begun, texts, **changes):
  changes = {'data.path': texts} | SHORT | changes
  pairs = [(name, str(value)) for name, value in changes.items()]
  return start.make_experiment(begun, FINETUNE, pairs)


def train(begun, asked, folder, wrap=lambda data: data):
  """As launch.train does it: the results, or the signal that stopped it."""
  workdir = Workdir(folder)
  workdir.check(asked)
  tokenizer = workdir.find_tokenizer(asked)
  data = TextData(dataclasses.replace(asked.data, tokenizer=tokenizer))
  kept = start.make_texts(begun, tokenizer)
  try:
    return loop.train(
      asked, workdir, wrap(data), io.StringIO(), source=begun, texts=kept
    )
  finally:
    workdir.unlock()


def records(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


class Stopped:
  """Data that sends SIGTERM with the batch of a step."""

  def __init__(self, data, step):
    self._data, self._step = data, step

  def __getattr__(self, name):
    return getattr(self._data, name)

  def iterate(self, first, rows):
    for i, batch in enumerate(self._data.iterate(first, rows), first + 1):
      if i == self._step:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch


def test_a_released_folder_gives_model_tokenizer_and_objective(tmp_path):
  folder = released.make('qwen3_next', tmp_path, ['model', 'mtp'])
  begun = open_model(str(folder))
  assert begun.model.mtp is not None
  assert begun.tokenizer == str(folder / 'tokenizer.json')
  found = start.make_experiment(begun, FINETUNE, [('train.steps', '7')])
  assert found.model == dataclasses.replace(begun.model, remat='full')
  assert found.train.steps == 7
  assert found.train.objective.further > 0
  assert found.train.objective.balance > 0
  sparse = open_model(str(released.make('deepseek_v32', tmp_path / 'sparse')))
  objective = start.make_experiment(sparse, FINETUNE, []).train.objective
  assert objective.indexer > 0
  assert (objective.further, objective.bias_rate) == (0, 0)


@pytest.mark.parametrize(
  'name, value, words',
  [
    ('model.d_model', '64', ['d_model: 32 != 64']),
    ('model.period.0.ffn.hidden', '8', ['period.0.ffn.hidden', '!= 8']),
    ('model.period.0.residual.form', 'post', ["'pre' != 'post'"]),
    ('model.tied', 'true', ['tied']),
  ],
)
def test_what_the_weights_fix_cannot_be_set(name, value, words, tmp_path):
  begun = open_model(str(released.make('qwen3_next', tmp_path)))
  with pytest.raises(ConfigError) as caught:
    start.make_experiment(begun, FINETUNE, [(name, value)])
  for word in [str(tmp_path), 'only remat', *words]:
    assert word in str(caught.value)


def test_how_the_weights_are_computed_with_can_be_set(tmp_path):
  begun = open_model(str(released.make('qwen3_next', tmp_path)))
  changes = [
    ('model.remat', 'none'),
    ('model.period.0.mixer.chunk', '32'),
    ('model.period.0.mixer.form', 'recurrent'),
    ('data.tokenizer', 'bytes'),
  ]
  found = start.make_experiment(begun, FINETUNE, changes)
  assert found.model.remat == 'none'
  assert found.model.period[0].mixer.chunk == 32
  assert found.data.tokenizer == 'bytes'


def test_a_preset_of_the_same_model_will_do_and_of_another_not(tmp_path):
  begun = open_model(str(released.make('qwen3', tmp_path)))
  file = ROOT / 'configs' / 'qwen3.py:8b'
  with pytest.raises(ConfigError, match='qwen3.py:8b is another model'):
    start.make_experiment(begun, file, [])
  big = Source(
    '/released', families_model(file), '/released/tokenizer.json', None
  )
  found = start.make_experiment(big, file, [])
  assert found.model.remat == 'full' and big.model.remat == 'none'
  assert found.data.tokenizer == '/released/tokenizer.json'


def families_model(file):
  from deltanet_jax import config

  return dataclasses.replace(config.load(file).model, remat='none')


def launch(main, *args, imports=()):
  """Runs a main as its user does; importing one of `imports` ends it."""
  blocked = ''.join(f'sys.modules[{name!r}] = None\n' for name in imports)
  code = (
    f'import runpy, sys\n{blocked}'
    f'runpy.run_module("launch.{main}", run_name="__main__", alter_sys=True)\n'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    cwd=ROOT,
    text=True,
    capture_output=True,
    env=os.environ | {'XLA_FLAGS': ''},
  )


def refused(done, *words):
  assert (done.returncode, done.stdout) == (2, ''), done.stderr
  assert done.stderr.count('\n') == 1 and done.stderr.startswith('error: ')
  for word in words:
    assert word in done.stderr


def test_bad_input_is_one_line_before_jax(tmp_path, texts):
  folder = released.make('qwen3', tmp_path / 'qwen3')
  run, data = f'--workdir={tmp_path / "run"}', '--config.data.heldout=0.2'
  ask = functools.partial(launch, 'train', imports=['jax'])
  given = f'--released={folder}'
  data = [data, f'--config.data.path={texts}']
  refused(ask(run, given, '--config.data.pth=x'), "'pth'", "mean 'path'")
  refused(ask(run, given, '--config.model.d_model=8'), '32 != 8')
  refused(ask(run, f'--released={tmp_path}/no', *data), 'no such folder')
  refused(ask(run, f'--released={tmp_path}', *data), 'config.json')
  refused(ask(run, '--config=configs/finetune.py', *data), '--released=DIR')
  refused(ask(given, *data), '--workdir')
  released.tokenizer('<end>').save(str(folder / 'tokenizer.json'))
  refused(ask(run, given, *data), 'end-of-document', 'eos_token')
  (folder / 'tokenizer.json').unlink()
  refused(ask(run, given, *data), 'tokenizer.json: no such file')
  refused(ask(run, given, *data, '--config.data.tokenizer=bytes'), '257', '64')
  assert not (tmp_path / 'run').exists()


def test_evaluate_refuses_bad_input_before_jax(tmp_path, texts):
  folder = released.make('qwen3', tmp_path / 'qwen3')
  ask = functools.partial(launch, 'evaluate', imports=['jax'])
  given, data = f'--released={folder}', f'--data={texts}'
  refused(ask(data), 'one of --workdir and --released')
  refused(ask(given), 'no --data=GLOB')
  refused(ask(given, '--data=no/such*'), "--data='no/such*'")
  refused(ask(given, data, '--repeats=4,0'), "--repeats has '0'")
  refused(ask(given, data, '--output=no/such/file'), '--output', 'no/such')
  refused(ask(data, f'--workdir={tmp_path}'), 'config.json')
  refused(ask(f'--released={tmp_path}/no', data), 'no such folder')
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"body": "a cat"}\n')
  refused(ask(given, f'--data={rows}'), 'body', '--field')


def test_folders_that_do_not_fit_leave_no_run(tmp_path):
  begun = open_model(str(released.make('qwen3', tmp_path / 'qwen3')))
  begun.check()
  path = tmp_path / 'qwen3' / 'config.json'
  settings = json.loads(path.read_text())
  path.write_text(json.dumps(settings | {'intermediate_size': 40}))
  with pytest.raises(ConfigError, match='has shape'):
    open_model(str(tmp_path / 'qwen3')).check()


@pytest.fixture(scope='module')
def tuned(texts, tmp_path_factory):
  """(folder, run, Start, Experiment): Qwen3.5's experts, trained further."""
  folder = released.make('qwen3_5_moe', tmp_path_factory.mktemp('released'))
  begun = open_model(str(folder))
  run = tmp_path_factory.mktemp('run')
  asked = experiment(begun, texts)
  result = train(begun, asked, run)
  assert result['step'] == 4
  return folder, run, begun, asked


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_of_text_never_seen(tuned):
  losses = [r['heldout_loss'] for r in records(tuned[1]) if 'heldout_loss' in r]
  assert len(losses) == 2 and losses[1] < losses[0] - 0.1


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_when_its_folder_is_gone(
  tuned, texts, tmp_path
):
  folder, run, *_ = tuned
  begun = open_model(str(shutil.copytree(folder, tmp_path / 'copy')))
  again = tmp_path / 'run'
  asked = experiment(begun, texts)
  signalled = train(begun, asked, again, lambda data: Stopped(data, 3))
  assert signalled == signal.SIGTERM
  kept = read_start(Workdir(again))
  assert kept == begun
  shutil.rmtree(tmp_path / 'copy')
  assert train(kept, asked, again)['step'] == 4
  assert records(again) == records(run)


@pytest.mark.slow
def test_another_start_is_refused(tuned, tmp_path):
  workdir, begun = Workdir(tuned[1]), tuned[2]
  start.require_same_source(workdir, begun, begun.name)
  with pytest.raises(ConfigError, match='started from'):
    start.require_same_source(workdir, begun, str(tmp_path))
  with pytest.raises(ConfigError, match='did not start from released weights'):
    start.require_same_source(workdir, None, begun.name)


@pytest.mark.slow
def test_the_result_is_released_under_the_same_names(tuned, tmp_path):
  folder, run, begun, asked = tuned
  target = tmp_path / 'released'
  write_release(Workdir(run), target)
  assert {p.name for p in target.iterdir()} == {
    p.name for p in folder.iterdir()
  }
  settings = json.loads((target / 'config.json').read_text())
  assert settings == json.loads((folder / 'config.json').read_text())
  assert families.read_config(target)[0].name == 'qwen3_5_moe'
  text = (target / 'tokenizer.json').read_text()
  assert text == (folder / 'tokenizer.json').read_text()
  wanted = checkpoint.load_params(Workdir(run), asked.model)
  _, found = hf.load_model(target)
  assert_equal(found, wanted)
  assert open_model(str(target)).released == begun.released


@pytest.mark.parametrize(
  'file', ['../out.safetensors', '/out.safetensors', 'a/../../out.safetensors']
)
def test_a_run_is_released_inside_its_target_alone(file, texts, tmp_path):
  begun = open_model(str(released.make('qwen3', tmp_path / 'qwen3')))
  begun.released['tensors']['model.norm.weight'][0] = file
  workdir, asked = Workdir(tmp_path / 'run'), experiment(begun, texts)
  workdir.lock(asked, start.make_texts(begun, 'bytes'))
  workdir.unlock()
  target = tmp_path / 'a' / 'b'
  with pytest.raises(
    ConfigError, match='start.json: model.norm.weight'
  ) as error:
    write_release(workdir, target)
  assert repr(file) in str(error.value)
  assert not target.exists() and not list(tmp_path.rglob('out*'))


@pytest.mark.slow
def test_a_run_is_not_released_over_a_model(tuned, tmp_path):
  folder, run, *_ = tuned
  target = shutil.copytree(folder, tmp_path / 'other')
  before = (target / 'model.safetensors').read_bytes()
  with pytest.raises(ConfigError, match='holds a model; give another'):
    write_release(Workdir(run), target)
  assert (target / 'model.safetensors').read_bytes() == before


@pytest.mark.slow
def test_a_run_can_begin_with_a_run_or_a_converted_folder(
  tuned, texts, tmp_path
):
  folder, run, begun, asked = tuned
  from deltanet_jax.hf import convert

  convert.convert_to_orbax(folder, tmp_path / 'converted')
  converted = open_model(str(tmp_path / 'converted'))
  assert converted.model == begun.model
  train(converted, experiment(converted, texts), tmp_path / 'first')
  assert records(tmp_path / 'first') == records(run)

  second = open_model(str(run))
  assert second.released == begun.released
  train(second, experiment(second, texts), tmp_path / 'second')
  before = [r for r in records(run) if 'heldout_loss' in r][-1]
  after = records(tmp_path / 'second')[0]
  assert after['heldout_loss'] == before['heldout_loss']


@pytest.mark.long
@pytest.mark.slow
def test_a_further_token_that_is_not_asked_for_is_carried(texts, tmp_path):
  folder = released.make('qwen3_next', tmp_path / 'r', ['model', 'mtp'])
  begun = open_model(str(folder))
  _, before = hf.load_model(folder)
  changes = {'optim.weight_decay': 0.5, 'train.objective.further': 0.0}
  asked = experiment(begun, texts, **changes, **{'train.steps': 1})
  train(begun, asked, tmp_path / 'run')
  write_release(Workdir(tmp_path / 'run'), tmp_path / 'again')
  _, after = hf.load_model(tmp_path / 'again')
  assert_equal(after['mtp'], before['mtp'])
  same = jax.tree.map(np.array_equal, after['backbone'], before['backbone'])
  assert not any(jax.tree.leaves(same))


@pytest.mark.slow
def test_weights_lie_on_the_mesh_from_the_start(texts, tmp_path):
  begun = open_model(str(released.make('kimi_linear', tmp_path / 'r')))
  asked = experiment(begun, texts, **{'mesh.fsdp': 2, 'mesh.tensor': 2})
  from deltanet_jax.parallel import sharding

  mesh = sharding.make_mesh(asked.mesh)
  program = loop.make_program(asked, mesh)
  params = begun.load(mesh)
  state = program.begin(params)
  places = jax.tree.map(lambda x: x.sharding, program.abstract)
  assert jax.tree.map(lambda x: x.sharding, state) == places
  # no second copy: the state holds the very arrays that were read
  same = jax.tree.map(lambda a, b: a is b, state.params, params)
  assert all(jax.tree.leaves(same))


@pytest.fixture
def trained(texts, tmp_path):
  """Where a user's run began, its flags, and what the command printed."""
  folder = released.make('kimi_linear', tmp_path / 'kimi')
  flags = [f'--config.{name}={value}' for name, value in SHORT.items()]
  flags += [f'--config.data.path={texts}', '--config.train.steps=2']
  begin = f'--released={folder}', f'--workdir={tmp_path / "run"}'
  done = launch('train', *begin, *flags)
  assert done.returncode == 0, done.stderr
  assert 'step 0: held-out loss of ' in done.stderr
  return folder, flags, done.stdout


def converted(tmp_path):
  back = tmp_path / 'back'
  done = launch('convert', f'--from={tmp_path / "run"}', f'--to={back}')
  assert done.returncode == 0, done.stderr
  return back


@pytest.mark.slow
def test_a_user_trains_goes_on_and_converts(trained, tmp_path):
  folder, flags, printed = trained
  run = f'--workdir={tmp_path / "run"}'
  shutil.rmtree(folder)
  for more in ([], [f'--released={folder}', *flags]):
    again = launch('train', run, *more, imports=['jax'])
    assert (again.returncode, again.stdout) == (0, printed), again.stderr
  other = released.make('qwen3', tmp_path / 'other')
  again = launch('train', run, f'--released={other}', *flags, imports=['jax'])
  refused(again, 'started from', str(folder), str(other))
  begun = open_model(str(converted(tmp_path)))
  assert begun.released['family'] == 'kimi_linear'


@pytest.mark.slow
@pytest.mark.long
def test_what_a_user_trained_scores_and_answers_like_its_release(
  trained, texts, tmp_path
):
  run, back = f'--workdir={tmp_path / "run"}', converted(tmp_path)
  scores = []
  for what in (run, f'--released={back}'):
    file = tmp_path / 'score.json'
    done = launch(
      'evaluate', what, f'--data={texts}', '--seq_len=32', '--dtype=float32',
      f'--output={file}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'tokens/s' in done.stderr
    score = json.loads(done.stdout)
    assert score == json.loads(file.read_text())
    scores.append({k: v for k, v in score.items() if k != 'model'})
  done = launch(
    'evaluate', what, f'--data={texts}', '--seq_len=32', '--dtype=float32',
    '--repeats=2',
  )  # fmt: skip
  told = json.loads(done.stdout)
  shares = told.pop('repeats')
  assert told['loss'] == pytest.approx(scores[1]['loss'], rel=1e-6)
  assert sum(share['tokens'] for share in shares[:2]) == told['tokens']
  assert 'repeated' in done.stderr
  assert scores[0] == scores[1]
  assert scores[0]['tokens'] == scores[0]['bytes'] + scores[0]['documents']

  for what in (run, f'--released={back}'):
    done = launch(
      'generate', what, '--chat', '--prompt=the cat', '--max_tokens=3'
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('the cat\n')


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_begin_with_released_weights(texts, tmp_path):
  folder = released.make('qwen3_next', tmp_path / 'released', ['model', 'mtp'])
  flags = [f'--config.{name}={value}' for name, value in SHORT.items()]
  flags += [f'--released={folder}', f'--config.data.path={texts}']
  done = launch('train', f'--workdir={tmp_path / "one"}', *flags)
  assert done.returncode == 0, done.stderr
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = subprocess.run(
    [
      'bash', 'launch/local.sh', '--processes=2', '--',
      f'--workdir={tmp_path / "two"}', *flags, '--config.mesh.fsdp=2',
    ],
    cwd=ROOT,
    text=True,
    capture_output=True,
    env=os.environ | {'XLA_FLAGS': '', 'PATH': path},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  one, two = (
    [
      (r['step'], name, r[name])
      for r in records(tmp_path / run)
      for name in ('loss', 'heldout_loss')
      if name in r
    ]
    for run in ('one', 'two')
  )
  assert [x[:2] for x in one] == [x[:2] for x in two] and len(one) > 5
  np.testing.assert_allclose(
    [x[2] for x in two], [x[2] for x in one], rtol=1e-5
  )
