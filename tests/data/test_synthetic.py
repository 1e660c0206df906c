"""Tasks against readers that see the tokens of a row and no more."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.data.tasks.documents import MultiTurn, QuoteGist
from deltanet_jax.data.tasks.needle import DEPTHS, HEX, KEYS, Needle
from deltanet_jax.data.tasks.order import Palindrome, SelectiveCopy, Stacks
from deltanet_jax.data.tasks.synthetic import MQAR, Copy, Rebinding, TwoHop
from deltanet_jax.data.tasks.tracking import Parity, S5Word
from tests import accuracy, readers

ESSAY = b''.join(
  b'Sentence %d says %s. ' % (i, b'nothing ' * (i % 4)) for i in range(99)
)
# the task, its reader, and how much a trick may get: 1 / the answers there
# are, or what is known beforehand, and half as much again
TASKS = {
  'mqar': (MQAR(32, (2, 4, 8), 16, 16, 5), readers.pairs, 0.3),
  'rebinding': (Rebinding(48, (2, 4), (0, 1, 3), 9, 20, 5), readers.pairs, 0.5),
  'two hop': (TwoHop((2, 3), 12), readers.two_hop, 0.2),
  'copy': (Copy((3, 5, 8), 7), readers.copy, 0.45),
  'selective copy': (
    SelectiveCopy(24, (3, 5), 7), readers.selective_copy, 0.45
  ),
  'palindrome': (Palindrome((3, 5, 8), 7), readers.palindrome, 0.45),
  'stack': (Stacks(49, 4, 7), readers.stack, 0.5),
  'parity': (Parity(21), readers.parity, 0.6),
  's5': (S5Word(12), readers.s5, 0.2),
  's5 swaps': (S5Word(21, moves=2, steps=2), readers.s5, 0.2),
  'quote': (
    QuoteGist((4, 6), 4, 32, 4, topical=0.9, quotes=2), readers.quote_gist, 0.3
  ),
  'turns': (MultiTurn(122, 8, 9, 4), readers.multi_turn, 0.5),
  'needle': (Needle(512, (1, 3)), readers.needle, 0.2),
  'needle text': (
    Needle(400, (2,), 8, HEX, b'code', ESSAY), readers.needle, 0.2
  ),
}  # fmt: skip
every_task = pytest.mark.parametrize('name', TASKS)
DRAWN = {}


def draw(task):
  """Two examples of 128 rows in one, from two keys; drawn once."""
  if task not in DRAWN:
    keys = jnp.stack([jax.random.key(seed) for seed in (0, 1)])
    jax.config.update('jax_disable_most_optimizations', True)
    both = jax.jit(jax.vmap(lambda key: task.sample(key, 128)))(keys)
    jax.config.update('jax_disable_most_optimizations', False)
    DRAWN[task] = jax.tree.map(
      lambda x: np.asarray(x).reshape(256, *x.shape[2:]), both
    )
  return DRAWN[task]


def predictions(example, answer):
  """What `answer(row)`, {position: token}, gives; -1 elsewhere."""
  guess = np.full(example.tokens.shape, -1)
  for b, row in enumerate(example.tokens.tolist()):
    for t, token in answer(row).items():
      guess[b, t] = token
  return guess


@every_task
def test_a_reader_of_the_tokens_finds_every_question_and_answer(name):
  task, read, _ = TASKS[name]
  e = draw(task)
  found = predictions(e, lambda row: read(task, row))
  np.testing.assert_array_equal(found >= 0, e.weights > 0)
  np.testing.assert_array_equal(found[found >= 0], e.targets[found >= 0])
  assert set(np.unique(e.weights)) <= {0, 1} and (e.weights.sum(-1) > 0).all()


@every_task
def test_types_shapes_and_ranges(name):
  task, _, _ = TASKS[name]
  e = draw(task)
  assert e.tokens.dtype == e.targets.dtype == np.int32
  assert e.weights.dtype == np.float32
  for x in (e.tokens, e.targets, e.weights, *e.slices.values()):
    assert x.shape == (256, task.length)
  assert 0 <= e.tokens.min() and e.tokens.max() < task.vocab
  assert 0 <= e.targets.min() and e.targets.max() < task.vocab
  if task.vocab != 257:
    assert len(np.union1d(e.tokens, e.targets)) > 0.9 * task.vocab
  assert e.slices.keys() == task.levels.keys()
  for slice_name, values in e.slices.items():
    assert values.dtype == np.int32
    told = values >= 0
    assert (e.weights[told] == 1).all()
    levels = task.levels[slice_name]
    assert list(levels) == sorted(set(levels))
    by = accuracy.tally_by(e.targets, e, slice_name, levels)
    assert by.count.sum() == told.sum() > 0
    # only the gist is of no line
    assert told.sum() == e.weights.sum() or name == 'quote'


@every_task
def test_rows_differ_from_key_to_key(name):
  e = draw(TASKS[name][0])
  same = (e.tokens[:128] == e.tokens[128:]).all(-1)
  assert same.mean() < 0.05
  assert len({row.tobytes() for row in e.tokens}) > 128


@pytest.mark.parametrize('name', ['mqar', 'turns'])
def test_the_key_decides_and_vmap_draws_the_same(name):
  task, _, _ = TASKS[name]
  first = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 128)
  half = jax.tree.map(lambda x: x[:128], draw(task))
  jax.tree.map(np.testing.assert_array_equal, first, half)


@every_task
def test_simple_tricks_fail(name):
  task, _, most = TASKS[name]
  e = draw(task)
  back = lambda n: np.pad(e.tokens, [(0, 0), (n, 0)])[:, : task.length]
  possible = np.isin(e.tokens, e.targets[e.weights > 0])
  when = np.maximum.accumulate(
    np.where(possible, np.arange(task.length), 0), axis=1
  )
  latest = np.take_along_axis(e.tokens, when, axis=1)
  tricks = {'most frequent': accuracy.measure_majority(e)}
  for trick, guess in {
    'the token': e.tokens,
    'the one before': back(1),
    'two before': back(2),
    'the first': e.tokens[:, :1],
    'the latest that can be an answer': latest,
  }.items():
    tricks[trick] = accuracy.tally(guess, e).accuracy
  assert max(tricks.values()) < most, tricks


def test_every_size_is_drawn_and_told():
  for which, name in {
    'mqar': 'pairs', 'rebinding': 'pairs', 'copy': 'size',
    'selective copy': 'size', 'two hop': 'pairs', 'palindrome': 'size',
    'quote': 'lines', 'needle': 'needles',
  }.items():  # fmt: skip
    task = TASKS[which][0]
    e = draw(task)
    sizes = e.slices[name].max(-1)
    asked = e.weights.sum(-1)
    if which in ('mqar', 'rebinding', 'copy', 'selective copy'):
      np.testing.assert_array_equal(asked, sizes)
    if which in ('two hop', 'palindrome'):
      per, less = {'two hop': (2, 0), 'palindrome': (1, 1)}[which]
      np.testing.assert_array_equal(asked, per * sizes - less)
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
  e = draw(task)
  gap = (e.slices['distance'].max(-1) - 2) // 2 + 1
  g = np.arange(1, 32)
  p = g**-0.99 / np.sum(g**-0.99)
  seen = np.bincount(gap, minlength=32)[1:]
  assert seen.sum() == 256
  # 4 standard deviations
  for part in (slice(0, 1), slice(1, 4), slice(4, 12), slice(12, 31)):
    q = p[part].sum()
    assert abs(seen[part].sum() - 256 * q) < 4 * np.sqrt(256 * q * (1 - q))


def questions(e):
  """(row, position) of every question and what the slices say of it."""
  for b, t in np.argwhere(e.weights):
    yield b, t, {name: x[b, t] for name, x in e.slices.items()}


def test_rebinding_slices_are_those_of_the_row():
  task = TASKS['rebinding'][0]
  e = draw(task)
  changed = []
  for b, t, says in questions(e):
    row = e.tokens[b]
    bound = [s for s in range(0, t, 2) if row[s] == row[t]]
    assert says['updates'] == len(bound) - 1
    assert says['distance'] == t - bound[-1]
    assert len({row[s + 1] for s in bound}) == len(bound)
    changed.append(len(bound) > 1)
  # 2 of 3 rows have updates, of half of their keys
  assert 0.25 < np.mean(changed) < 0.4


def test_an_updated_half_is_of_any_keys():
  e = draw(TASKS['rebinding'][0])
  first = [says['updates'] for b, t, says in questions(e)
           if e.tokens[b, t] == e.tokens[b, 0]]  # fmt: skip
  assert 0.2 < np.mean(np.array(first) > 0) < 0.45


def test_both_hops_are_asked_of_the_same_symbols():
  task = TASKS['two hop'][0]
  e = draw(task)
  for row, w in zip(e.tokens, e.weights, strict=True):
    asked = [(row[t - 1], row[t]) for t in np.flatnonzero(w)]
    one = {a for a, marker in asked if marker == task.symbols}
    two = {a for a, marker in asked if marker == task.symbols + 1}
    assert one == two and len(asked) == 2 * len(one)
  for b, t, says in questions(e):
    row = e.tokens[b].tolist()
    assert row[t] == task.symbols + says['hop'] - 1
    first = row.index(row[t - 1])
    middle = row[first + 1]
    opens = next(s for s in range(0, t, 2) if row[s] == middle)
    assert says['forward'] == (first < opens)


def test_stack_slices_are_those_of_the_row():
  e = draw(TASKS['stack'][0])
  for b, t, says in questions(e):
    operations = e.tokens[b, : t // 3 * 3].reshape(-1, 3)
    pushed = []
    for turn, (kind, s, _) in enumerate(operations):
      if s == e.tokens[b, t]:
        pushed = pushed[:-1] if kind else [*pushed, turn]
    assert says['age'] == len(operations) - pushed[-1]
    assert says['depth'] == len(pushed)


def test_turn_slices_are_those_of_the_row():
  e = draw(TASKS['turns'][0])
  for b, t, says in questions(e):
    turns = e.tokens[b, : t // 3 * 3].reshape(-1, 3)
    sets = np.flatnonzero(turns[:, 0] == 0)
    own = sets[turns[sets, 1] == e.tokens[b, t]]
    assert says['age'] == len(turns) - own[-1]
    assert says['updates'] == len(own) - 1
    assert says['live'] == len(set(turns[sets, 1]))
  kinds = e.tokens[:, :120:3]
  assert abs((kinds == 1).mean() - 0.4) < 0.03
  assert 0.25 < (kinds == 2).mean() < 0.31  # half the rest, but for the start


def test_permutations_of_a_few_moves_and_their_counts():
  e = draw(TASKS['s5 swaps'][0])
  seen = set(e.tokens[:, ::2][:, :10].ravel())
  assert len(seen) == 11 and 0 in seen
  answers = np.unique(e.targets[e.weights > 0])
  assert len(answers) > 100
  e = draw(TASKS['s5'][0])
  assert len(np.unique(e.tokens)) == 120


def test_the_topic_can_nearly_always_be_counted():
  task = QuoteGist(lines=(8,))
  e = draw(task)
  found = predictions(e, lambda row: readers.quote_gist(task, row))
  gist = accuracy.tally_by(found, e, 'kind', (0, 1))
  assert gist.count.tolist() == [256, 256 * 6]
  assert gist.accuracy[0] > 0.97 and gist.accuracy[1] == 1


def test_quoted_lines_differ_and_are_told():
  task = TASKS['quote'][0]
  e = draw(task)
  first_number = task.words
  for b, t, says in questions(e):
    if says['kind'] == 1:
      number = e.tokens[b, t - says['word']]
      assert number - first_number == says['line'] < says['lines']
  asked = np.where(e.slices['word'] == 0, e.slices['line'], -1)
  for row in asked:
    assert len(set(row[row >= 0])) == task.quotes
  assert len(np.unique(e.slices['line'])) == 1 + 6


@pytest.mark.parametrize('name', ['needle', 'needle text'])
def test_needles_stand_between_sentences_at_their_depth(name):
  task = TASKS[name][0]
  e = draw(task)
  shape = rb'One of the special magic \w+s for (\w+) is: (\w+)\. '
  where = []
  for row, depth, n in zip(
    e.tokens, e.slices['depth'].max(-1), e.slices['needles'].max(-1),
    strict=True,
  ):  # fmt: skip
    text = bytes(row[1:].tolist())
    found = list(re.finditer(shape, text))
    assert len(found) == n == len({m[1] for m in found})
    assert all(m[1].decode() in KEYS for m in found)
    assert all(set(m[2]) <= set(task.alphabet) for m in found)
    asked = re.search(rb' The special magic \w+ for (\w+) ', text)
    hay = re.sub(shape, b'', text[: asked.start()])
    whole = task.text * (1 + 2 * task.length // len(task.text))
    assert hay in whole
    for m in found:
      # what stands before it, without other needles, ends a sentence
      before = re.sub(shape, b'', text[: m.start()])
      assert not before or before.endswith((b'. ', b'.\n'))
      if m[1] == asked[1]:
        cut = depth * len(hay) // (DEPTHS - 1)
        after = hay[len(before) : cut]
        assert len(before) <= cut
        # no whole sentence lies between it and its depth
        assert not re.search(rb'\. .|\.\n.', after)
        where.append(len(before) / len(hay))
  assert np.ptp(where) > 0.7 and len(np.unique(e.slices['depth'])) == 41


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
    (lambda: Rebinding(length=32), '4 pairs and 16 .* need 48 tokens and 20'),
    (lambda: Rebinding(values=19), 'values is 19'),
    (lambda: Rebinding(pairs=(1,)), 'pairs is'),
    (lambda: TwoHop(pairs=(2,), symbols=5), 'pairs is .* to 1'),
    (lambda: SelectiveCopy(8, (4,)), 'sizes is .* to 3'),
    (lambda: Palindrome((1,)), 'sizes is .* from 2'),
    (lambda: Stacks(5), 'length is 5; give 6'),
    (lambda: Parity(0), 'length is 0'),
    (lambda: S5Word(moves=6), 'moves is 6'),
    (lambda: S5Word(2, steps=3), 'length 2'),
    (lambda: QuoteGist((2,), quotes=3), 'lines is'),
    (lambda: QuoteGist(words=10, topics=3), 'words is 10, topics 3'),
    (lambda: MultiTurn(values=1), 'values is 1'),
    (lambda: MultiTurn(chat=1.0), 'chat is 1.0'),
    (lambda: Needle(200, (2,)), '2 needles.* need length .* 200'),
    (lambda: Needle(text=b'one. '), '5 bytes of text'),
    (lambda: Needle(alphabet=b'11'), 'alphabet'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
