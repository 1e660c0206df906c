"""Rotary positions against complex numbers; YaRN in its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.mixers import YarnConfig
from deltanet_jax.ops import rope

X = np.random.default_rng(0).standard_normal((2, 5, 3, 12)).astype(np.float32)
POSITIONS = np.asarray([[0, 1, 2, 3, 4], [7, 0, 9, 100, 3]], np.int32)
P = 8


@pytest.mark.parametrize('interleaved', [False, True])
def test_a_pair_turns_as_a_complex_number(interleaved):
  got = np.asarray(
    rope.rotate(
      X,
      POSITIONS,
      rotary_dim=P,
      theta=100.0,
      interleaved=interleaved,
      length=1.5,
    )
  )
  for i in range(P // 2):
    pair = [2 * i, 2 * i + 1] if interleaved else [i, i + P // 2]
    angle = POSITIONS[:, :, None] * 100.0 ** (-2 * i / P)
    z = 1.5 * (X[..., pair[0]] + 1j * X[..., pair[1]]) * np.exp(1j * angle)
    np.testing.assert_allclose(got[..., pair[0]], z.real, atol=2e-5)
    np.testing.assert_allclose(got[..., pair[1]], z.imag, atol=2e-5)
  np.testing.assert_array_equal(got[..., P:], X[..., P:])


def test_yarn_keeps_fast_pairs_and_slows_the_others_by_its_factor():
  yarn = YarnConfig(factor=40.0, original=4096)
  plain = np.asarray(rope.frequencies(64, 1e4))
  slowed = np.asarray(rope.frequencies(64, 1e4, yarn))
  turns = 4096 * plain / (2 * np.pi)
  ratio = plain / slowed
  np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-5)
  np.testing.assert_allclose(ratio[turns < 0.8], 40, rtol=1e-5)
  assert (np.diff(ratio) > -1e-4).all()
  # the ramp begins below pair 10.2 and ends above 22.5 of 32
  assert ratio[10] < 1 + 1e-5 < ratio[11] and ratio[22] < 39.9 < ratio[23]


def test_yarns_lengths_are_those_of_deepseek_and_of_the_default():
  both = YarnConfig(factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
  m = 0.1 * np.log(40) + 1
  np.testing.assert_allclose((both.length, both.softmax_scale), (1, m**2))
  plain = YarnConfig(factor=40.0, original=4096)
  np.testing.assert_allclose((plain.length, plain.softmax_scale), (m, 1))


def test_distance_alone_decides_a_product():
  turn = lambda x, start: rope.rotate(
    x, start + jnp.arange(5)[None], rotary_dim=P, theta=100.0, interleaved=True
  )
  dots = [
    jnp.einsum('BTHK,BSHK->BHTS', turn(X[:1], n), turn(X[1:], n))
    for n in (0, 50)
  ]
  np.testing.assert_allclose(*dots, atol=1e-3)
