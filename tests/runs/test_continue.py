"""What ends a run, and what comes between, keeps none from going on rightly."""

import dataclasses
import errno
import io
import json
import math
import os
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags

from deltanet_jax.cli.train import train_run
from deltanet_jax.config import ConfigError
from deltanet_jax.data.text import TextData
from deltanet_jax.objectives.score import Score
from deltanet_jax.runs import folder
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.train import log, loop
from deltanet_jax.train.optimizer import make_schedule
from tests.tiny_run import (
  Crash,
  Spoiled,
  assert_same_run,
  compiled_once,
  crash,
  make_experiment,
  texts,
  train,
  unbroken,
)


def _strict(path):
  """JSON as its standard has it: without NaN and Infinity."""

  def refuse(name):
    raise AssertionError(f'{name} in {path}')

  return [
    json.loads(text, parse_constant=refuse)
    for text in (
      path.read_text().splitlines()
      if path.suffix == '.jsonl'
      else [path.read_text()]
    )
  ]


def test_the_perplexity_of_a_model_that_diverged_is_infinite():
  assert Score(nats=8e5, tokens=1000, ends=0).perplexity == math.inf
  assert Score(nats=7e5, tokens=1000, ends=0).perplexity == math.exp(700)
  assert math.isnan(Score(nats=math.nan, tokens=1, ends=0).perplexity)


def _drop(folder, *steps):
  """As if the process had ended after an earlier checkpoint."""
  (folder / 'result.json').unlink()
  for step in steps:
    shutil.rmtree(folder / 'checkpoints' / str(step))


@pytest.fixture
def begun(unbroken, tmp_path):
  """A copy of the unbroken run that ended after step 6 of 9."""
  folder = tmp_path / 'run'
  shutil.copytree(unbroken[0], folder)
  _drop(folder, 9)
  return folder


@pytest.fixture
def other_texts(texts, tmp_path):
  """The texts with one file more."""
  folder = tmp_path / 'other'
  shutil.copytree(texts, folder)
  (folder / 'new.txt').write_text('zq xj ' * 40)
  return folder


def _with(texts, **changes):
  """(the experiment of the unbroken run, TextData of other files)."""
  experiment = make_experiment(texts)
  data = dataclasses.replace(experiment.data, **changes)
  return experiment, TextData(data)


@pytest.mark.parametrize('change', ['more', 'fewer', 'bytes', 'order'])
def test_a_run_whose_text_has_changed_is_refused_by_what_changed(
  texts, other_texts, begun, change
):
  old, words = other_texts / '3.txt', {
    'more': ['files: 40 before, 41 now', 'documents: 40 before, 41 now'],
    'fewer': ['files: 40 before, 39 now', 'bytes: '],
    'bytes': ['the same number of files, documents and bytes, other contents'],
    'order': ['the same number of files, documents and bytes, other contents'],
  }[change]  # fmt: skip
  if change != 'more':
    (other_texts / 'new.txt').unlink()
  if change == 'fewer':
    old.unlink()
  elif change == 'bytes':
    held = TextData(make_experiment(other_texts).data).heldout_documents
    texts_ = sorted(other_texts.glob('*.txt'))
    first, second = [p for p in texts_ if p.read_bytes() not in set(held)][:2]
    first.write_bytes(first.read_bytes()[::-1])
  elif change == 'order':
    (other_texts / '0.txt').rename(other_texts / 'z.txt')
  experiment, data = _with(texts, path=f'{other_texts}/*.txt')
  before = {p: p.stat().st_mtime_ns for p in begun.rglob('*') if p.is_file()}
  with pytest.raises(ConfigError) as error:
    train(experiment, begun, data)
  message = str(error.value)
  if change == 'bytes' and words[0] not in message:
    words = ['held-out documents: ']  # the new content fell on that side
  assert '\n' not in message and '--new_text' in message
  assert all(word in message for word in words), message
  after = {p: p.stat().st_mtime_ns for p in begun.rglob('*') if p.is_file()}
  assert after == before  # nothing was written


