"""Mixture of experts: the routing of tokens and the experts' products.

    s = softmax(l) or sigmoid(l)       l [N,E] the router's logits, float32
    chosen = top-X of s + b            b [E] a bias for the selection alone
    w_e = scale s_e / (sum of the chosen s + eps)     or scale s_e
    y = sum over chosen e of w_e (silu(x gate_e) * (x up_e)) down_e

Group-limited selection (arXiv:2412.19437 sec. 2.1.2): the experts form groups
of one size, a group's score is the sum of its two largest s + b, and experts
are chosen from the best groups alone. Ties go to the lower index, as in
lax.top_k.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from deltanet_jax.ops.shapes import check_shapes

F32 = jnp.float32
# named scope of the rarely taken branch of a condition: counts of operations
# and of traffic leave it out
RARE = 'rare_side'


class Routing(NamedTuple):
  experts: jax.Array  # [N,X] int32, chosen experts, best first
  weights: jax.Array  # [N,X] float32
  scores: jax.Array  # [N,E] float32, s above


class Load(NamedTuple):
  """Statistics of one layer's routing, for balancing the experts."""

  share: jax.Array  # [E] float32, fraction of tokens routed to it; sums to X
  score: jax.Array  # [E] float32, mean of s / sum s; sums to 1


def route(
  logits: jax.Array,
  *,
  score: str,
  top: int,
  bias: jax.Array | None = None,
  groups: int = 1,
  top_groups: int = 1,
  renormalize: bool = True,
  eps: float = 0.0,
  scale: float = 1.0,
) -> Routing:
  """Routes tokens by logits [N,E]; the equations are above.

  score: 'softmax' or 'sigmoid'   top: X   bias: [E] or None
  Gradients reach the logits through the weights; the bias gets none.
  """
  check_shapes(logits=(logits, 'NE'), bias=(bias, 'E'))
  N, E = logits.shape
  scores = getattr(jax.nn, score)(logits.astype(F32))
  choice = jax.lax.stop_gradient(scores)
  if bias is not None:
    choice += jax.lax.stop_gradient(bias.astype(F32))[None]
  if groups > 1:
    choice = _limit(choice.reshape(N, groups, E // groups), top_groups)
  _, experts = jax.lax.top_k(choice, top)
  weights = jnp.take_along_axis(scores, experts, axis=1)
  if renormalize:
    weights /= weights.sum(1, keepdims=True) + eps
  return Routing(experts, scale * weights, scores)


def _limit(choice, top_groups):
  """choice [N,groups,E/groups] -> [N,E], -inf outside the best groups."""
  N, M, width = choice.shape
  best, _ = jax.lax.top_k(choice, min(2, width))
  _, best_groups = jax.lax.top_k(best.sum(-1), top_groups)
  keep = jax.nn.one_hot(best_groups, M, dtype=bool).any(1)
  return jnp.where(keep[..., None], choice, -jnp.inf).reshape(N, M * width)


def load(routing: Routing) -> Load:
  """Returns the Load of a layer's tokens."""
  N, E = routing.scores.shape
  count = jnp.bincount(routing.experts.reshape(-1), length=E)
  scores = routing.scores / routing.scores.sum(1, keepdims=True)
  return Load(count.astype(F32) / N, scores.mean(0))


def balance_loss(loads: Load) -> jax.Array:
  """E sum_e f_e P_e with f = share and P = score, each averaged over layers.

  loads: Load with arrays [...,E], a row for each layer. The loss of Switch
  Transformer (arXiv:2101.03961 eq. 4) for top-X routing over all layers
  together; X where all experts are used equally.
  """
  share, score = (
    x.reshape(-1, x.shape[-1]).mean(0) for x in (loads.share, loads.score)
  )
  return share.size * jnp.sum(jax.lax.stop_gradient(share) * score)


def updated_bias(bias: jax.Array, share: jax.Array, rate: float) -> jax.Array:
  """b + rate sign(mean share - share): balancing without an auxiliary loss
  (arXiv:2408.15664 algorithm 1).

  bias, share [...,E]. An expert with more than the mean share becomes less
  likely to be chosen.
  """
  chex.assert_equal_shape([bias, share], exception_type=ValueError)
  return bias + rate * jnp.sign(share.mean(-1, keepdims=True) - share)


def grouped(
  x: jax.Array,
  routing: Routing,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """y [N,D] in x's type: rows sorted by expert, in `lax.ragged_dot`, so that a
  row is multiplied with its chosen experts alone.

  x [N,D]   gate, up [E,D,F]   down [E,F,D]
  Outputs are weighted and summed in float32.
  """
  _check(x, routing, gate, up, down)
  N, X = routing.experts.shape
  chosen = routing.experts.reshape(N * X)
  order = jnp.argsort(chosen)
  sizes = jnp.bincount(chosen, length=gate.shape[0]).astype(jnp.int32)
  move = lambda x, index: x.at[index].get(
    unique_indices=True, mode='promise_in_bounds'
  )
  rows = move(jnp.repeat(x, X, axis=0), order)
  y = products(rows, sizes, gate, up, down)
  return weighted(move(y, jnp.argsort(order)), routing.weights)


def _check(x, routing, gate, up, down):
  check_shapes(
    x=(x, 'ND'),
    experts=(routing.experts, 'NX'),
    weights=(routing.weights, 'NX'),
    gate=(gate, 'EDF'),
    up=(up, 'EDF'),
    down=(down, 'EFD'),
  )


def products(
  rows: jax.Array,
  sizes: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """Applies the experts to rows [M,D], sorted by expert: sizes [E] counts each
  one's rows. Rows beyond their sum give zeros."""
  check_shapes(
    rows=(rows, 'MD'),
    sizes=(sizes, 'E'),
    gate=(gate, 'EDF'),
    up=(up, 'EDF'),
    down=(down, 'EFD'),
  )
  dot = lambda rows, w: jax.lax.ragged_dot(rows, w.astype(rows.dtype), sizes)
  y = dot(jax.nn.silu(dot(rows, gate)) * dot(rows, up), down)
  # some backends leave the rows beyond all groups uninitialized
  return jnp.where(jnp.arange(y.shape[0])[:, None] < sizes.sum(), y, 0)


def weighted(y: jax.Array, weights: jax.Array) -> jax.Array:
  """Rows y [N*X,D] of the chosen experts summed by weights [N,X]: [N,D]."""
  rows = y.reshape(*weights.shape, -1).astype(F32)
  return jnp.einsum('NXD,NX->ND', rows, weights).astype(y.dtype)


def dense(
  x: jax.Array,
  routing: Routing,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """`grouped` by its definition: every expert is applied to every row."""
  _check(x, routing, gate, up, down)
  gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
  hidden = jax.nn.silu(jnp.einsum('ND,EDF->NEF', x, gate))
  hidden *= jnp.einsum('ND,EDF->NEF', x, up)
  y = jnp.einsum('NEF,EFD->NED', hidden, down)
  chosen = jax.nn.one_hot(routing.experts, gate.shape[0], dtype=F32)
  weights = jnp.einsum('NX,NXE->NE', routing.weights, chosen)
  return jnp.einsum('NED,NE->ND', y.astype(F32), weights).astype(x.dtype)
