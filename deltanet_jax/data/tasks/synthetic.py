"""Tasks of recall, drawn on the device: what was paired with this key?

`order` asks for lists, `tracking` for states, `documents` for what a text said.

A task is a frozen dataclass of its sizes. `vocab` is how many tokens it uses,
`length` the tokens of a row, and `sample(key, batch)` an `Example`: a pure
function of the jax key with static shapes, to be jitted and vmapped. A size
given as a tuple is drawn anew for every row and is one of the `slices`.
`levels` are the values that each slice is reported at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

I32 = jnp.int32
Levels = dict[str, tuple[int, ...]]


class Example(NamedTuple):
  """Rows of questions and answers.

  tokens [B,T] int32
  targets [B,T] int32: judged on the logits at its own position, 0 where
    nothing is asked
  weights [B,T] float32: 1 where something is asked, else 0
  slices {name: [B,T] int32}: how hard the question is, -1 where none is
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  slices: dict[str, jax.Array]


class Task(Protocol):
  """What makes examples, and the sizes of what it makes."""

  @property
  def vocab(self) -> int: ...

  @property
  def length(self) -> int: ...

  @property
  def levels(self) -> Levels: ...

  def sample(self, key: jax.Array, batch: int) -> Example: ...


def check_sizes(name: str, sizes: object, least: int, most: int) -> None:
  """ValueError unless `sizes` is a tuple of different ints in range."""
  if isinstance(sizes, tuple) and len(sizes) == len(set(sizes)) > 0:
    if least <= min(sizes) and max(sizes) <= most:
      return
  raise ValueError(
    f'{name} is {sizes!r}; give a tuple of different numbers from {least}'
    f' to {most}'
  )


def check_least(task: Task, **least: int) -> None:
  """ValueError where a field of `task` is below the number given for it."""
  for name, number in least.items():
    if getattr(task, name) < number:
      raise ValueError(
        f'{name} is {getattr(task, name)}; give {number} or more'
      )


def draw_sizes(key: jax.Array, batch: int, sizes: Sequence[int]) -> jax.Array:
  """[B]: one of `sizes` for every row."""
  return jax.random.choice(key, jnp.array(sizes, I32), (batch,))


def draw_distinct(
  key: jax.Array, batch: int, size: int, count: int
) -> jax.Array:
  """[B,count]: different numbers below `size`, in random order."""
  return jax.lax.top_k(jax.random.uniform(key, (batch, size)), count)[1]


def place_values(
  rows: jax.Array, at: jax.Array, values: jax.Array
) -> jax.Array:
  """rows [B,T] with values [B,N] at the positions `at` [B,N]; T means none."""
  which = jnp.arange(rows.shape[0])[:, None]
  return rows.at[which, at].set(values.astype(rows.dtype), mode='drop')


def make_example(
  tokens: jax.Array,
  at: jax.Array,
  targets: jax.Array,
  slices: Mapping[str, jax.Array],
) -> Example:
  """The `Example` whose questions stand at `at` [B,N], T for none.

  targets, and every slice: [B,N] or [B,1].
  """
  spread = lambda x: jnp.broadcast_to(x, at.shape)
  none = jnp.full(tokens.shape, -1, I32)
  return Example(
    tokens=tokens,
    targets=place_values(jnp.zeros_like(none), at, spread(targets)),
    weights=place_values(jnp.zeros(tokens.shape), at, jnp.ones(at.shape)),
    slices={n: place_values(none, at, spread(x)) for n, x in slices.items()},
  )


def shuffle_valid(key: jax.Array, valid: jax.Array) -> jax.Array:
  """[B,N]: the indices where valid [B,N], in random order, then the others."""
  where = jax.random.uniform(key, valid.shape)
  return jnp.argsort(jnp.where(valid, where, jnp.inf))


