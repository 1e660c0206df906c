"""Sparse attention: gathered against masked, the choice of keys, the indexer's
two stages and the parameters that each trains."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.mixers import DSAConfig, MLAConfig
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops import sparse_attention

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('quick_compile'),
]

B, T, H, M, R, I, K, D = 2, 21, 3, 6, 4, 2, 5, 16


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _arguments(segments=None):
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  k = _draw(B, T, M, seed=3)
  return (
    sparse_attention.SparseQueries(
      _draw(B, T, H, M),
      _draw(B, T, I, K, seed=1),
      _draw(B, T, I, seed=2),
      positions,
      segments,
    ),
    sparse_attention.SparseKeys(
      k, k[..., :R], _draw(B, T, K, seed=4), positions, segments
    ),
  )


def _run(form, top, segments=None, **options):
  """o, the losses, and the gradient of a weighted sum of both."""
  queries, keys = _arguments(segments)
  v, u = _draw(B, T, H, R, seed=5), _draw(B, T, seed=6)

  def loss(q, qi, w, k, ki):
    o, losses = form(
      queries._replace(q=q, index_q=qi, weight=w),
      keys._replace(k=k, v=k[..., :R], index_k=ki),
      top=top,
      scale=0.4,
      **options,
    )
    return jnp.sum(v * o) + jnp.sum(u * losses), (o, losses)

  return jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))(
    *queries[:3], keys.k, keys.index_k
  )


def _close(got, want):
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('top', [1, 6, T, 100, None])
@pytest.mark.parametrize('block', [4, 64])
def test_gathered_equals_masked_gradients_too(top, block):
  _close(
    _run(sparse_attention.attend, top, block=block),
    _run(sparse_attention.masked, top),
  )


def test_gathered_equals_masked_in_packed_rows():
  segments = jnp.asarray([[1] * 5 + [2] * 16, [4] * 20 + [3]])
  got = _run(sparse_attention.attend, 6, segments, block=4)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
  _close(got, _run(sparse_attention.masked, 6, segments))


def _by_hand(top, b, t, h):
  """o_th and loss_t of one row from the equations, in numpy."""
  (q, qi, w, *_), (k, v, ki, *_) = _arguments()
  score = lambda s: sum(
    w[b, t, i] * max(qi[b, t, i] @ ki[b, s], 0) for i in range(I)
  )
  scores = np.asarray([score(s) for s in range(t + 1)])
  best = np.argsort(-scores, kind='stable')[:top]
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  heads = [softmax(0.4 * k[b, best] @ q[b, t, h]) for h in range(H)]
  target, log_q = np.mean(heads, 0), np.log(softmax(scores[best]))
  loss = np.sum(target * (np.log(target) - log_q))
  return heads[h] @ v[b, best], loss


@pytest.mark.parametrize('top', [6, None])
def test_output_and_loss_are_their_equations(top):
  o, losses = sparse_attention.attend(*_arguments(), top=top, scale=0.4)
  for b, t, h in ((0, 0, 0), (1, 4, 2), (0, 20, 1)):
    want, loss = _by_hand(top, b, t, h)
    np.testing.assert_allclose(o[b, t, h], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses[b, t], loss, rtol=1e-4, atol=1e-5)


def test_equal_scores_choose_the_earlier_keys_and_never_a_later_token():
  mask = np.tri(T, dtype=bool)[None]
  index, chosen = sparse_attention.select(jnp.zeros((1, T, T)), mask, 4)
  seen = sparse_attention.selected(index, chosen, T)
  want = mask & (np.arange(T) < 4)
  np.testing.assert_array_equal(seen, want)


def test_loss_is_least_where_the_indexer_is_the_attention():
  target = jax.nn.softmax(_draw(3, 7))
  mask = np.ones((3, 7), bool)
  slope = jax.grad(lambda s: sparse_attention.divergence(target, s, mask).sum())
  np.testing.assert_allclose(
    sparse_attention.divergence(target, _draw(3, 7) + 5.0, mask), 0, atol=1e-6
  )
  np.testing.assert_allclose(slope(jnp.log(target)), 0, atol=1e-6)
  # by finite differences elsewhere
  scores, step = _draw(3, 7, seed=1), 1e-2 * _draw(3, 7, seed=2)
  value = lambda s: sparse_attention.divergence(target, s, mask).sum()
  np.testing.assert_allclose(
    value(scores + step) - value(scores - step),
    2 * np.sum(slope(scores) * step),
    rtol=1e-2,
  )


def test_products_fall_with_the_number_of_keys_chosen():
  queries, keys = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arguments()
  )
  grow = lambda x, n: jax.ShapeDtypeStruct(
    tuple(n if size == T else size for size in x.shape), x.dtype
  )
  n = 256
  queries, keys = jax.tree.map(lambda x: grow(x, n), (queries, keys))
  queries = queries._replace(q=jax.ShapeDtypeStruct((B, n, 64, M), jnp.float32))

  def cost(top):
    run = lambda queries, keys: sparse_attention.attend(
      queries, keys, top=top, scale=1.0, block=n
    )[0]
    return jax.jit(run).lower(queries, keys).compile().cost_analysis()['flops']

  assert cost(16) < 0.25 * cost(None)


@functools.cache
def _model(cfg):
  module, x = cfg.make(d_model=D), _draw(B, T, D)
  ctx = Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, jnp.float32(0))
  params = jax.jit(
    lambda: nn.unbox(module.init(jax.random.key(0), x, ctx))['params']
  )()
  run = lambda params, x: module.apply({'params': params}, x, ctx)
  return params, x, run


@pytest.mark.parametrize('stage', ['sparse', 'dense'])
def test_indexer_learns_from_its_loss_alone_and_nothing_else_does(stage):
  params, x, run = _model(dataclasses.replace(DSAConfig.tiny(), stage=stage))
  to_weights, to_x = jax.grad(lambda p, x: run(p, x)[1].report, (0, 1))(
    params, x
  )
  for name, weight in to_weights.items():
    moved = max(np.abs(leaf).max() for leaf in jax.tree.leaves(weight)) > 0
    assert moved == name.startswith('index_'), name
  assert np.abs(to_x).max() == 0


def test_descending_the_loss_brings_indexer_and_attention_together():
  params, x, run = _model(dataclasses.replace(DSAConfig.tiny(), stage='dense'))
  step = jax.jit(jax.value_and_grad(lambda p: run(p, x)[1].report))
  first, _ = step(params)
  for _ in range(40):
    loss, slope = step(params)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)
  assert loss < 0.7 * first


def test_with_all_keys_it_is_latent_attention():
  cfg = dataclasses.replace(DSAConfig.tiny(), top=T)
  params, x, run = _model(cfg)
  names = {f.name for f in dataclasses.fields(MLAConfig)}
  mla = MLAConfig(**{n: getattr(cfg, n) for n in names})
  _, _, plain = _model(mla)
  plain_params = {n: w for n, w in params.items() if 'index' not in n}
  np.testing.assert_allclose(
    run(params, x)[0], plain(plain_params, x)[0], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'query_latent': None}, 'the indexer starts from it'),
    ({'index_dim': 3}, 'index_dim is 3 and its first shared_dim 4 channels'),
    ({'stage': 'warm'}, "stage is 'warm'; give one of sparse, dense"),
    ({'top': 0}, 'top is 0; give 1 or more'),
  ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(DSAConfig.tiny(), **changes)
