"""Tallies of answers, counted by hand."""

import jax.numpy as jnp
import numpy as np

from deltanet_jax.data.tasks import synthetic
from deltanet_jax.lab.study import accuracy


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
  np.testing.assert_allclose(accuracy.measure_majority(e, 6), 2 / 5)