def take_columns(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [B,N] at index [B,M]."""
  return jnp.take_along_axis(x, index, axis=1)


def list_powers(most: int) -> tuple[int, ...]:
  """(1, 2, 4, ...) up to `most`: the levels of a distance."""
  return tuple(2**i for i in range(most.bit_length()))


def draw_slots(
  key: jax.Array, free: jax.Array, size: tuple[int, int], power: float
) -> jax.Array:
  """[B,size] different numbers below free [B], the small ones likely.

  p(g) ~ g^(power - 1) for the gap g = 1 + the number, drawn one after the
  other without replacement (Gumbel top-k). Where free < size, only the first
  `free` are of use.
  """
  most = jnp.arange(size[1])
  weight = (power - 1) * jnp.log1p(most) + jax.random.gumbel(
    key, (free.shape[0], size[1])
  )
  weight = jnp.where(most < free[:, None], weight, -jnp.inf)
  return jax.lax.top_k(weight, size[0])[1]


@dataclasses.dataclass(frozen=True)
class MQAR:
  """Multi-query associative recall (Zoology, arXiv:2312.04927).

  k_1 v_1 ... k_n v_n, then every key once more, each at an even place of the
  rest, near ones likely (p(gap) ~ gap^(power - 1)); at a key seen again its
  value is asked. The value is never shown there. The places between are
  random tokens out of `noise` that are neither keys nor values, so that a
  filler is no key and all the answers can be known.

  Slices: pairs (n), position (of the pair in the list), distance (tokens from
  the key to its query).
  """

  length: int = 64
  pairs: tuple[int, ...] = (4, 8, 16)
  keys: int = 64
  values: int = 64
  noise: int = 16
  power: float = 0.01

  def __post_init__(self):
    check_least(self, noise=1, power=0)
    check_sizes(
      'pairs', self.pairs, 1, min(self.keys, self.values, self.length // 4)
    )

  @property
  def vocab(self) -> int:
    return self.keys + self.values + self.noise

  @property
  def levels(self) -> Levels:
    return {
      'pairs': tuple(sorted(self.pairs)),
      'position': tuple(range(max(self.pairs))),
      'distance': list_powers(self.length),
    }

  def sample(self, key: jax.Array, batch: int) -> Example:
    T, N = self.length, max(self.pairs)
    rngs = jax.random.split(key, 5)
    n = draw_sizes(rngs[0], batch, self.pairs)[:, None]
    keys = draw_distinct(rngs[1], batch, self.keys, N)
    values = self.keys + draw_distinct(rngs[2], batch, self.values, N)
    slots = draw_slots(rngs[3], (T - 2 * n[:, 0]) // 2, (N, T // 2), self.power)
    i = jnp.arange(N)
    at = lambda where: jnp.where(i < n, where, T)
    queries = at(2 * n + 2 * slots)
    tokens = jax.random.randint(
      rngs[4], (batch, T), self.keys + self.values, self.vocab
    )
    tokens = place_values(tokens, at(2 * i), keys)
    tokens = place_values(tokens, at(2 * i + 1), values)
    tokens = place_values(tokens, queries, keys)
    slices = {'pairs': n, 'position': i, 'distance': queries - 2 * i}
    return make_example(tokens, queries, values, slices)


@dataclasses.dataclass(frozen=True)
class Rebinding:
  """MQAR whose keys are bound again; the latest value is asked.

  k_1 v_1 ... k_n v_n, then m more bindings of each of a random half of the
  keys, n // 2, in random order and to values new in the row, then queries as
  in `MQAR`. (Zoology's forgetting task, arXiv:2312.04927, is m = 1.)

  Slices: pairs (n), updates (m, or 0 for a key of the other half), distance
  (tokens from the latest binding to the query).
  """

  length: int = 64
  pairs: tuple[int, ...] = (4,)
  updates: tuple[int, ...] = (1, 2, 4, 8)
  keys: int = 64
  values: int = 64
  noise: int = 16
  power: float = 0.01

  def __post_init__(self):
    check_least(self, noise=1, power=0)
    check_sizes('pairs', self.pairs, 2, min(self.keys, self.length // 4))
    check_sizes('updates', self.updates, 0, 1 << 20)
    N, E = max(self.pairs), self._events
    if self.length < 4 * N + 2 * E or self.values < N + E:
      raise ValueError(
        f'{N} pairs and {E} further bindings need {4 * N + 2 * E} tokens and'
        f' {N + E} values; length is {self.length}, values is {self.values}'
      )

  @property
  def _events(self):
    return max(self.pairs) // 2 * max(self.updates)

  @property
  def vocab(self) -> int:
    return self.keys + self.values + self.noise

  @property
  def levels(self) -> Levels:
    return {
      'pairs': tuple(sorted(self.pairs)),
      'updates': tuple(sorted({0, *self.updates})),
      'distance': list_powers(self.length),
    }

  def sample(self, key: jax.Array, batch: int) -> Example:
    T, N, E = self.length, max(self.pairs), self._events
    rngs = jax.random.split(key, 8)
    n = draw_sizes(rngs[0], batch, self.pairs)[:, None]
    m = draw_sizes(rngs[1], batch, self.updates)[:, None]
    events = n // 2 * m
    keys = draw_distinct(rngs[2], batch, self.keys, N)
    values = self.keys + draw_distinct(rngs[3], batch, self.values, N + E)
    i, e = jnp.arange(N), jnp.arange(E)
    bound, again = i < n, e < events
    half = shuffle_valid(rngs[4], jnp.broadcast_to(bound, (batch, N)))
    turn = shuffle_valid(rngs[5], jnp.broadcast_to(again, (batch, E)))
    pair = take_columns(half, turn % (n // 2))  # that each event binds again
    of_pair = again[..., None] & (pair[..., None] == i)
    last = jnp.max(of_pair * (e + 1)[:, None], 1, initial=0)  # 0: never
    at = lambda where, valid: jnp.where(valid, where, T)
    slots = draw_slots(
      rngs[6], (T - 2 * n - 2 * events)[:, 0] // 2, (N, T // 2), self.power
    )
    queries = at(2 * (n + events + slots), bound)
    tokens = jax.random.randint(
      rngs[7], (batch, T), self.keys + self.values, self.vocab
    )
    tokens = place_values(tokens, at(2 * i, bound), keys)
    tokens = place_values(tokens, at(2 * i + 1, bound), values[:, :N])
    tokens = place_values(
      tokens, at(2 * (n + e), again), take_columns(keys, pair)
    )
    tokens = place_values(tokens, at(2 * (n + e) + 1, again), values[:, N:])
    tokens = place_values(tokens, queries, keys)
    latest = jnp.where(last > 0, 2 * (n + last - 1), 2 * i)
    slices = {
      'pairs': n,
      'updates': jnp.where(last > 0, m, 0),
      'distance': queries - latest,
    }
    which = jnp.where(last > 0, N + last - 1, i)
    return make_example(tokens, queries, take_columns(values, which), slices)


@dataclasses.dataclass(frozen=True)
class TwoHop:
  """Facts a b and b c, shuffled; asked for b by `a ONE` and for c by `a TWO`.

  n chains of three different symbols each are 2 n facts; then both questions
  about every a, in random order, each asked at its ONE or TWO. The answers are
  never shown, and both kinds are asked on one context, so that what the second
  hop costs is paired with what the first one does.

  Slices: pairs (n), hop (1 or 2), forward (1 if a b stood before b c).
  """

  pairs: tuple[int, ...] = (2, 4, 8)
  symbols: int = 64

  def __post_init__(self):
    check_sizes('pairs', self.pairs, 1, self.symbols // 3)

  @property
  def vocab(self) -> int:
    return self.symbols + 3  # ONE, TWO and PAD

  @property
  def length(self) -> int:
    return 8 * max(self.pairs)

  @property
  def levels(self) -> Levels:
    pairs = tuple(sorted(self.pairs))
    return {'pairs': pairs, 'hop': (1, 2), 'forward': (0, 1)}

  def sample(self, key: jax.Array, batch: int) -> Example:
    T, N = self.length, max(self.pairs)
    rngs = jax.random.split(key, 4)
    n = draw_sizes(rngs[0], batch, self.pairs)[:, None]
    chains = draw_distinct(rngs[1], batch, self.symbols, 3 * N)
    valid = jnp.arange(2 * N) % N < n
    facts = shuffle_valid(rngs[2], valid)  # the fact or question at each place
    questions = shuffle_valid(rngs[3], valid)
    i = jnp.arange(2 * N)
    at = lambda where: jnp.where(i < 2 * n, where, T)
    hop = questions // N
    tokens = jnp.full((batch, T), self.symbols + 2, I32)
    tokens = place_values(tokens, at(2 * i), take_columns(chains, facts))
    tokens = place_values(
      tokens, at(2 * i + 1), take_columns(chains, facts + N)
    )
    tokens = place_values(
      tokens, at(4 * n + 2 * i), take_columns(chains, questions % N)
    )
    queries = at(4 * n + 2 * i + 1)
    tokens = place_values(tokens, queries, self.symbols + hop)
    when = jnp.argsort(facts)
    forward = when[:, :N] < when[:, N:]
    slices = {
      'pairs': n,
      'hop': hop + 1,
      'forward': take_columns(forward, questions % N),
    }
    return make_example(
      tokens, queries, take_columns(chains, questions + N), slices
    )


@dataclasses.dataclass(frozen=True)
class Copy:
  """x_1 ... x_L SEP x_1 ... x_{L-1}: asked for x_1 at SEP, x_{j+1} at x_j.

  L is one of `sizes`; shorter rows are filled up with PAD.

  Slices: size (L), position (j).
  """

  sizes: tuple[int, ...] = (8, 16, 32)
  symbols: int = 16

  def __post_init__(self):
    check_least(self, symbols=2)
    check_sizes('sizes', self.sizes, 1, 1 << 20)

  @property
  def vocab(self) -> int:
    return self.symbols + 2  # SEP and PAD

  @property
  def length(self) -> int:
    return 2 * max(self.sizes)

  @property
  def levels(self) -> Levels:
    return {
      'size': tuple(sorted(self.sizes)),
      'position': tuple(range(max(self.sizes))),
    }

  def sample(self, key: jax.Array, batch: int) -> Example:
    T, N = self.length, max(self.sizes)
    rngs = jax.random.split(key, 2)
    n = draw_sizes(rngs[0], batch, self.sizes)[:, None]
    symbols = jax.random.randint(rngs[1], (batch, N), 0, self.symbols)
    i = jnp.arange(N)
    at = lambda where, count: jnp.where(i < count, where, T)
    tokens = jnp.full((batch, T), self.symbols + 1, I32)
    tokens = place_values(tokens, at(i, n), symbols)
    tokens = place_values(tokens, n, jnp.full_like(n, self.symbols))
    tokens = place_values(tokens, at(n + 1 + i, n - 1), symbols)
    slices = {'size': n, 'position': i}
    return make_example(tokens, at(n + i, n), symbols, slices)
