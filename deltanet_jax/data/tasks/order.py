"""Tasks of order: copies, reversed copies and stacks."""

import dataclasses

import jax
import jax.numpy as jnp

from deltanet_jax.data.tasks import base, synthetic


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
  """Symbols among blanks, then COPY and blanks, where the symbols are due.

  As in MAD (arXiv:2403.17844): n symbols at random places of the first
  T - n - 1 tokens; the last n tokens are blanks, and the answer at the j-th is
  symbol j. Answers are not shown.

  Slices: size (n), position (j).
  """

  length: int = 128
  sizes: tuple[int, ...] = (16,)
  symbols: int = 14

  def __post_init__(self):
    base.check_least(self, symbols=2)
    base.check_sizes('sizes', self.sizes, 1, (self.length - 1) // 2)

  @property
  def vocab(self) -> int:
    return self.symbols + 2  # COPY and blank

  @property
  def levels(self) -> base.Levels:
    return {'size': sorted(self.sizes), 'position': range(max(self.sizes))}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    T, N = self.length, max(self.sizes)
    rngs = jax.random.split(key, 3)
    n = base.draw_sizes(rngs[0], batch, self.sizes)[:, None]
    symbols = jax.random.randint(rngs[1], (batch, N), 0, self.symbols)
    i = jnp.arange(N)
    where = jax.random.uniform(rngs[2], (batch, T))
    where = jnp.where(jnp.arange(T) < T - n - 1, where, -1)
    slots = jax.lax.top_k(where, N)[1]
    slots = jnp.sort(jnp.where(i < n, slots, T), -1)
    tokens = jnp.full((batch, T), self.symbols + 1, jnp.int32)
    tokens = base.place_values(tokens, slots, symbols)
    copy = jnp.full_like(n, self.symbols)
    tokens = base.place_values(tokens, T - n - 1, copy)
    queries = jnp.where(i < n, T - n + i, T)
    slices = {'size': n, 'position': i}
    return base.make_example(tokens, queries, symbols, slices)


@dataclasses.dataclass(frozen=True)
class Palindrome(synthetic.Copy):
  """x_1 ... x_L SEP x_L ... x_2: after SEP the answer at x_j is x_{j-1}.

  Teacher-forced and with the first symbol of the reversal given, as in the
  Kimi Linear report (arXiv:2510.26692): L - 1 answers. Shorter rows are padded
  with PAD.

  Slices: size (L), position (of the answer in the reversal, from 1).
  """

  least = 2

  @property
  def levels(self) -> base.Levels:
    return {'size': sorted(self.sizes), 'position': range(1, max(self.sizes))}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    tokens, symbols, n = self.draw_lists(key, batch)
    T, i = self.length, jnp.arange(symbols.shape[1])
    # symbol i of the list is number n - 1 - i of the reversal
    back = jnp.where((0 < i) & (i < n), 2 * n - i, T)
    tokens = base.place_values(tokens, back, symbols)
    answer = n - 1 - i
    queries = jnp.where((0 < answer) & (i < n), n + answer, T)
    slices = {'size': n, 'position': answer}
    return base.make_example(tokens, queries, symbols, slices)


@dataclasses.dataclass(frozen=True)
class Stacks:
  """PUSH s x and POP s x on several stacks; the answer at a popped s is x.

  The task of the Kimi Linear report (arXiv:2510.26692) with `stacks` stacks:
  `length` // 3 operations of three tokens on a random stack, push or pop with
  equal probability, never a pop of an empty stack. x is shown after its answer
  was due, as in the report.

  Slices: age (operations since x was pushed), depth (of its stack, from 1).
  """

  length: int = 256
  stacks: int = 16
  symbols: int = 16

  def __post_init__(self):
    # a push and a possible pop
    base.check_least(self, length=6, stacks=1, symbols=2)

  @property
  def vocab(self) -> int:
    return 2 + self.stacks + self.symbols

  @property
  def levels(self) -> base.Levels:
    powers = base.list_powers(self.length // 3)
    return {'age': powers, 'depth': powers}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    N, S = self.length // 3, self.stacks
    rngs = jax.random.split(key, 3)
    pop = jax.random.bernoulli(rngs[0], 0.5, (N, batch))
    stack = jax.random.randint(rngs[1], (N, batch), 0, S)
    symbol = jax.random.randint(rngs[2], (N, batch), 0, self.symbols)
    row = jnp.arange(batch)

    def operate(memory, xs):
      # stacks as linked lists: the operation that pushed the top, and the one
      # that pushed the element below
      top, below, depth = memory
      t, pop, s, x = xs
      pushed, height = top[row, s], depth[row, s]
      pop = pop & (height > 0)
      x = jnp.where(pop, symbol[pushed, row], x)
      below = below.at[row, t].set(pushed)
      top = top.at[row, s].set(jnp.where(pop, below[row, pushed], t))
      depth = depth.at[row, s].add(jnp.where(pop, -1, 1))
      return (top, below, depth), (pop, x, t - pushed, height)

    empty = jnp.zeros((batch, S), jnp.int32)
    memory = empty, jnp.zeros((batch, N), jnp.int32), empty
    turns = jnp.arange(N), pop, stack, symbol
    _, (pop, x, age, depth) = jax.lax.scan(operate, memory, turns)
    pop, x, age, depth, stack = (a.T for a in (pop, x, age, depth, stack))
    triples = jnp.stack([pop, 2 + stack, 2 + S + x], -1).reshape(batch, -1)
    tokens = jnp.zeros((batch, self.length), jnp.int32)
    tokens = tokens.at[:, : 3 * N].set(triples)
    queries = jnp.where(pop, 3 * jnp.arange(N) + 1, self.length)
    slices = {'age': age, 'depth': depth}
    return base.make_example(tokens, queries, 2 + S + x, slices)
