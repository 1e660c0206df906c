"""Projections, norms, the MLP and the short convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.layers.conv import ShortConv, init_state
from deltanet_jax.layers.mlp import MLP
from deltanet_jax.layers.norm import (
  GatedRMSNorm,
  LayerNorm,
  RMSNorm,
  l2_normalize,
)
from deltanet_jax.layers.proj import Proj, name_axes

RNG = np.random.default_rng(0)


def _normal(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


def _silu(x):
  return x / (1 + np.exp(-x))


def test_projection_is_its_einsum_with_spread_from_the_sizes_summed_over():
  x = _normal(2, 3, 64, 8)
  proj = Proj(
    (64, 8, 200), ('heads', 'head_v', 'embed'), 'BTHV,HVD->BTD', scale=0.5
  )
  boxed = proj.init(jax.random.key(0), x)['params']
  assert boxed['w'].names == ('heads', 'head_v', 'embed')
  w = nn.unbox(boxed)['w']
  assert w.dtype == jnp.float32
  np.testing.assert_allclose(w.std() * np.sqrt(64 * 8), 0.5, rtol=0.02)
  y = proj.apply({'params': {'w': w}}, x)
  np.testing.assert_allclose(
    y, np.einsum('BTHV,HVD->BTD', x, w), rtol=1e-4, atol=1e-5
  )


def test_projection_multiplies_in_its_dtype_and_returns_the_type_asked_for():
  x = _normal(1, 2, 4)
  for out_dtype, want in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
    proj = Proj(
      (4, 3), ('embed', 'mlp'), 'BTD,DF->BTF', jnp.bfloat16, out_dtype
    )
    params = nn.unbox(proj.init(jax.random.key(0), x))
    assert params['params']['w'].dtype == jnp.float32
    y = proj.apply(params, x)
    assert y.dtype == want
  low = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)
  exact = low(x) @ low(params['params']['w'])
  np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)


def test_unknown_axis_name_is_refused():
  with pytest.raises(ValueError, match="'embd' is unknown"):
    name_axes(nn.initializers.ones, ('embd',))


def test_norm_starts_at_one_and_computes_in_float32():
  x = _normal(2, 3, 8) * 100
  want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
  w = _normal(8)
  for zero_centered, first, weight in ((False, 1, w), (True, 0, 1 + w)):
    norm = RMSNorm(1e-6, zero_centered)
    params = nn.unbox(norm.init(jax.random.key(0), x))['params']
    np.testing.assert_array_equal(params['scale'], np.full(8, first))
    y = norm.apply({'params': {'scale': w}}, x)
    np.testing.assert_allclose(y, want * weight, rtol=1e-5)
  # a bfloat16 input: the same, rounded once
  low = jnp.asarray(x, jnp.bfloat16)
  norm = lambda x: RMSNorm().apply({'params': {'scale': w}}, x)
  np.testing.assert_array_equal(
    norm(low), norm(low.astype(jnp.float32)).astype(jnp.bfloat16)
  )


def test_layer_norm_takes_the_mean_off_and_adds_its_bias():
  x, w, b = _normal(2, 3, 8) + 3, _normal(8), _normal(8)
  y = LayerNorm(1e-5).apply({'params': {'scale': w, 'bias': b}}, x)
  centered = x - x.mean(-1, keepdims=True)
  want = centered / np.sqrt(np.mean(centered**2, -1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(y, want * w + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('activation', ['silu', 'sigmoid'])
def test_gated_norm_normalizes_before_it_gates(activation):
  x, z, w = _normal(2, 3, 8), _normal(2, 3, 8), _normal(8)
  y = GatedRMSNorm(1e-5, activation).apply({'params': {'scale': w}}, x, z)
  gate = 1 / (1 + np.exp(-z)) * (z if activation == 'silu' else 1)
  rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(y, x / rms * w * gate, rtol=1e-5, atol=1e-6)


def test_l2_norm_sums_and_keeps_a_zero_vector_finite():
  x = _normal(2, 8)
  want = x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(l2_normalize(x), want, rtol=1e-5)
  gradient = jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros(4))
  assert np.isfinite(gradient).all()


def test_mlp_is_silu_of_gate_times_up_then_down():
  x = _normal(2, 3, 4)
  mlp = MLP(6)
  params = nn.unbox(mlp.init(jax.random.key(0), x))['params']
  gate, up, down = (np.asarray(params[n]['w']) for n in ('gate', 'up', 'down'))
  want = (_silu(x @ gate) * (x @ up)) @ down
  y = mlp.apply({'params': params}, x)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def _conv(x, w):
  W, T = len(w), x.shape[1]
  y = np.zeros_like(x)
  for t in range(T):
    for d in range(min(W, t + 1)):
      y[:, t] += w[W - 1 - d] * x[:, t - d]
  return y


def test_last_tap_of_the_convolution_multiplies_the_current_token():
  x, w = _normal(2, 9, 3, 2), _normal(4, 3, 2)
  conv = ShortConv(4, ('heads', 'head_k'))
  y, state = conv.apply({'params': {'taps': w}}, x)
  assert state is None
  np.testing.assert_allclose(y, _conv(x, w), rtol=1e-5, atol=1e-6)


def test_convolution_continues_from_its_state_token_by_token():
  x, w = _normal(2, 9, 6), _normal(4, 6)
  conv = ShortConv(4, ('embed',))
  params = {'params': {'taps': w}}
  state, parts = init_state(2, 4, (6,), jnp.float32), []
  # parts shorter and longer than the state, and of one token
  for start, end in ((0, 2), (2, 3), (3, 9)):
    y, state = conv.apply(params, x[:, start:end], state)
    parts.append(y)
  np.testing.assert_allclose(
    np.concatenate(parts, 1), _conv(x, w), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(state, x[:, -3:])


def test_convolution_leaks_nothing_between_segments():
  x, w, v = _normal(1, 9, 6), _normal(4, 6), _normal(1, 9, 6)
  conv = ShortConv(4, ('embed',))
  ids = jnp.asarray([[3] * 2 + [1] * 5 + [2] * 2], jnp.int32)
  run = lambda x: conv.apply({'params': {'taps': w}}, x, None, ids)[0]
  y, pull = jax.vjp(run, x)
  parts = [_conv(x[:, a:b], w) for a, b in ((0, 2), (2, 7), (7, 9))]
  np.testing.assert_allclose(y, np.concatenate(parts, 1), rtol=1e-5, atol=1e-6)
  # the gradient is the convolution run backwards, within each segment
  back = [
    _conv(v[:, a:b][:, ::-1], w)[:, ::-1] for a, b in ((0, 2), (2, 7), (7, 9))
  ]
  np.testing.assert_allclose(
    pull(v)[0], np.concatenate(back, 1), rtol=1e-5, atol=1e-6
  )
