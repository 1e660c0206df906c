"""Tasks of recall against readers that see the tokens of a row and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.data import synthetic
from deltanet_jax.data.synthetic import MQAR, Copy
from deltanet_jax.evals import accuracy


def read_mqar(task, row):
  """{position: value} by a dictionary; a key seen again is a question."""
  known, answers = {}, {}
  for t in range(0, len(row), 2):
    if row[t] >= task.keys or row[t] in known:
      break
    known[row[t]] = row[t + 1]
  for t in range(2 * len(known), len(row)):
    if row[t] < task.keys:
      answers[t] = known[row[t]]
  return answers


def read_copy(task, row):
  n = row.index(task.symbols)
  return {n + j: row[j] for j in range(n)}


TASKS = {
  'mqar': (MQAR(32, (2, 4, 8), 16, 16, 5), read_mqar),
  'mqar full': (MQAR(32, (8,), 8, 8, 1), read_mqar),
  'copy': (Copy((3, 5, 8), 7), read_copy),
  'copy one': (Copy((1,), 2), read_copy),
}
every_task = pytest.mark.parametrize('name', TASKS)
DRAWN = {}


def draw(task, seed=0, batch=256):
  if (task, seed) not in DRAWN:
    sample = jax.jit(task.sample, static_argnums=1)
    DRAWN[task, seed] = jax.tree.map(
      np.asarray, sample(jax.random.key(seed), batch)
    )
  return DRAWN[task, seed]


def predictions(task, example, answer):
  """What `answer(row)`, {position: token}, gives; -1 elsewhere."""
  guess = np.full(example.tokens.shape, -1)
  for b, row in enumerate(example.tokens.tolist()):
    for t, token in answer(row).items():
      guess[b, t] = token
  return guess


@every_task
def test_a_reader_of_the_tokens_finds_every_question_and_answer(name):
  task, read = TASKS[name]
  e = draw(task)
  found = predictions(task, e, lambda row: read(task, row))
  np.testing.assert_array_equal(found >= 0, e.weights > 0)
  np.testing.assert_array_equal(found[found >= 0], e.targets[found >= 0])
  assert set(np.unique(e.weights)) <= {0, 1} and (e.weights.sum(-1) > 0).all()


@every_task
def test_types_shapes_and_ranges(name):
  task, _ = TASKS[name]
  e = draw(task)
  assert e.tokens.dtype == e.targets.dtype == np.int32
  assert e.weights.dtype == np.float32
  for x in (e.tokens, e.targets, e.weights, *e.slices.values()):
    assert x.shape == (256, task.length)
  assert 0 <= e.tokens.min() and e.tokens.max() < task.vocab
  assert 0 <= e.targets.min() and e.targets.max() < task.vocab
  assert len(np.unique(e.tokens)) > task.vocab / 2
  assert e.slices.keys() == task.levels.keys()
  for slice_name, values in e.slices.items():
    assert values.dtype == np.int32
    np.testing.assert_array_equal(values >= 0, e.weights > 0)
    levels = task.levels[slice_name]
    assert list(levels) == sorted(set(levels))
    by = accuracy.tally_by(e.targets, e, slice_name, levels)
    assert by.count.sum() == e.weights.sum()


@every_task
def test_the_key_decides_and_vmap_draws_the_same(name):
  task, _ = TASKS[name]
  keys = jnp.stack([jax.random.key(seed) for seed in (0, 1)])
  both = jax.jit(jax.vmap(lambda key: task.sample(key, 256)))(keys)
  first = jax.tree.map(lambda x: x[0], both)
  jax.tree.map(np.testing.assert_array_equal, first, draw(task, seed=0))
  assert (both.tokens[0] != both.tokens[1]).any()


@every_task
def test_simple_tricks_fail(name):
  task, _ = TASKS[name]
  e = draw(task)
  floor = 1 / {'mqar': 16, 'mqar full': 8, 'copy': 7, 'copy one': 2}[name]
  before = np.pad(e.tokens, [(0, 0), (1, 0)])[:, :-1]
  assert accuracy.majority(e, task.vocab) < 1.4 * floor
  for trick in (e.tokens, before):
    if name != 'copy one':
      assert accuracy.tally(trick, e).accuracy < 1.3 * floor


def test_every_size_is_drawn_and_told():
  for task, name in ((TASKS['mqar'][0], 'pairs'), (TASKS['copy'][0], 'size')):
    e = draw(task)
    sizes = e.slices[name].max(-1)
    np.testing.assert_array_equal(e.weights.sum(-1), sizes)
    shares = [(sizes == n).mean() for n in task.levels[name]]
    assert min(shares) > 0.2 and sum(shares) == 1


def test_mqar_queries_each_key_once_and_shows_no_value_after_the_list():
  task = TASKS['mqar'][0]
  e = draw(task)
  for row, n in zip(e.tokens, e.slices['pairs'].max(-1), strict=True):
    listed, rest = row[: 2 * n], row[2 * n :]
    assert sorted(rest[rest < task.keys]) == sorted(listed[::2])
    assert not ((rest >= task.keys) & (rest < task.keys + task.values)).any()
    assert len(set(listed)) == 2 * n
    assert not (rest[1::2] < task.keys).any()


def test_mqar_distances_and_positions_are_those_of_the_row():
  e = draw(TASKS['mqar'][0])
  for b, t in np.argwhere(e.weights):
    first = e.tokens[b].tolist().index(e.tokens[b, t])
    assert e.slices['distance'][b, t] == t - first
    assert e.slices['position'][b, t] == first // 2


def test_mqar_gaps_follow_the_power_law():
  task = MQAR(64, (1,), 4, 4, 2, power=0.01)
  e = draw(task, batch=256)
  gap = (e.slices['distance'].max(-1) - 2) // 2 + 1
  g = np.arange(1, 32)
  p = g**-0.99 / np.sum(g**-0.99)
  seen = np.bincount(gap, minlength=32)[1:]
  assert seen.sum() == 256
  # 4 standard deviations
  for part in (slice(0, 1), slice(1, 4), slice(4, 12), slice(12, 31)):
    q = p[part].sum()
    assert abs(seen[part].sum() - 256 * q) < 4 * np.sqrt(256 * q * (1 - q))


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: MQAR(length=16, pairs=(5,)), r'pairs is \(5,\).* to 4'),
    (lambda: MQAR(keys=8), 'pairs is .* to 8'),
    (lambda: MQAR(values=8), 'pairs is .* to 8'),
    (lambda: MQAR(pairs=()), 'pairs is'),
    (lambda: MQAR(pairs=4), 'pairs is 4'),
    (lambda: MQAR(pairs=(4, 4)), 'pairs is'),
    (lambda: MQAR(noise=0), 'noise is 0; give 1'),
    (lambda: Copy(sizes=(0, 2)), 'sizes is'),
    (lambda: Copy(symbols=1), 'symbols is 1'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def small_example():
  return synthetic.Example(
    tokens=jnp.zeros((2, 4), jnp.int32),
    targets=jnp.array([[1, 2, 3, 0], [1, 1, 0, 2]]),
    weights=jnp.array([[1.0, 1, 1, 0], [0, 1, 0, 1]]),
    slices={'age': jnp.array([[1, 2, 5, -1], [-1, 0, -1, 4]])},
  )


def test_tallies_by_hand():
  e = small_example()
  guess = jnp.array([[1, 2, 0, 0], [0, 1, 5, 2]])
  assert accuracy.tally(guess, e).accuracy == 4 / 5
  rows = accuracy.tally_rows(guess, e)
  assert rows.hits.tolist() == [2, 2] and rows.count.tolist() == [3, 2]
  whole = accuracy.tally_whole(guess, e)
  assert (whole.hits, whole.count) == (1, 2)
  by = accuracy.tally_by(guess, e, 'age', (1, 2, 4))
  assert by.hits.tolist() == [1, 1, 1] and by.count.tolist() == [1, 1, 2]
  prefixes = accuracy.tally_prefixes(guess, e)
  assert prefixes.hits.tolist() == [2, 2, 1, 1]
  np.testing.assert_allclose(accuracy.majority(e, 6), 2 / 5)
