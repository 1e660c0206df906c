"""State tracking: the result of all tokens so far."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.data.tasks import base


@dataclasses.dataclass(frozen=True)
class Parity:
  """Random bits; the answer at each is the parity of the bits so far.

  Train at one `length`, test at longer ones (arXiv:2411.12537). Chance is 1/2.

  Slice: position.
  """

  length: int = 64

  def __post_init__(self):
    base.check_least(self, length=1)

  vocab = 2

  @property
  def levels(self) -> base.Levels:
    return {'position': (0, *base.list_powers(self.length - 1))}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    bits = jax.random.randint(key, (batch, self.length), 0, 2)
    at = jnp.broadcast_to(jnp.arange(self.length), bits.shape)
    odd = jnp.cumsum(bits, 1) % 2
    return base.make_example(bits, at, odd, {'position': at})


@dataclasses.dataclass(frozen=True)
class S5Word:
  """Permutations of five objects; the answer at each is the product so far.

  A token is one of the 120 permutations p, in lexicographic order of
  (p(0), ..., p(4)); the answer is p_t after ... after p_1. moves: most objects
  that a permutation moves, 2: identity and swaps, 5: all (arXiv:2411.12537,
  section 5). steps: tokens per permutation: it, then WAIT; the answer is due at
  the last.

  Slice: position (which permutation, from 0).
  """

  length: int = 32
  moves: int = 5
  steps: int = 1

  def __post_init__(self):
    base.check_least(self, moves=2, steps=1)
    if self.moves > 5:
      raise ValueError(f'moves is {self.moves}; there are 5 objects')
    if self.length < self.steps:
      raise ValueError(
        f'length {self.length} is too short for a permutation of {self.steps}'
        ' steps'
      )

  vocab = 121  # WAIT is the last

  @property
  def levels(self) -> base.Levels:
    return {'position': (0, *base.list_powers(self.length // self.steps - 1))}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    N = self.length // self.steps
    moved = (PERMUTATIONS != np.arange(5)).sum(-1)
    allowed = jnp.array(np.flatnonzero(moved <= self.moves), jnp.int32)
    word = jax.random.choice(key, allowed, (batch, N))
    table = jnp.array(PRODUCTS, jnp.int32)
    product = jax.lax.associative_scan(lambda p, q: table[p, q], word, axis=1)
    tokens = jnp.full((batch, self.length), 120, jnp.int32)
    i = jnp.arange(N)
    tokens = tokens.at[:, i * self.steps].set(word)
    at = jnp.broadcast_to(i * self.steps + self.steps - 1, word.shape)
    return base.make_example(tokens, at, product, {'position': i})


# int [120,5]: row p lists p(0) ... p(4);  [120,120]: which one is q after p
PERMUTATIONS = np.array(list(itertools.permutations(range(5))))
_PLACES = 5 ** np.arange(5)[::-1]  # lexicographic order is that of the digits
PRODUCTS = np.searchsorted(
  PERMUTATIONS @ _PLACES,
  # (q after p)(x) = q(p(x)): row [p, q]
  PERMUTATIONS[:, PERMUTATIONS].transpose(1, 0, 2) @ _PLACES,
)
