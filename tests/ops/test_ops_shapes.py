"""A wrong argument of an op raises a one-line ValueError."""

import jax.numpy as jnp
import pytest

from deltanet_jax.ops import (
  attention,
  delta_rule,
  kda,
  latent_attention,
  linear_attention,
  rope,
  routing,
  sparse_attention,
)
from deltanet_jax.ops.shapes import check_shapes

zeros = lambda *shape: jnp.zeros(shape)
B, T, S, H, J, K, V, E, X, F, N = 2, 3, 5, 4, 2, 8, 6, 4, 2, 7, 9
Q, KEYS, VALUES = zeros(B, T, H, K), zeros(B, S, J, K), zeros(B, S, J, V)
AT = attention.Place(jnp.arange(T), None)
SEEN = attention.Place(jnp.arange(S), None)
WEIGHTS = zeros(E, K, F), zeros(E, K, F), zeros(E, F, K)
ROUTING = routing.Routing(zeros(N, X).astype(int), zeros(N, X), None)
QUERIES = sparse_attention.SparseQueries(
  zeros(B, T, H, K), zeros(B, T, 1, 2), zeros(B, T, 1), zeros(B, T), None
)
SPARSE = sparse_attention.SparseKeys(
  zeros(B, S, K), zeros(B, S, V), zeros(B, S, 2), zeros(B, S), None
)


def test_sizes_are_those_of_the_first_array_that_has_them():
  sizes = check_shapes(a=(zeros(2, 3), 'BT'), b=(None, 'TX'), c=(zeros(2), 'B'))
  assert sizes == {'B': 2, 'T': 3}


@pytest.mark.parametrize(
  'shape, axes, words',
  [
    ((4, 3), 'BT', r'c has shape \(4, 3\); expected \[B,T\] = \(2, 3\)'),
    ((4, 3, 1), 'BTX', r'expected \[B,T,X\] = \(2, 3, X\)'),
    ((4,), 'BT|T', r'expected \[B,T\] = \(2, 3\) or \[T\] = \(3,\)'),
    ((2, 3), '1T', r'expected \[1,T\] = \(1, 3\)'),
  ],
)
def test_what_does_not_fit_is_named_with_what_would(shape, axes, words):
  with pytest.raises(ValueError, match=words) as caught:
    check_shapes(a=(zeros(2, 3), 'BT'), c=(zeros(*shape), axes))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'op, name',
  [
    (
      lambda: attention.attend(Q, KEYS, VALUES[:1], AT, SEEN, scale=1.0),
      'v',
    ),
    (
      lambda: attention.attend(Q, KEYS, VALUES, SEEN, SEEN, scale=1.0),
      'at.positions',
    ),
    (
      lambda: attention.attention(Q, KEYS, VALUES, zeros(B, T, T), scale=1.0),
      'mask',
    ),
    (
      lambda: attention.visible(zeros(B, T), zeros(S), window=None),
      'key_positions',
    ),
    (
      lambda: latent_attention.expand(
        zeros(B, S, 5), zeros(B, S, 2), zeros(4, H, K), zeros(5, H, V)
      ),
      'k_b',
    ),
    (
      lambda: rope.rotate(Q, zeros(B, S), rotary_dim=4, theta=1e4),
      'positions',
    ),
    (
      lambda: routing.route(zeros(N, E), score='softmax', top=1, bias=zeros(5)),
      'bias',
    ),
    (lambda: routing.grouped(zeros(N, V), ROUTING, *WEIGHTS), 'gate'),
    (lambda: routing.dense(zeros(5, K), ROUTING, *WEIGHTS), 'experts'),
    (
      lambda: sparse_attention.attend(
        QUERIES, SPARSE._replace(v=zeros(1, S, V)), top=2, scale=1.0
      ),
      'keys.v',
    ),
    (
      lambda: linear_attention.step(
        Q[:, 0], Q[:, 0], Q[:, 0], zeros(B), zeros(B, H, K, K)
      ),
      'g',
    ),
    (
      lambda: delta_rule.step(
        *(Q[:, 0],) * 3, zeros(B, H), None, zeros(1, H, K, K)
      ),
      'state',
    ),
    (
      lambda: kda.step(
        *(Q[:, 0],) * 3, zeros(B, H), zeros(B, H), None, zeros(B, H, K, K)
      ),
      'g',
    ),
  ],
)
def test_a_misshapen_argument_of_an_op_is_named(op, name):
  with pytest.raises(ValueError, match=rf'^{name} has shape .*; expected \['):
    op()
