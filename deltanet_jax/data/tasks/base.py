"""What all tasks share: synthetic data that is sampled on the device.

A task is a frozen dataclass of its sizes. `vocab` is its number of tokens,
`length` the tokens of a row, and `sample(key, batch)` returns an `Example`; it
is a pure function with static shapes, for jit and vmap. A size given as a tuple
is sampled for every row and is one of the `slices`. `levels` are the values at
which each slice is reported, ascending.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Levels = dict[str, Sequence[int]]


class Example(NamedTuple):
  """Rows of questions and answers.

  tokens [B,T] int32
  targets [B,T] int32: the answer due at this position, 0 if none
  weights [B,T] float32: 1 where an answer is due, else 0
  slices {name: [B,T] int32}: how hard the question is, -1 if there is none
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  slices: dict[str, jax.Array]


class Task(Protocol):
  """The interface of a task."""

  @property
  def vocab(self) -> int: ...

  @property
  def length(self) -> int: ...

  @property
  def levels(self) -> Levels: ...

  def sample(self, key: jax.Array, batch: int) -> Example: ...


def check_sizes(name: str, sizes: object, least: int, most: int) -> None:
  """Raises ValueError unless `sizes` is a tuple of distinct ints in range."""
  if isinstance(sizes, tuple) and len(sizes) == len(set(sizes)) > 0:
    if least <= min(sizes) and max(sizes) <= most:
      return
  raise ValueError(
    f'{name} is {sizes!r}; give a tuple of distinct numbers from {least}'
    f' to {most}'
  )


def check_least(task: Task, **least: int) -> None:
  """Raises ValueError if a field of `task` is below the number given."""
  for name, number in least.items():
    if getattr(task, name) < number:
      raise ValueError(
        f'{name} is {getattr(task, name)}; give {number} or more'
      )


def draw_sizes(key: jax.Array, batch: int, sizes: Sequence[int]) -> jax.Array:
  """[B]: a random one of `sizes` for every row."""
  return jax.random.choice(key, jnp.array(sizes, jnp.int32), (batch,))


def draw_distinct(
  key: jax.Array, batch: int, size: int, count: int
) -> jax.Array:
  """[B,count]: distinct numbers below `size`, in random order."""
  return jax.lax.top_k(jax.random.uniform(key, (batch, size)), count)[1]


def place_values(
  rows: jax.Array, at: jax.Array, values: jax.Array
) -> jax.Array:
  """rows [B,T] with values [B,N] at positions `at` [B,N]; T: nowhere."""
  which = jnp.arange(rows.shape[0])[:, None]
  return rows.at[which, at].set(values.astype(rows.dtype), mode='drop')


def make_example(
  tokens: jax.Array,
  at: jax.Array,
  targets: jax.Array,
  slices: Mapping[str, jax.Array],
) -> Example:
  """The `Example` with questions at positions `at` [B,N]; T: no question.

  targets and slices: [B,N] or [B,1]
  """
  spread = lambda x: jnp.broadcast_to(x, at.shape)
  none = jnp.full(tokens.shape, -1, jnp.int32)
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
  """(1, 2, 4, ...) up to `most`: levels of a distance."""
  return tuple(2**i for i in range(most.bit_length()))
