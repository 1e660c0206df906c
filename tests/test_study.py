"""The study: arms, statistics, files, report."""

import numpy as np
import pytest

from deltanet_jax import calc
from deltanet_jax.study import (
  cell as cells_,
  matrix,
  report,
  results,
)
from deltanet_jax.study.config import ARMS, Cell, StudyConfig, model

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


def fake_rows(cell, arrays, **facts):
  rows = []
  for step in (cell.steps // 2, cell.steps):
    for seed in range(3):
      hits = arrays['correct'][seed] * (step / cell.steps)
      rows.append(
        {
          'task': cell.task, 'model': cell.arm, 'layers': cell.layers,
          'parameters': 1000, 'cache_floats': 64, 'vocab': 32, 'length': 16,
          'phase': 'fresh', 'lr': 0.01, 'seed': seed, 'step': step,
          'steps': cell.steps, 'slice': 'all', 'exact': 0.1, 'nats': 1.0,
          'accuracy': float(hits.mean()), 'targets': 320, 'finite': True,
        } | facts
      )  # fmt: skip
  return rows


def fake_study(tmp_path, accuracies, task='mqar', cfg=TINY):
  """A folder with a made-up cell for each arm."""
  folder = results.Folder(tmp_path / 'study')
  folder.make(cfg)
  cells = [Cell(task, arm, 4, 8) for arm in accuracies]
  for i, cell in enumerate(cells):
    arrays = fake_arrays(accuracies[cell.arm], rng=i)
    rows = fake_rows(cell, arrays)
    if cell.arm.startswith('gdn'):
      rows += fake_rows(cell, arrays, phase='decay', scale=0.5)
    folder.keep(cell, rows, arrays, 1.0)
  return folder, cells


def test_report_of_made_up_scores_says_what_was_made_up(tmp_path):
  flat = lambda p: lambda position: p + 0 * position
  folder, cells = fake_study(
    tmp_path,
    {
      'full': flat(0.99), 'gdn': lambda x: 0.1 + 0.1 * x, 'linear': flat(0.5),
      'delta': flat(0.99), 'gdn-3:1': flat(0.5), 'gdn-1:1': flat(0.99),
    },
    cfg=StudyConfig(pairs=8, draws=200),
  )  # fmt: skip
  cfg = StudyConfig(pairs=8, draws=200)
  found = report.write(cfg, 'study', cells, folder, folder.collect(cells))
  text = folder.text.read_text()
  assert 'gdn-3:1 gave up mqar -0.' in found.text
  assert 'gdn-1:1 was equal within 0.05 on mqar' in found.text
  verdicts = {
    line.split(' | ')[0]: line.split(' | ')[-1]
    for line in text.splitlines()
    if line.startswith('| ')
  }
  assert 'holds' in verdicts['| full > linear (mqar, hardest size)']
  assert 'not resolved' in verdicts['| full > delta (mqar, hardest size)']
  assert 'violated' in verdicts['| gdn-3:1 = full (mqar, hardest size)']
  assert 'holds' in verdicts['| gdn forgets old pairs first']
  assert 'holds' in verdicts['| linear forgets old and new pairs alike']
  assert found.status == 0  # a study reports and does not fail
  page = folder.report.read_text()
  assert page.count('<svg') == 6  # three pictures in light and dark
  assert 'http://' not in page.replace('http://www.w3.org', '')
  assert '@' not in page.replace('@media', '')


@pytest.mark.parametrize('arm', [a for a in ARMS if '7:1' not in a])
def test_every_arm_has_the_parameters_of_full(arm):
  cfg = StudyConfig()
  built, parameters = cells_.fit(cfg, Cell('mqar', arm, 4, 8), 64)
  full = calc.parameters(model(cfg, 'full', 64, 4, cfg.hidden))
  assert parameters == calc.parameters(built)
  assert abs(parameters / full - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('size', list(matrix.SIZES))
def test_every_cell_of_a_size_can_be_traced(size):
  import jax

  from deltanet_jax.study import program

  cfg = matrix.SIZES[size]
  seen = set()
  for cell in matrix.cells(cfg, size, [], []):
    kinds = {('task', cell.task), ('arm', cell.arm)} - seen
    if not kinds:
      continue
    seen |= kinds
    task = matrix.make_task(cfg, cell.task)
    built, _ = cells_.fit(cfg, cell, task.vocab)
    made = program.make(cfg, built, task, cell.steps)
    lanes = jax.ShapeDtypeStruct((3,), 'int32')
    rates = jax.ShapeDtypeStruct((3,), 'float32')
    one = jax.ShapeDtypeStruct((), 'int32')
    state = jax.eval_shape(made.init, lanes)
    _, scores = jax.eval_shape(made.advance, state, rates, lanes, one, one)
    assert scores.nats.shape == (3, cfg.items, task.length)
    assert set(task.levels) == set(scores.slices)
