"""What tasks that are drawn on the device share.

A task is a frozen dataclass of its sizes. `vocab` is how many tokens it uses,
`length` the tokens of a row, and `sample(key, batch)` an `Example`: a pure
function of the jax key with static shapes, to be jitted and vmapped. A size
given as a tuple is drawn anew for every row and is one of the `slices`.
`levels` are the values that each slice is reported at, in ascending order.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Levels = dict[str, Sequence[int]]


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
  return jax.random.choice(key, jnp.array(sizes, jnp.int32), (batch,))


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
  """(1, 2, 4, ...) up to `most`: the levels of a distance."""
  return tuple(2**i for i in range(most.bit_length()))
