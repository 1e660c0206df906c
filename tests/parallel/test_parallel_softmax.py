"""Softmax attention over split time equals that of the whole row, and each
device does its share of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import flops
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.lab.dryrun.hlo import find_collectives
from deltanet_jax.ops import attention, latent_attention
from deltanet_jax.parallel import sharding, softmax

pytestmark = pytest.mark.usefixtures('quick_compile')

B, H, J, K, V, R = 2, 4, 2, 6, 4, 5
BLOCK = 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  monkeypatch.setattr(attention, 'BLOCK', BLOCK)
  monkeypatch.setitem(attention.attend.__kwdefaults__, 'block', BLOCK)


def _inputs(T, latent=False):
  """q, keys, weights, the gradient of o."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  keys, weights = [draw(B, T, J, K), draw(B, T, J, V)], []
  if latent:
    keys, weights = [draw(B, T, R), draw(B, T, 2)], [draw(R, H, K - 2)]
    weights.append(draw(R, H, V))
  return draw(B, T, H, K), keys, weights, draw(B, T, H, V)


def _pull(window=None, latent=False, ids=None):
  make = latent_attention.expand if latent else None

  def run(q, keys, weights, d_o):
    at = attention.Place(jnp.arange(q.shape[1]), ids)
    o, pull = jax.vjp(
      lambda q, keys, weights: softmax.attend(
        q, keys, at, weights=weights, make=make, scale=0.5, window=window
      ),
      q,
      keys,
      weights,
    )
    return o, pull(d_o)

  return run


@pytest.mark.parametrize(
  'axes, T, packed, window, latent',
  [
    # two blocks a half; key heads over two devices
    ({'seq': 4, 'tensor': 2}, 64, True, None, False),
    # an odd span: halves of 3 and of 2 tokens; a device without a mirror
    ({'seq': 3}, 15, True, None, False),
    ({'seq': 4}, 4, False, None, True),  # one token a device
    ({'seq': 4}, 64, True, 20, False),  # the window reaches two spans back
    pytest.param({'seq': 4}, 32, False, 31, False, marks=pytest.mark.slow),
    pytest.param({'seq': 8}, 80, True, None, True, marks=pytest.mark.slow),
  ],
)
def test_over_split_time_it_is_the_whole_rows_gradients_too(
  axes, T, packed, window, latent
):
  starts = np.random.default_rng(1).random((B, T)) < 0.1
  ids = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if packed else None
  run, inputs = _pull(window, latent, ids), _inputs(T, latent)
  want = jax.jit(run)(*inputs)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
    got = jax.block_until_ready(jax.jit(run)(*inputs))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=2e-6 * max(1, abs(b).max())
    ),
    got,
    want,
  )


def _program(P, T, window=None):
  """Collectives, and products of a device, of value and gradients."""
  inputs = _inputs(T)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(seq=P))):
    text = jax.jit(_pull(window)).lower(*inputs).compile().as_text()
    return find_collectives(text), flops.count_operations(
      _pull(window), *inputs
    ) / P


def test_keys_go_round_and_every_device_does_the_same_half_of_the_work():
  P, half = 8, BLOCK
  said, count = _program(P, 2 * half * P)
  assert {c.kind for c in said} == {'collective-permute'}
  span = 4 * B * 2 * half * H * max(K, V)
  assert max(c.bytes for c in said) <= 2 * span
  # scores and their gradient, and what multiplies keys: K; values: V
  pair = 2 * B * H * half**2 * (4 * K + 3 * V)
  assert count == (2 * P + 1) * pair


def test_a_window_takes_the_keys_it_reaches():
  P, L = 8, 2 * BLOCK
  said, count = _program(P, L * P, window=BLOCK + 1)
  assert {c.kind for c in said} == {'collective-permute'}
  assert max(c.bytes for c in said) == 4 * B * BLOCK * J * K
  # two blocks of queries, each with its own keys and those before
  assert count == 2 * 2 * 2 * B * H * BLOCK**2 * (4 * K + 3 * V)


def test_memory_falls_with_the_devices():
  def temporary(P):
    inputs = _inputs(2048)
    attention.attend.__kwdefaults__['block'] = attention.BLOCK = 16
    with jax.set_mesh(sharding.make_mesh(MeshConfig(seq=P))):
      program = jax.jit(_pull()).lower(*inputs).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temporary(8) < temporary(2) / 2.5
