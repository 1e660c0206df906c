"""Schedules, weight decay by parameter, and Muon on stacked weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from deltanet_jax.config.experiment import OptimConfig
from deltanet_jax.train.optimizer import (
  find_matrix_axes,
  make_optimizer,
  make_schedule,
)

AXES = {
  'embed': P('vocab', 'embed'),
  'q': P('layers', 'embed', 'heads', 'head_k'),
  'o': P('layers', 'heads', 'head_v', 'embed'),
  'up': P('layers', 'embed', 'mlp'),
  'norm': P('layers', 'norm'),
  'conv': P('layers', 'conv', 'heads', 'head_k'),
  'A_log': P('layers', 'heads'),
  'dt_bias': P('layers', 'heads', 'head_k'),
  'head': P('embed', 'vocab'),
}
MATRICES = {'q', 'o', 'up'}
SIZES = {
  'layers': 2, 'embed': 6, 'heads': 2, 'head_k': 4, 'head_v': 5, 'mlp': 9,
  'vocab': 7, 'conv': 3, 'norm': 6,
}  # fmt: skip


def _params(seed=0):
  keys = jax.random.split(jax.random.key(seed), len(AXES))
  return {
    name: jax.random.normal(key, [SIZES[a] for a in axes])
    for key, (name, axes) in zip(keys, AXES.items(), strict=True)
  }


def _update(cfg, params, grads, trainable=None):
  optimizer = make_optimizer(cfg, 100, AXES, trainable)
  updates, _, _ = optimizer.update(grads, optimizer.init(params), params)
  return updates


@pytest.mark.parametrize(
  'axes, want',
  [
    (P('layers', 'embed', 'heads', 'head_k'), ((1,), (2, 3))),
    (P('layers', 'heads', 'head_v', 'embed'), ((1, 2), (3,))),
    (P('embed', 'mlp'), ((0,), (1,))),
    (P('layers', 'experts', 'mlp', 'embed'), ((2,), (3,))),
    (P('layers', 'embed', 'experts'), None),
    (P('latent', 'heads', 'head_k'), ((0,), (1, 2))),
    (P('layers', 'experts'), None),
    (P('layers', 'heads', 'head_k'), None),
    (P('layers', 'conv', 'heads', 'head_k'), None),
    (P('vocab', 'embed'), None),
    (P('norm'), None),
  ],
)
def test_a_weight_is_one_input_by_output_matrix_a_layer(axes, want):
  assert find_matrix_axes(axes) == want


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_only_matrices_embedding_and_head_are_decayed(name):
  params = _params()
  grads = jax.tree.map(jnp.zeros_like, params)
  cfg = OptimConfig(name=name, weight_decay=0.5, warmup=0)
  updates = _update(cfg, params, grads)
  for key, update in updates.items():
    rate = cfg.muon_lr if name == 'muon' and key in MATRICES else cfg.lr
    decayed = key in MATRICES | {'embed', 'head'}
    want = -rate * 0.5 * params[key] if decayed else jnp.zeros_like(update)
    np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=key)


def test_muon_orthogonalizes_every_layer_alone():
  params, grads = _params(0), _params(1)
  # layers of very different size, so that one matrix over both would show
  grads = {k: g.at[0].multiply(100.0) for k, g in grads.items()}
  cfg = OptimConfig(name='muon', weight_decay=0.0, warmup=0, muon_lr=1.0)
  updates = _update(cfg, params, grads)
  for name, flat in (('q', (6, 8)), ('o', (10, 6)), ('up', (6, 9))):
    for layer in range(2):
      update = np.asarray(updates[name][layer]).reshape(flat)
      scale = np.sqrt(max(1, flat[1] / flat[0]))
      values = np.linalg.svd(update / scale, compute_uv=False)
      # the bounds of the quintic iteration
      assert values.min() > 0.3 and values.max() < 1.3, (name, values)
      grad = np.asarray(grads[name][layer]).reshape(flat)
      left, _, right = np.linalg.svd(grad, full_matrices=False)
      assert np.trace((left @ right).T @ -update / scale) > 0.6 * min(flat)


def test_muon_leaves_the_rest_to_adam():
  params, grads = _params(0), _params(1)
  muon = _update(OptimConfig(name='muon'), params, grads)
  adam = _update(OptimConfig(name='adamw'), params, grads)
  for name in AXES:
    same = np.array_equal(muon[name], adam[name])
    assert same == (name not in MATRICES), name


def test_adamw_is_optax_adamw_with_clipping():
  params, grads = _params(0), _params(1)
  cfg = OptimConfig(warmup=0, schedule='constant', clip=0.1)
  mask = {name: name in MATRICES | {'embed', 'head'} for name in AXES}
  reference = optax.chain(
    optax.clip_by_global_norm(0.1),
    optax.adamw(cfg.lr, cfg.b1, cfg.b2, cfg.eps, weight_decay=0.1, mask=mask),
  )
  want, _ = reference.update(grads, reference.init(params), params)
  got = _update(cfg, params, grads)
  for name in AXES:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_schedules_warm_up_then_keep_their_shape():
  base = OptimConfig(warmup=9, final=0.1, decay=0.2)
  rates = {
    name: np.asarray(
      make_schedule(dataclasses.replace(base, schedule=name), 100)(
        np.arange(100)
      )
    )
    for name in ('cosine', 'wsd', 'constant')
  }
  for rate in rates.values():
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-5)
  assert (rates['constant'][9:] == 1).all()
  assert (np.diff(rates['cosine'][9:]) < 0).all()
  np.testing.assert_allclose(rates['cosine'][54], 0.55, atol=1e-6)
  assert (rates['wsd'][9:80] == 1).all()
  np.testing.assert_allclose(np.diff(rates['wsd'][79:]), -0.9 / 20, rtol=1e-3)
  np.testing.assert_allclose(
    [rates['cosine'][-1], rates['wsd'][-1]], 0.1, rtol=1e-5
  )


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_what_is_not_moved_neither_decays_nor_has_moments(name):
  params = _params()
  grads = jax.tree.map(jnp.ones_like, params)
  cfg = OptimConfig(name=name, weight_decay=0.5, warmup=0)
  trainable = {key: key not in ('q', 'embed') for key in AXES}
  updates = _update(cfg, params, grads, trainable)
  changed = {key for key, update in updates.items() if np.any(update)}
  assert changed == {key for key in trainable if trainable[key]}
  state = make_optimizer(cfg, 100, AXES, trainable).init(params)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert params['q'].shape not in shapes
  assert params['embed'].shape not in shapes
  assert params['up'].shape in shapes


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('lr', [None, 0.02])
def test_the_rate_told_is_the_one_applied(name, lr):
  params = _params()
  zeros = jax.tree.map(jnp.zeros_like, params)
  cfg = OptimConfig(name=name, weight_decay=0.5, warmup=3, lr=0.01)
  given = None if lr is None else jnp.float32(lr)
  optimizer = make_optimizer(cfg, 9, AXES, lr=given)
  state = optimizer.init(params)
  factors = make_schedule(cfg, 9)(np.arange(9))
  for factor in factors:
    updates, state, rate = optimizer.update(zeros, state, params)
    # no gradient: decay alone changes the embedding, which Adam has in both
    applied = -updates['embed'] / (0.5 * params['embed'])
    np.testing.assert_allclose(applied, rate, rtol=1e-5)
    np.testing.assert_allclose(rate, (lr or 0.01) * factor, rtol=1e-6)
  assert len(set(factors.tolist())) == 9


def test_the_optimizers_state_is_that_of_stored_runs():
  state = make_optimizer(OptimConfig(), 9, AXES).init(_params())
  counts = [
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if x.ndim == 0
  ]
  assert [c for c in counts if c.startswith('[3]')] == [
    f"[3].inner_states['{name}'].inner_state.count" for name in ('adam', 'muon')
  ]
