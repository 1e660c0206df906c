"""Recall tasks: which value belongs to a key?

Beside it: `order` (sequences), `tracking` (states), `documents`, `needle`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deltanet_jax.data.tasks import base


def draw_slots(
  key: jax.Array, free: jax.Array, size: tuple[int, int], power: float
) -> jax.Array:
  """[B,size]: distinct numbers below free [B], small ones more likely.

  p(g) ~ g^(power - 1) for the gap g = 1 + number, without replacement (Gumbel
  top-k). If free < size, only the first `free` are valid.
  """
  most = jnp.arange(size[1])
  noise = jax.random.gumbel(key, (free.shape[0], size[1]))
  weight = (power - 1) * jnp.log1p(most) + noise
  weight = jnp.where(most < free[:, None], weight, -jnp.inf)
  return jax.lax.top_k(weight, size[0])[1]


@dataclasses.dataclass(frozen=True)
class MQAR:
  """Multi-query associative recall (Zoology, arXiv:2312.04927).

  k_1 v_1 ... k_n v_n, then every key once more as a query, at an even place,
  near places more likely (p(gap) ~ gap^(power - 1)). The answer at a query is
  its value, which is not shown there. Other places have random `noise` tokens,
  which are neither keys nor values.

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
    base.check_least(self, noise=1, power=0)
    most = min(self.keys, self.values, self.length // 4)
    base.check_sizes('pairs', self.pairs, 1, most)

  @property
  def vocab(self) -> int:
    return self.keys + self.values + self.noise

  @property
  def levels(self) -> base.Levels:
    return {
      'pairs': sorted(self.pairs),
      'position': range(max(self.pairs)),
      'distance': base.list_powers(self.length),
    }

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    T, N = self.length, max(self.pairs)
    rngs = jax.random.split(key, 5)
    n = base.draw_sizes(rngs[0], batch, self.pairs)[:, None]
    keys = base.draw_distinct(rngs[1], batch, self.keys, N)
    values = self.keys + base.draw_distinct(rngs[2], batch, self.values, N)
    slots = draw_slots(rngs[3], (T - 2 * n[:, 0]) // 2, (N, T // 2), self.power)
    i = jnp.arange(N)
    at = lambda where: jnp.where(i < n, where, T)
    queries = at(2 * n + 2 * slots)
    tokens = jax.random.randint(
      rngs[4], (batch, T), self.keys + self.values, self.vocab
    )
    tokens = base.place_values(tokens, at(2 * i), keys)
    tokens = base.place_values(tokens, at(2 * i + 1), values)
    tokens = base.place_values(tokens, queries, keys)
    slices = {'pairs': n, 'position': i, 'distance': queries - 2 * i}
    return base.make_example(tokens, queries, values, slices)


@dataclasses.dataclass(frozen=True)
class Rebinding:
  """MQAR where keys get new values; the answer is the newest one.

  k_1 v_1 ... k_n v_n, then m further pairs for each key of a random half, n //
  2, in random order, with values new in the row; then queries as in `MQAR`.
  (The forgetting task of Zoology, arXiv:2312.04927, is m = 1.)

  Slices: pairs (n), updates (m, or 0 for a key of the other half), distance
  (tokens from the newest pair of the key to the query).
  """

  length: int = 64
  pairs: tuple[int, ...] = (4,)
  updates: tuple[int, ...] = (1, 2, 4, 8)
  keys: int = 64
  values: int = 64
  noise: int = 16
  power: float = 0.01

  def __post_init__(self):
    base.check_least(self, noise=1, power=0)
    base.check_sizes('pairs', self.pairs, 2, min(self.keys, self.length // 4))
    base.check_sizes('updates', self.updates, 0, 1 << 20)
    N, E = max(self.pairs), self._events
    if self.length < 4 * N + 2 * E or self.values < N + E:
      raise ValueError(
        f'{N} pairs and {E} further ones need {4 * N + 2 * E} tokens and'
        f' {N + E} values; length is {self.length}, values is {self.values}'
      )

  @property
  def _events(self):
    return max(self.pairs) // 2 * max(self.updates)

  @property
  def vocab(self) -> int:
    return self.keys + self.values + self.noise

  @property
  def levels(self) -> base.Levels:
    return {
      'pairs': sorted(self.pairs),
      'updates': sorted({0, *self.updates}),
      'distance': base.list_powers(self.length),
    }

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    T, N, E = self.length, max(self.pairs), self._events
    rngs = jax.random.split(key, 8)
    n = base.draw_sizes(rngs[0], batch, self.pairs)[:, None]
    m = base.draw_sizes(rngs[1], batch, self.updates)[:, None]
    events = n // 2 * m
    keys = base.draw_distinct(rngs[2], batch, self.keys, N)
    values = self.keys + base.draw_distinct(rngs[3], batch, self.values, N + E)
    i, e = jnp.arange(N), jnp.arange(E)
    bound, again = i < n, e < events
    half = base.shuffle_valid(rngs[4], jnp.broadcast_to(bound, (batch, N)))
    turn = base.shuffle_valid(rngs[5], jnp.broadcast_to(again, (batch, E)))
    # the key of each further pair
    pair = base.take_columns(half, turn % (n // 2))
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
    tokens = base.place_values(tokens, at(2 * i, bound), keys)
    tokens = base.place_values(tokens, at(2 * i + 1, bound), values[:, :N])
    later, rebound = 2 * (n + e), base.take_columns(keys, pair)
    tokens = base.place_values(tokens, at(later, again), rebound)
    tokens = base.place_values(tokens, at(later + 1, again), values[:, N:])
    tokens = base.place_values(tokens, queries, keys)
    latest = jnp.where(last > 0, 2 * (n + last - 1), 2 * i)
    slices = {
      'pairs': n,
      'updates': jnp.where(last > 0, m, 0),
      'distance': queries - latest,
    }
    which = jnp.where(last > 0, N + last - 1, i)
    targets = base.take_columns(values, which)
    return base.make_example(tokens, queries, targets, slices)


@dataclasses.dataclass(frozen=True)
class TwoHop:
  """Facts a b and b c, shuffled; the answer to `a ONE` is b, to `a TWO` c.

  n chains of three distinct symbols are 2 n facts; then both questions about
  every a, in random order, answered at ONE or TWO. Answers are not shown. Both
  kinds of question share a context, so one and two hops are paired.

  Slices: pairs (n), hop (1 or 2), forward (1 if a b stood before b c).
  """

  pairs: tuple[int, ...] = (2, 4, 8)
  symbols: int = 64

  def __post_init__(self):
    base.check_sizes('pairs', self.pairs, 1, self.symbols // 3)

  @property
  def vocab(self) -> int:
    return self.symbols + 3  # ONE, TWO and PAD

  @property
  def length(self) -> int:
    return 8 * max(self.pairs)

  @property
  def levels(self) -> base.Levels:
    pairs = sorted(self.pairs)
    return {'pairs': pairs, 'hop': (1, 2), 'forward': (0, 1)}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    T, N = self.length, max(self.pairs)
    rngs = jax.random.split(key, 4)
    n = base.draw_sizes(rngs[0], batch, self.pairs)[:, None]
    chains = base.draw_distinct(rngs[1], batch, self.symbols, 3 * N)
    valid = jnp.arange(2 * N) % N < n
    # the fact or question at each place
    facts = base.shuffle_valid(rngs[2], valid)
    questions = base.shuffle_valid(rngs[3], valid)
    i = jnp.arange(2 * N)
    at = lambda where: jnp.where(i < 2 * n, where, T)
    symbol = lambda index: base.take_columns(chains, index)
    hop = questions // N
    tokens = jnp.full((batch, T), self.symbols + 2, jnp.int32)
    tokens = base.place_values(tokens, at(2 * i), symbol(facts))
    tokens = base.place_values(tokens, at(2 * i + 1), symbol(facts + N))
    asked = 4 * n + 2 * i
    tokens = base.place_values(tokens, at(asked), symbol(questions % N))
    queries = at(asked + 1)
    tokens = base.place_values(tokens, queries, self.symbols + hop)
    when = jnp.argsort(facts)
    forward = when[:, :N] < when[:, N:]
    slices = {
      'pairs': n,
      'hop': hop + 1,
      'forward': base.take_columns(forward, questions % N),
    }
    return base.make_example(tokens, queries, symbol(questions + N), slices)


@dataclasses.dataclass(frozen=True)
class Copy:
  """x_1 ... x_L SEP x_1 ... x_{L-1}: the answer at SEP is x_1, at x_j x_{j+1}.

  L is one of `sizes`; shorter rows are padded with PAD.

  Slices: size (L), position (j).
  """

  sizes: tuple[int, ...] = (8, 16, 32)
  symbols: int = 16
  least = 1  # of the sizes

  def __post_init__(self):
    base.check_least(self, symbols=2)
    base.check_sizes('sizes', self.sizes, self.least, 1 << 20)

  @property
  def vocab(self) -> int:
    return self.symbols + 2  # SEP and PAD

  @property
  def length(self) -> int:
    return 2 * max(self.sizes)

  @property
  def levels(self) -> base.Levels:
    return {'size': sorted(self.sizes), 'position': range(max(self.sizes))}

  def draw_lists(
    self, key: jax.Array, batch: int
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """tokens [B,T] of x_1 ... x_L SEP and PAD, x [B,N], and L [B,1]."""
    rngs = jax.random.split(key, 2)
    n = base.draw_sizes(rngs[0], batch, self.sizes)[:, None]
    shape = batch, max(self.sizes)
    symbols = jax.random.randint(rngs[1], shape, 0, self.symbols)
    i = jnp.arange(shape[1])
    tokens = jnp.full((batch, self.length), self.symbols + 1, jnp.int32)
    at = jnp.where(i < n, i, self.length)
    tokens = base.place_values(tokens, at, symbols)
    tokens = base.place_values(tokens, n, jnp.full_like(n, self.symbols))
    return tokens, symbols, n

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    tokens, symbols, n = self.draw_lists(key, batch)
    i = jnp.arange(symbols.shape[1])
    at = lambda where, count: jnp.where(i < count, where, self.length)
    tokens = base.place_values(tokens, at(n + 1 + i, n - 1), symbols)
    slices = {'size': n, 'position': i}
    return base.make_example(tokens, at(n + i, n), symbols, slices)
