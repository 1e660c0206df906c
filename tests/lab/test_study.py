"""The study: variants, statistics, files, report."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.study import (
  expect,
  matrix,
  plots,
  report,
  results,
  runner,
  stats,
  training,
)
from deltanet_jax.lab.study.config import Job, StudyConfig, make_model

TINY = StudyConfig(
  d_model=16, layers=2, deep=2, key_dim=4, value_dim=4, hidden=16, length=16,
  pairs=4, batch=4, steps=4, deep_steps=4, chunk=1, items=8,
  lrs=(1e-3, 1e-2), seeds=2, draws=100,
)  # fmt: skip


def fake_arrays(accuracy, seeds=3, items=400, pairs=8, rng=0):
  """Scores of a model that is right with probability accuracy(position)."""
  rng = np.random.default_rng(rng)
  shape = seeds, items, pairs
  position = np.broadcast_to(np.arange(pairs), shape)
  chance = np.broadcast_to(accuracy(position), shape)
  return {
    'correct': rng.random(shape) < chance,
    'nats': np.zeros(shape, np.float32),
    'weights': np.ones(shape, np.float32),
    'tokens': np.zeros(shape, np.int32),
    'slice.pairs': np.full(shape, pairs),
    'slice.position': position,
    'slice.distance': position + 1,
  }


def fake_rows(job, arrays, **facts):
  rows = []
  for step in (job.steps // 2, job.steps):
    for seed in range(3):
      hits = arrays['correct'][seed] * (step / job.steps)
      rows.append(
        {
          'task': job.task, 'model': job.variant, 'layers': job.layers,
          'parameters': 1000, 'cache_floats': 64, 'vocab': 32, 'length': 16,
          'phase': 'fresh', 'lr': 0.01, 'seed': seed, 'step': step,
          'steps': job.steps, 'slice': 'all', 'exact': 0.1, 'nats': 1.0,
          'accuracy': float(hits.mean()), 'targets': 320, 'finite': True,
        } | facts
      )  # fmt: skip
  return rows


def fake_study(tmp_path, accuracies, task='mqar', cfg=TINY):
  """A folder with a made-up job for each variant."""
  folder = results.StudyFolder(tmp_path)
  folder.make(cfg)
  jobs = [Job(task, variant, 4, 8) for variant in accuracies]
  for i, job in enumerate(jobs):
    arrays = fake_arrays(accuracies[job.variant], rng=i)
    rows = fake_rows(job, arrays)
    if job.variant.startswith('gdn'):
      rows += fake_rows(job, arrays, phase='decay', scale=0.5)
    folder.keep(job, rows, arrays, 1.0)
  return folder, jobs


def test_report_of_made_up_scores_says_what_was_made_up(tmp_path):
  flat = lambda p: lambda position: p + 0 * position
  folder, jobs = fake_study(
    tmp_path,
    {
      'full': flat(0.99), 'gdn': lambda x: 0.1 + 0.1 * x, 'linear': flat(0.5),
      'delta': flat(0.99), 'gdn-3:1': flat(0.5), 'gdn-1:1': flat(0.99),
    },
    cfg=StudyConfig(pairs=8, draws=200),
  )  # fmt: skip
  cfg = StudyConfig(pairs=8, draws=200)
  found = report.write_report(cfg, 'study', jobs, folder, folder.collect(jobs))
  text = folder.text.read_text()
  assert 'gdn-3:1 against full attention: worse on mqar -0.' in found.text
  assert (
    'gdn-1:1 against full attention: equal within 0.05 on mqar' in found.text
  )
  verdicts = {
    line.split(' | ')[0]: line.split(' | ')[-1]
    for line in text.splitlines()
    if line.startswith('| ')
  }
  assert 'holds' in verdicts['| full > linear (mqar, most pairs)']
  assert 'undecided' in verdicts['| full > delta (mqar, most pairs)']
  assert 'violated' in verdicts['| gdn-3:1 = full (mqar, most pairs)']
  assert 'holds' in verdicts['| gdn forgets old pairs first']
  assert 'holds' in verdicts['| linear forgets old and new pairs equally']
  assert 'Not shown to have learned' not in text
  assert found.status == 0  # a study reports and does not fail
  page = folder.report.read_text()
  assert page.count('<svg') == 6  # three plots in light and dark
  assert 'http://' not in page.replace('http://www.w3.org', '')
  assert '{{' not in page and '{%' not in page
  assert '<td>full &gt; linear (mqar, most pairs)</td>' in page  # escaped


@pytest.mark.parametrize('variant', ['mla', 'dsa', 'linear', 'kda', 'gdn-3:1'])
def test_every_variant_has_the_parameters_of_full(variant):
  cfg = StudyConfig()
  built, parameters = training.match_parameters(
    cfg, Job('mqar', variant, 4, 8), 64
  )
  full = calc.count_parameters(make_model(cfg, 'full', 64, 4, cfg.hidden))
  assert parameters == calc.count_parameters(built)
  assert abs(parameters / full - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
  'size', ['gpu', pytest.param('study', marks=pytest.mark.long)]
)
def test_every_task_of_a_size_can_be_traced(size):
  import jax

  from deltanet_jax.lab.study import program

  cfg = matrix.SIZES[size]
  seen = set()
  for job in matrix.list_jobs(cfg, size, [], []):
    if job.task in seen:
      continue
    seen.add(job.task)
    task = matrix.make_task(cfg, job.task)
    built, _ = training.match_parameters(cfg, job, task.vocab)
    made = program.make_program(cfg, built, task, job.steps)
    lanes = jax.ShapeDtypeStruct((3,), 'int32')
    rates = jax.ShapeDtypeStruct((3,), 'float32')
    one = jax.ShapeDtypeStruct((), 'int32')
    state = jax.eval_shape(made.init, lanes)
    _, scores = jax.eval_shape(made.advance, state, rates, lanes, one, one)
    assert scores.nats.shape == (3, cfg.items, task.length)
    assert set(task.levels) == set(scores.slices)


def test_interval_of_a_paired_difference_is_narrower_than_of_an_unpaired_one():
  right = np.random.default_rng(0).integers(0, 9, (3, 300))
  asked = np.full((3, 300), 8)
  better = right + 0.2
  part = lambda sign, group, x: stats.Part(sign, group, x, asked)
  same = stats.estimate_sum([part(1, 'a', better), part(-1, 'a', right)], 500)
  apart = stats.estimate_sum([part(1, 'a', better), part(-1, 'b', right)], 500)
  assert np.isclose(same.value, 0.2 / 8) and np.isclose(apart.value, 0.2 / 8)
  assert same.above(0) == stats.HOLDS
  assert apart.above(0) == stats.OPEN
  assert same.high - same.low < 1e-9 < apart.high - apart.low


def test_interval_covers_the_spread_between_seeds():
  asked = np.ones((3, 200))
  right = asked * np.array([[0.0], [0.0], [1.0]])
  e = stats.estimate_sum([stats.Part(1, 'a', right, asked)], 500)
  assert e.low == 0 and e.high == 1 and np.isclose(e.value, 1 / 3)


@pytest.mark.parametrize(
  'interval, above, within',
  [
    ((0.1, 0.2), stats.HOLDS, stats.VIOLATED),
    ((-0.2, -0.1), stats.VIOLATED, stats.VIOLATED),
    ((-0.01, 0.02), stats.OPEN, stats.HOLDS),
    ((0.01, 0.08), stats.HOLDS, stats.OPEN),
  ],
)
def test_verdict_follows_the_whole_interval(interval, above, within):
  e = stats.AccuracyEstimate(sum(interval) / 2, *interval)
  assert e.above(0) == above
  assert e.within(0.05) == within


def test_questions_are_chosen_by_every_limit_and_only_where_asked():
  arrays = {
    'weights': np.array([[[1, 1, 1, 0]]]),
    'slice.a': np.array([[[1, 2, 3, 2]]]),
    'slice.b': np.array([[[0, 5, 5, 5]]]),
  }
  chosen = stats.choose_questions(arrays, {'a': (2, 3), 'b': (5, 5)})
  assert chosen.tolist() == [[[False, True, True, False]]]


def scores(correct, nats, **slices):
  from deltanet_jax.lab.study.program import Scores

  correct = np.array(correct)
  shaped = {k: np.array(v) for k, v in slices.items()}
  ones = np.ones(correct.shape)
  return Scores(correct, np.array(nats, float), ones, shaped, ones)


def test_rows_count_answers_sequences_and_levels():
  got = scores(
    [[[True, False], [True, True]]], [[[1, 3], [0, 0]]], d=[[[1, 5], [2, 9]]]
  )
  rows = training.score_slices(got, 0, {'d': (1, 4)})
  assert rows[0]['accuracy'] == 0.75
  assert rows[0]['exact'] == 0.5
  assert rows[0]['nats'] == 1.0
  assert [(r['slice'], r['accuracy']) for r in rows[1:]] == [
    ('d=1', 1.0), ('d=4', 0.5),
  ]  # fmt: skip


def test_what_is_not_finite_has_no_accuracy_and_is_never_the_best_rate():
  got = scores([[[True]], [[False]]], [[[np.nan]], [[1.0]]])
  rows = [training.score_all(got, 0), training.score_all(got, 1)]
  assert rows[0]['accuracy'] is None and not rows[0]['finite']
  assert training.choose_rate([1.0, 0.1], rows) == 0.1
  assert training.choose_rate([1.0], rows[:1]) is None


def test_of_rates_that_are_as_good_the_smallest_is_taken():
  rows = [{'finite': True, 'accuracy': x} for x in (0.7, 0.9, 0.915, 0.91)]
  assert training.choose_rate([0.001, 0.002, 0.004, 0.008], rows) == 0.002
  rows[1]['accuracy'] = 0.89
  assert training.choose_rate([0.001, 0.002, 0.004, 0.008], rows) == 0.004


def test_interrupted_study_ends_with_the_files_of_an_unbroken_one(
  tmp_path, monkeypatch
):
  jobs = [Job('mqar', variant, 1, 4) for variant in ('full', 'gdn', 'delta')]
  calls = []

  def fake(cfg, job, task, tell):
    calls.append(job.variant)
    tell(0.5)
    if len(calls) == 2:
      raise KeyboardInterrupt
    arrays = fake_arrays(lambda x: 0.5 + 0 * x)
    return fake_rows(job, arrays), arrays

  monkeypatch.setattr(training, 'run_job', fake)
  broken, whole = (results.StudyFolder(tmp_path / n) for n in 'ab')
  broken.make(TINY)
  whole.make(TINY)
  with pytest.raises(KeyboardInterrupt):
    runner.run_jobs(TINY, jobs, broken, 1)
  assert [broken.done(c) for c in jobs] == [True, False, False]
  assert runner.run_jobs(TINY, jobs, broken, 1) == {}
  assert calls == ['full', 'gdn', 'gdn', 'delta']
  runner.run_jobs(TINY, jobs, whole, 2)
  broken.collect(jobs)
  whole.collect(jobs)
  assert broken.results.read_bytes() == whole.results.read_bytes()
  assert broken.summary.read_bytes() == whole.summary.read_bytes()


def test_job_that_raises_is_told_and_the_others_run(tmp_path, monkeypatch):
  def fake(cfg, job, task, tell):
    if job.variant == 'gdn':
      raise RuntimeError('no such luck')
    arrays = fake_arrays(lambda x: 0.5 + 0 * x)
    return fake_rows(job, arrays), arrays

  monkeypatch.setattr(training, 'run_job', fake)
  cfg = dataclasses.replace(TINY, length=32, pairs=8)
  folder = results.StudyFolder(tmp_path)
  folder.make(cfg)
  jobs = [Job('mqar', variant, 1, 4) for variant in ('gdn', 'full')]
  errors = runner.run_jobs(cfg, jobs, folder, 1)
  assert list(errors) == ['mqar.gdn']
  assert [folder.done(c) for c in jobs] == [False, True]
  monkeypatch.setattr(plots, 'draw_plots', lambda view, folder: [])
  found = report.write_report(cfg, 'study', jobs, folder, folder.collect(jobs))
  assert 'Not trained yet: mqar.gdn.' in found.text


def test_folder_of_other_sizes_is_refused(tmp_path):
  folder = results.StudyFolder(tmp_path)
  folder.make(TINY)
  folder.check(TINY)
  with pytest.raises(ConfigError, match='batch: 4 != 8'):
    folder.check(dataclasses.replace(TINY, batch=8))


def test_models_given_run_on_every_task_given():
  cfg = matrix.SIZES['study']
  found = matrix.list_jobs(cfg, 'study', ['kda', 'full'], ['copy', 's5'])
  assert [(c.task, c.variant) for c in found] == [
    ('copy', 'kda'), ('copy', 'full'), ('s5', 'kda'), ('s5', 'full'),
  ]  # fmt: skip
  with pytest.raises(ValueError, match='repeats 8 layers'):
    matrix.list_jobs(cfg, 'study', ['gdn-7:1'], ['deep'])
  with pytest.raises(ValueError, match="no task 'mqr'"):
    matrix.list_jobs(cfg, 'study', [], ['mqr'])
  with pytest.raises(ValueError, match="no model 'gdm'"):
    matrix.list_jobs(cfg, 'study', ['gdm'], [])


def test_hybrid_ends_each_period_with_attention():
  cfg = StudyConfig()
  built = make_model(cfg, 'gdn-3:1', 64, 4, 32)
  kinds = [type(layer.mixer).__name__[:5] for layer in built.layers]
  assert kinds == ['Atten', 'Gated', 'Gated', 'Gated', 'Atten']
  assert built.layers[0].mixer.window == 2
  assert built.layers[4].mixer.rotary_dim == 0


def test_break_even_is_the_first_context_that_saves():
  assert report.find_break_even(lambda n: 999 - 3 * n) == 333
  assert report.find_break_even(lambda n: -1) == 1
  assert report.find_break_even(lambda n: 1) is None


def test_gate_fails_on_the_wrong_side_of_its_bound():
  cfg = StudyConfig(pairs=8, draws=100)
  good = {'full-nope': 1, 'linear': 0.5, 'delta': 0.5, 'delta-1:1': 0.99}
  for variants, failed in (
    (good, []),
    (good | {'delta-1:1': 0.8}, ['delta-1:1']),
    (good | {'full-nope': 0.9, 'linear': 1}, ['full-nope', 'linear']),
  ):
    arrays = {
      ('mqar', variant): fake_arrays(lambda x, p=p: p + 0 * x)
      for variant, p in variants.items()
    }
    wanted = expect.list_smoke_expectations(cfg)
    found = expect.judge_all(wanted, arrays, cfg.draws)
    names = [
      e.terms[0].variant for e, f in zip(wanted, found, strict=True) if f.failed
    ]
    assert names == failed


def test_decay_is_scaled_by_its_parameter():
  import jax.numpy as jnp

  from deltanet_jax.lab.study.program import scale_decay

  g = lambda p: -jnp.exp(p['mixer']['A_log']) * 0.7
  params = {'mixer': {'A_log': jnp.array([0.3, -1.0]), 'q': jnp.ones(2)}}
  for scale in (0.0, 0.5, 2.0):
    changed = scale_decay(params, scale)
    np.testing.assert_allclose(g(changed), scale * g(params), rtol=1e-6)
    assert (changed['mixer']['q'] == 1).all()


@pytest.mark.slow
def test_members_learn_apart_and_a_score_changes_nothing():
  import jax
  import jax.numpy as jnp

  from deltanet_jax.lab.study import program

  cfg = dataclasses.replace(TINY, local=0, steps=8)
  task = matrix.make_task(cfg, 'parity')
  built = make_model(cfg, 'full', task.vocab, 1, 8)
  made = program.make_program(cfg, built, task, cfg.steps)
  seeds, rates = jnp.int32([0, 1, 0]), jnp.float32([0.01, 0.01, 0.03])
  call = lambda state, a, b: made.advance(
    state, rates, seeds, jnp.int32(a), jnp.int32(b)
  )
  state, whole = call(made.init(seeds), 0, 8)
  state, again = call(state, 8, 8)  # no step: the same model, the same scores
  np.testing.assert_array_equal(whole.nats, again.nats)
  halves, _ = call(made.init(seeds), 0, 4)
  _, halves = call(halves, 4, 8)
  np.testing.assert_array_equal(whole.nats, halves.nats)
  # every step has its own data
  _, early = call(made.init(seeds), 0, 4)
  _, late = call(made.init(seeds), 4, 8)
  assert (early.nats[0] != late.nats[0]).any()
  # a seed has its data, whatever the rate; another seed has others
  np.testing.assert_array_equal(whole.tokens[0], whole.tokens[2])
  assert (whole.tokens[0] != whole.tokens[1]).any()
  assert (whole.nats[0] != whole.nats[2]).any()
  assert jax.device_get(whole.correct).shape == (3, cfg.items, task.length)


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], ['--workdir']),
    (['--workdir=x', '--config.d_modle=3'], ["mean 'd_model'"]),
    (['--workdir=x', '--models=gdn-7:1'], ['8 layers', 'has 4']),
    (['--workdir=x', '--config.steps=7'], ['steps is 7', 'multiple']),
    (['--workdir=deltanet_jax/lab/study/__main__.py'], ['is a file']),
  ],
)
def test_bad_command_line_is_refused_before_jax_is_imported(flags, words):
  code = (
    'import runpy, sys\nsys.modules["jax"] = None\n'
    'sys.argv[0] = "launch.study"\n'
    'runpy.run_module("launch.study", run_name="__main__", alter_sys=True)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, *flags], capture_output=True, text=True
  )
  assert done.returncode == 2, done.stderr
  assert done.stdout == '' and done.stderr.count('\n') == 1
  for word in words:
    assert word in done.stderr


def test_scaled_decays_are_drawn_of_whatever_has_them(tmp_path):
  names = {'full': lambda x: 1 + 0 * x, 'gdn-3:1': lambda x: 0.5 + 0 * x}
  for task, count in (('deep', 3), ('mqar', 3)):
    (tmp_path / task).mkdir()
    cfg = StudyConfig(pairs=8, draws=100)
    folder, jobs = fake_study(tmp_path / task, names, task, cfg)
    arrays = {(c.task, c.variant): folder.arrays(c) for c in jobs}
    view = plots.View(cfg, folder.collect(jobs), arrays)
    drawn = [name for name, *_ in plots.draw_plots(view, folder.plots)]
    assert len(drawn) == count
    assert ('gates' in drawn) == (task == 'deep')
  assert view.scaled() == {}


def test_claims_about_variants_that_only_guess_are_not_judged():
  arrays = {
    ('mqar', variant): fake_arrays(lambda x, p=p: p + 0 * x)
    for variant, p in (('full', 0.9), ('gdn', 1 / 8), ('delta', 0.4))
  }
  view = plots.View(StudyConfig(pairs=8, draws=100), [], arrays)
  untrained = report.find_untrained(view)
  assert untrained == [('mqar', 'gdn')]
  (sentence,) = report.describe_untrained(untrained)
  assert sentence.startswith('Not shown to have learned mqar: gdn.')
  terms = expect.Term(1, 'mqar', 'full'), expect.Term(-1, 'mqar', 'gdn')
  claim = expect.Expectation('full > gdn', terms)
  judge = lambda *skip: expect.judge_all([claim], arrays, 100, *skip)
  assert judge()[0].verdict == stats.HOLDS
  assert judge(untrained)[0].verdict == stats.UNTRAINED