def test_a_run_told_so_goes_on_with_another_text_from_its_first_row(
  texts, other_texts, begun, unbroken
):
  experiment = make_experiment(texts)
  data = dataclasses.replace(experiment.data, path=f'{other_texts}/*.txt')
  other = dataclasses.replace(experiment, data=data)
  with pytest.raises(ConfigError, match='data.path.* or add --new_text'):
    Workdir(begun).check(other)
  Workdir(begun).check(other, new_text=True)
  seen, stream = [], io.StringIO()
  spoiled = Spoiled(data, 1, lambda batch: seen.append(batch))
  workdir = Workdir(begun)
  crashing = Spoiled(data, 8, crash)
  with pytest.raises(Crash):
    loop.train(other, workdir, crashing, stream, new_text=True)
  workdir.unlock()
  assert 'new text from here on (files: 40 before, 41 now' in (
    stream.getvalue()
  )
  # killed before the next checkpoint, it begins at the same row again; the
  # flag may stay or go
  loop.train(other, workdir, spoiled, io.StringIO())
  workdir.unlock()
  assert workdir.read() == other
  own = TextData(data)
  own.begin(6)
  assert len(seen) == 3
  for step, batch in enumerate(seen, 6):
    for name, x in own.make_batch(step).items():
      np.testing.assert_array_equal(batch[name], x)
  # an epoch from here on has every row of the new text once, in an order
  # that is not the one of the same text at the run's beginning
  rows = own._train_rows.full
  again = TextData(data)
  epochs = [
    [b['tokens'].tobytes() for b in _rows(text, first, rows)]
    for text, first in ((own, 6), (again, 0))
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
  # what was before is kept, and a third start repeats it to the bit
  lines = (begun / 'metrics.jsonl').read_bytes()
  old = (unbroken[0] / 'metrics.jsonl').read_text().splitlines(True)
  old = [line for line in old if json.loads(line)['step'] <= 6]
  assert lines.startswith(''.join(old).encode()) and len(old) == 4
  _drop(begun, 9)
  loop.train(other, workdir, TextData(data), io.StringIO(), new_text=True)
  workdir.unlock()
  assert (begun / 'metrics.jsonl').read_bytes() == lines


def _rows(data, first, count):
  """The first `count` rows from step `first` on."""
  for i in range(count):
    step, row = divmod(i, 8)
    yield {name: x[row] for name, x in data.make_batch(first + step).items()}


def test_a_checkpoint_from_before_the_new_text_takes_it_from_there(tmp_path):
  workdir, text = Workdir(tmp_path), {'files': 1, 'sums': [1, 2]}
  assert workdir.take_text({'files': 1, 'sums': [0, 2]}, 0) == (0, None)
  since, said = workdir.take_text(text, 6)
  assert since == 6 and 'the same number of files' in said
  assert workdir.take_text(text, 9) == (6, None)
  # the newer checkpoints are damaged
  assert workdir.take_text(text, 3) == workdir.take_text(text, 9) == (3, None)


def test_another_platform_is_said_and_recorded_with_its_step(tmp_path):
  workdir = Workdir(tmp_path)
  entry = lambda step, name, form: {
    'step': step, 'platform': name, 'forms': {'KDA': form},
  }  # fmt: skip
  take = lambda platform, form, step: workdir.take_forms(
    {'KDA': form}, platform, step
  )
  assert take('tpu', 'kernel', 0) == 'on tpu: KDA kernel'
  assert take('tpu', 'kernel', 5) == 'on tpu: KDA kernel'
  said = 'on cpu: KDA chunked; up to this step on tpu: KDA kernel'
  assert take('cpu', 'chunked', 6) == said
  stored = lambda: json.loads(workdir.forms.read_text())['since']
  before = [entry(0, 'tpu', 'kernel'), entry(6, 'cpu', 'chunked')]
  assert stored() == before
  # from an older checkpoint: what came after it did not happen
  assert take('tpu', 'kernel', 4) == 'on tpu: KDA kernel'
  assert stored() == before[:1]
  assert take('cpu', 'recurrent', 4).endswith('on tpu: KDA kernel')
  assert stored() == [before[0], entry(4, 'cpu', 'recurrent')]


def test_a_run_stored_before_texts_were_known_goes_on_and_keeps_its_text(
  texts, begun, unbroken, other_texts
):
  workdir, experiment = Workdir(begun), make_experiment(texts)
  workdir.corpus.unlink()
  stream = io.StringIO()
  loop.train(experiment, workdir, TextData(experiment.data), stream)
  workdir.unlock()
  told = [
    x for x in stream.getvalue().splitlines() if 'assumed to be the same' in x
  ]
  assert len(told) == 1
  assert workdir.corpus.read_text() == Workdir(unbroken[0]).corpus.read_text()
  assert_same_run(begun, unbroken)
  _drop(begun)
  with pytest.raises(ConfigError, match='files: 40 before, 41 now'):
    train(*_with(texts, path=f'{other_texts}/*.txt')[:1], begun,
           _with(texts, path=f'{other_texts}/*.txt')[1])  # fmt: skip


def test_a_checkpoint_that_is_damaged_twice_ends_no_run(texts, begun, unbroken):
  for _ in range(3):
    train(make_experiment(texts), begun)
    assert_same_run(begun, unbroken)
    _drop(begun)
    shutil.rmtree(begun / 'checkpoints' / '9' / 'params')
  names = {path.name for path in (begun / 'checkpoints').glob('damaged*')}
  assert names == {'damaged-9', 'damaged-9-2'}


@pytest.mark.parametrize(
  'tail',
  [
    b'\0' * 300 + b'\n',
    *(
      pytest.param(tail, marks=pytest.mark.slow)
      for tail in (
        b'\0' * 300,
        b'3\n',
        b'{"loss": 1}\n',
        b'\xff\xfe\n',
        b'[' * 10**5 + b'\n',
      )
    ),
  ],
)
def test_lines_that_a_lost_power_left_are_no_lines(
  texts, begun, unbroken, tail, capsys
):
  for name in ('metrics.jsonl', 'timing.jsonl'):
    with open(begun / name, 'ab') as file:
      file.write(tail)
  train(make_experiment(texts), begun)
  assert_same_run(begun, unbroken)
  told = capsys.readouterr().err.count('is no record; left out')
  assert told == 2 * tail.endswith(b'\n')


def test_a_finished_run_without_its_timing_is_scored(texts, begun, unbroken):
  train(make_experiment(texts), begun)
  _drop(begun)
  (begun / 'timing.jsonl').unlink()
  result = train(make_experiment(texts), begun)
  assert result['tokens_per_second'] is None
  assert_same_run(begun, unbroken)


def test_a_run_that_diverged_ends_with_numbers_that_json_has(
  texts, begun, monkeypatch
):
  monkeypatch.setattr(
    loop, 'score_batches', lambda *args: Score(nats=8e5, tokens=1000, ends=0)
  )
  result = train(make_experiment(texts), begun)
  assert result['heldout_perplexity'] == math.inf
  (kept,) = _strict(begun / 'result.json')
  assert kept['heldout_perplexity'] is None and kept['heldout_loss'] == 800
  monkeypatch.setattr(
    loop,
    'score_batches',
    lambda *args: Score(nats=math.nan, tokens=1000, ends=0),
  )
  _drop(begun)
  train(make_experiment(texts), begun)
  assert _strict(begun / 'result.json')[0]['heldout_loss'] is None
  assert _strict(begun / 'metrics.jsonl')


def _full(*unused, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
  'where',
  [
    'metrics',
    'save',
    *(
      pytest.param(where, marks=pytest.mark.slow)
      for where in ('timing', 'board', 'sync', 'plot', 'result', 'claim')
    ),
  ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
  texts, begun, unbroken, monkeypatch, capsys, where
):
  experiment = make_experiment(texts)
  data = TextData(experiment.data)
  target, name = {
    'metrics': (log.Log, 'metrics'),
    'timing': (log.Log, 'timing'),
    'board': (log.Board, 'flush'),
    'sync': (log.JsonLines, 'sync'),
    'plot': (log, 'draw_losses'),
    'result': (loop, 'write_text'),
    'save': (ocp.CheckpointManager, 'save'),
    'claim': (folder, 'write_text'),
  }[where]
  from deltanet_jax.cli.train import _train

  flags.FLAGS.mark_as_parsed()
  with monkeypatch.context() as patch:
    write = loop.write_text

    def only(path, text):
      names = {'result': 'result.json', 'claim': 'config.json'}
      return _full() if path.name == names[where] else write(path, text)

    patch.setattr(target, name, only if name == 'write_text' else _full)
    workdir = Workdir(begun)
    with pytest.raises((SystemExit, ConfigError)) as error:
      _train(experiment, workdir, data, None, 'bytes')
    workdir.unlock()
  told = [x for x in capsys.readouterr().err.splitlines() if 'error: ' in x]
  if where == 'claim':
    assert error.type is ConfigError and 'No space left' in str(error.value)
  else:
    assert error.value.code == 1 and len(told) == 1
    assert 'No space left on device' in told[0]
  assert not list(begun.rglob('*.tmp*'))
  train(experiment, begun)
  assert_same_run(begun, unbroken)


@pytest.mark.parametrize('name', ['result.json', 'config.json', 'text.json'])
@pytest.mark.parametrize(
  'content', [b'', b'{', b'3', b'\xff', b'\0' * 9, b'[' * 10**5, b'[]']
)
def test_files_of_a_run_that_are_no_json_are_refused_by_name(
  texts, tmp_path, name, content
):
  workdir = Workdir(tmp_path)
  workdir.lock(make_experiment(texts))
  workdir.unlock()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError) as error:
    workdir.read()
    workdir.read_result()
    workdir.check_text({'sums': 0})
  message = str(error.value)
  assert '\n' not in message and str(tmp_path / name) in message


def test_results_of_no_run_are_refused_by_name(tmp_path):
  workdir = Workdir(tmp_path)
  (tmp_path / 'result.json').write_text('{}')
  with pytest.raises(
    ConfigError, match='result.json: not the results of a run'
  ):
    workdir.read_result()


def _of_steps(texts, steps):
  experiment = make_experiment(texts)
  longer = dataclasses.replace(experiment.train, steps=steps)
  return dataclasses.replace(experiment, train=longer)


@pytest.fixture
def finished(unbroken, tmp_path):
  folder = tmp_path / 'finished'
  shutil.copytree(unbroken[0], folder)
  return folder


def test_a_finished_run_is_made_longer(texts, finished, tmp_path, capsys):
  again = tmp_path / 'again'
  shutil.copytree(finished, again)
  before = (finished / 'metrics.jsonl').read_bytes()
  experiment, workdir = _of_steps(texts, 12), Workdir(finished)
  workdir.check(experiment)
  stream, data = io.StringIO(), Spoiled(experiment.data, 11, crash)
  with pytest.raises(Crash):
    loop.train(experiment, workdir, data, stream)
  workdir.unlock()
  # killed on the way, it is a run of 12 steps that has not finished
  assert workdir.read() == experiment and workdir.read_result() is None
  assert (finished / 'metrics.jsonl').read_bytes().startswith(before)
  said = [x for x in stream.getvalue().splitlines() if 'steps instead of' in x]
  assert len(said) == 1
  assert '12 steps instead of 9' in said[0] and 'cosine' in said[0]

  flags.FLAGS.mark_as_parsed()
  result = train_run(workdir.read(), workdir)
  workdir.unlock()
  told = capsys.readouterr().err
  assert 'continuing after step 9' in told and 'steps instead of' not in told
  assert result['step'] == 12 and result == workdir.read_result()
  assert train_run(workdir.read(), workdir) == result
  assert 'is already finished' in capsys.readouterr().err

  lines = (finished / 'metrics.jsonl').read_bytes()
  assert lines.startswith(before)
  records = log.read_records(finished / 'metrics.jsonl')
  rates = {r['step']: r['lr'] for r in records if 'lr' in r}
  assert list(rates) == [2, 4, 6, 8, 9, 10, 12]
  for step, rate in rates.items():
    factor = make_schedule(experiment.optim, 12 if step > 9 else 9)
    np.testing.assert_allclose(
      rate, experiment.optim.lr * factor(step - 1), rtol=1e-5
    )
  # to the bit what it is without the crash
  train_run(experiment, Workdir(again))
  assert (again / 'metrics.jsonl').read_bytes() == lines


def test_a_run_killed_while_it_is_made_longer_has_its_results_to_write(
  texts, finished, unbroken, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(folder, 'write_text', _full)
    workdir = Workdir(finished)
    with pytest.raises(ConfigError, match='No space left'):
      workdir.lock(_of_steps(texts, 12))
    workdir.unlock()
  assert workdir.read_result() is None
  train(make_experiment(texts), finished)
  assert_same_run(finished, unbroken)


def test_steps_that_are_done_cannot_be_taken_back(texts, finished, begun):
  for path, steps, done in ((finished, 8, 9), (begun, 5, 6)):
    with pytest.raises(ConfigError) as error:
      Workdir(path).check(_of_steps(texts, steps))
    assert f'has done {done} steps; give {done} or more' in str(error.value)
  Workdir(begun).check(_of_steps(texts, 7))  # it has never done more
  shutil.rmtree(finished / 'checkpoints')
  with pytest.raises(ConfigError, match='results of 9 steps and no checkpoint'):
    Workdir(finished).check(_of_steps(texts, 12))
  Workdir(finished).check(make_experiment(texts))
