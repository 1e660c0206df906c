"""The first steps: what is written, read and told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.lab.first_steps import __main__ as command, first_steps
from deltanet_jax.lab.first_steps.first_steps import write_one_by_one


def _by_hand(rule, keys, values):
  """Errors and right readings in NumPy, by (writes, pair)."""
  N, K = keys.shape
  state = np.zeros((K, values.shape[1]))
  error, right = np.full((N, N), np.nan), np.full((N, N), np.nan)
  for n in range(N):
    known = state.T @ keys[n] if rule == 'delta' else 0
    state += np.outer(keys[n], values[n] - known)
    for i in range(n + 1):
      far = np.linalg.norm(state.T @ keys[i] - values[: n + 1], axis=1)
      error[n, i] = far[i] / np.linalg.norm(values[i])
      right[n, i] = far.argmin() == i
  return error, right


def test_pairs_are_written_and_read_as_the_equations_say():
  keys, values = first_steps.make_pairs(jax.random.key(0), 2, 9, 4)
  for rule in first_steps.RULES:
    got = write_one_by_one(rule, keys, values)
    for b in range(2):
      want = _by_hand(rule, np.asarray(keys[b]), np.asarray(values[b]))
      np.testing.assert_allclose(got[0][b], want[0], atol=1e-5)
      np.testing.assert_array_equal(got[1][b], want[1])


def test_orthogonal_keys_do_not_crowd_and_only_delta_overwrites():
  key = jax.random.key(1)
  assert max(first_steps.measure_orthogonal_error(key).values()) < 1e-5
  errors = first_steps.measure_overwrite_error(key, 4)
  assert errors['delta'] < 1e-5 and errors['linear'] > 1


def test_delta_forgets_the_oldest_and_linear_attention_all_alike():
  found = first_steps.measure_overload(jax.random.key(2))
  share = lambda rule, part: found[rule].share(32, part)
  assert share('delta', 'newest') > 0.8 > 0.2 > share('delta', 'oldest')
  assert abs(share('linear', 'newest') - share('linear', 'oldest')) < 0.1


def test_what_is_told_is_what_was_found():
  assert 'old pairs first' in command._who_fails(0.1, 0.9)
  assert 'new pairs first' in command._who_fails(0.9, 0.1)
  assert 'old and new pairs alike' in command._who_fails(0.5, 0.6)
  assert 'the sum of all values' in command._conclude({'delta': 0, 'linear': 3})
  assert 'differ little' in command._conclude({'delta': 0.1, 'linear': 3})
  task = first_steps.Copy(sizes=(4, 8), symbols=4)
  copier = first_steps.Copier(
    'delta', 4, {4: 0.95, 8: 0.5}, np.array([0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1])
  )
  told = command._what_happened(copier, task)
  assert 'up to 4 tokens' in told and '0% of the first' in told
  assert '100% of the last' in told
  worse = copier._replace(by_size={4: 0.5, 8: 0.5})
  assert 'no length at' in command._what_happened(worse, task)


@pytest.mark.long
@pytest.mark.slow
def test_a_layer_learns_to_copy_a_little(tmp_path):
  task = first_steps.Copy(sizes=(2, 3), symbols=3)
  seen = []
  copier = first_steps.train_copier(
    'delta', 4, task, steps=60, seed=0, d_model=16,
    show=lambda *now: seen.append(now),
  )  # fmt: skip
  assert [done for done, _ in seen] == [30, 60]
  assert seen[-1][1] < seen[0][1] < jnp.log(3) + 0.2
  assert set(copier.by_size) == {2, 3} and len(copier.by_position) == 3
  assert copier.by_size[2] > 0.6
  first_steps.draw_copiers([copier], tmp_path / 'copy.png')
  assert (tmp_path / 'copy.png').stat().st_size > 5000
