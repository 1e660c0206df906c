"""Mixture of experts: routing against its definition in numpy, grouped products
against dense ones, the module and its Load."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config
from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import LinearAttentionConfig
from deltanet_jax.layers.moe import MoE
from deltanet_jax.model import (
  Backbone,
  HybridLM,
  compute_logits,
  get_head_weight,
  init_cache,
)
from deltanet_jax.ops import routing
from deltanet_jax.parallel import sharding

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('quick_compile'),
]

N, E, X, D, F = 24, 8, 3, 6, 5
QWEN = MoEConfig(experts=E, top=X, hidden=F, shared=7, shared_gate=True)
DEEPSEEK = MoEConfig(
  experts=E,
  top=X,
  hidden=F,
  score='sigmoid',
  bias=True,
  groups=4,
  top_groups=2,
  eps=1e-20,
  scale=2.5,
  shared=7,
)
MINIMAX_M2 = MoEConfig(experts=E, top=X, hidden=F, score='sigmoid', bias=True)
PLAIN = MoEConfig(experts=E, top=X, hidden=F, renormalize=False, scale=0.5)


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _silu(x):
  return x / (1 + np.exp(-x))


def _route(logits, c, bias):
  """One token at a time, by the equations."""
  rows = []
  for l in logits.astype(np.float64):
    s = 1 / (1 + np.exp(-l))
    if c.score == 'softmax':
      s = np.exp(l) / np.exp(l).sum()
    choice = s + bias
    groups = choice.reshape(c.groups, -1)
    best = np.sort(groups, 1)[:, -2:].sum(1)
    for g in np.argsort(-best)[c.top_groups :]:
      groups[g] = -np.inf
    chosen = np.argsort(-choice, kind='stable')[: c.top]
    w = s[chosen]
    if c.renormalize:
      w = w / (w.sum() + c.eps)
    rows.append((chosen, c.scale * w))
  return map(np.stack, zip(*rows, strict=True))


def _routing(logits, c, bias):
  return routing.route(
    logits,
    score=c.score,
    top=c.top,
    bias=bias,
    groups=c.groups,
    top_groups=c.top_groups,
    renormalize=c.renormalize,
    eps=c.eps,
    scale=c.scale,
  )


@pytest.mark.parametrize('c', [QWEN, DEEPSEEK, MINIMAX_M2, PLAIN])
def test_routing_is_its_definition(c):
  logits = 2 * _draw(N, E)
  bias = 0.5 * _draw(E, seed=1) if c.bias else np.zeros(E, np.float32)
  got = _routing(logits, c, jnp.asarray(bias) if c.bias else None)
  experts, weights = _route(logits, c, bias)
  np.testing.assert_array_equal(got.experts, experts)
  np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
  assert got.weights.dtype == jnp.float32


def test_bias_chooses_and_neither_weighs_nor_learns():
  logits, bias = _draw(N, E), jnp.zeros(E).at[5].set(10.0)
  c = dataclasses.replace(MINIMAX_M2, top=2)
  got = _routing(logits, c, bias)
  assert (got.experts[:, 0] == 5).all()
  s = 1 / (1 + np.exp(-logits))
  chosen = np.take_along_axis(s, np.asarray(got.experts), 1)
  np.testing.assert_allclose(
    got.weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5
  )
  pull = jax.grad(lambda l, b: _routing(l, c, b).weights[:, 0].sum(), (0, 1))
  to_logits, to_bias = pull(logits, bias)
  assert np.abs(to_logits).max() > 0 and np.abs(to_bias).max() == 0


def test_equal_scores_go_to_the_lower_expert():
  got = _routing(jnp.zeros((2, E)), PLAIN, None)
  np.testing.assert_array_equal(got.experts, [[0, 1, 2]] * 2)


def _experts(seed=2):
  return tuple(
    _draw(E, *shape, seed=seed + i)
    for i, shape in enumerate(((D, F), (D, F), (F, D)))
  )


def test_grouped_product_equals_the_dense_one_gradients_too():
  # experts 6 and 7 get no token, expert 0 gets all
  logits = _draw(N, E) + [9, 0, 0, 0, 0, 0, -90, -90]
  x, v = _draw(N, D, seed=5), _draw(N, D, seed=6)

  def run(form):
    def loss(logits, x, *weights):
      return jnp.sum(v * form(x, _routing(logits, PLAIN, None), *weights))

    return jax.jit(jax.value_and_grad(loss, tuple(range(5))))(
      jnp.float32(logits), x, *_experts()
    )

  got, want = run(routing.grouped), run(routing.dense)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want))


def test_a_token_gets_its_own_experts_outputs():
  x = _draw(N, D, seed=5)
  chosen = _routing(_draw(N, E), PLAIN, None)
  gate, up, down = _experts()
  y = routing.grouped(x, chosen, gate, up, down)
  for n in (0, 7, N - 1):
    want = sum(
      w * ((_silu(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e])
      for e, w in zip(chosen.experts[n], chosen.weights[n], strict=True)
    )
    np.testing.assert_allclose(y[n], want, rtol=1e-4, atol=1e-4)
  low = routing.grouped(jnp.asarray(x, jnp.bfloat16), chosen, gate, up, down)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), y, atol=0.2)


def test_balance_loss_takes_the_layers_together():
  layers = [_routing(2 * _draw(N, E, seed=i), QWEN, None) for i in (0, 1)]
  loads = jax.tree.map(lambda *x: jnp.stack(x), *map(routing.load, layers))
  chosen = np.concatenate([r.experts for r in layers])
  f = np.bincount(chosen.reshape(-1), minlength=E) / len(chosen)
  P = np.concatenate([r.scores for r in layers]).mean(0)
  np.testing.assert_allclose(
    routing.balance_loss(loads), E * np.sum(f * P), rtol=1e-5
  )
  even = routing.Load(jnp.full(E, X / E), jnp.full(E, 1 / E))
  np.testing.assert_allclose(routing.balance_loss(even), X, rtol=1e-6)
  slope = jax.grad(
    lambda l: routing.balance_loss(routing.load(_routing(l, QWEN, None)))
  )(_draw(N, E))
  assert np.abs(slope).max() > 0


def test_sigmoid_scores_are_balanced_as_shares_of_their_sum():
  got = routing.load(_routing(_draw(N, E), MINIMAX_M2, None))
  np.testing.assert_allclose(got.score.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(got.share.sum(), X, rtol=1e-6)


def test_bias_update_evens_out_a_skewed_router():
  logits = _draw(512, E) + np.linspace(-1, 1, E, dtype=np.float32)
  share = lambda b: routing.load(_routing(logits, MINIMAX_M2, b)).share
  bias, first = jnp.zeros(E), share(jnp.zeros(E))
  for _ in range(60):
    bias = routing.updated_bias(bias, share(bias), 0.01)
  assert share(bias).std() < 0.3 * first.std()
  # not averaged over layers first
  two = routing.updated_bias(
    jnp.zeros((2, 2)), jnp.asarray([[1.0, 3.0], [5.0, 1.0]]), 0.1
  )
  np.testing.assert_allclose(two, [[0.1, -0.1], [-0.1, 0.1]], rtol=1e-6)


def _module(c, x):
  module = MoE(c)
  params = nn.unbox(module.init(jax.random.key(0), x))['params']
  return module, jax.tree.map(lambda p: p + 0.3, params)


def test_shared_expert_is_added_and_gated():
  x = _draw(2, 4, D)
  module, params = _module(QWEN, x)
  y, load = module.apply({'params': params}, x)
  gate, up, down = (
    np.asarray(params['shared'][n]['w']) for n in ('gate', 'up', 'down')
  )
  extra = (_silu(x @ gate) * (x @ up)) @ down
  extra /= 1 + np.exp(-x @ params['shared_gate']['w'])[..., None]
  logits = x.reshape(8, D) @ params['router']['w']
  want = routing.dense(
    x.reshape(8, D),
    _routing(logits, QWEN, None),
    params['gate'],
    params['up'],
    params['down'],
  )
  np.testing.assert_allclose(
    y, np.reshape(want, x.shape) + extra, rtol=1e-4, atol=1e-4
  )
  chex.assert_shape([load.share, load.score], (E,))


def _sizes(params):
  return jax.tree.map(jnp.shape, params)


def test_weights_have_one_row_an_expert():
  _, params = _module(DEEPSEEK, jnp.zeros((1, 1, D)))
  assert _sizes(params) == {
    'router': {'w': (D, E)},
    'bias': (E,),
    'gate': (E, D, F),
    'up': (E, D, F),
    'down': (E, F, D),
    'shared': {
      'gate': {'w': (D, 7)},
      'up': {'w': (D, 7)},
      'down': {'w': (7, D)},
    },
  }


MIXER = LinearAttentionConfig(heads=2, key_dim=4, value_dim=4, form='recurrent')


def _model(c, **changes):
  moe = Layer(MIXER, dataclasses.replace(c, hidden=8, shared=8))
  fields = {
    'vocab': 12,
    'd_model': 8,
    'period': (moe,),
    'repeats': 2,
    'prefix': (moe,),
    'remat': 'full',
  }
  return ModelConfig(**fields | changes)


@pytest.mark.parametrize('c', [QWEN, DEEPSEEK])
def test_a_model_reports_every_layers_load_and_shards(c):
  model, tokens = HybridLM(_model(c)), jnp.arange(32).reshape(4, 8) % 12
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  params = sharding.init_params(model, jax.random.key(0), mesh)

  @jax.jit
  def run(params):
    def loss(params):
      hidden, _, reports = Backbone(model.cfg).apply(
        {'params': params['backbone']}, tokens
      )
      logits = compute_logits(hidden, get_head_weight(params, model.cfg))
      return jnp.sum(logits**2), reports

    return jax.value_and_grad(loss, has_aux=True)(params)

  one = jax.tree.map(jnp.asarray, jax.device_get(params))
  want = run(one)
  with jax.set_mesh(mesh):
    got = jax.block_until_ready(run(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max())
    ),
    got,
    want,
  )
  reports = want[0][1]
  chex.assert_shape(reports.prefix[0].load.share, (E,))
  chex.assert_shape(reports.period[0].load.share, (2, E))
  np.testing.assert_allclose(reports.period[0].load.share.sum(-1), X, rtol=1e-6)
  assert reports.suffix == ()


def test_decoding_equals_training_with_experts():
  cfg = _model(DEEPSEEK, prefix=(), repeats=1)
  model, tokens = HybridLM(cfg), jnp.arange(12).reshape(2, 6)
  params = nn.unbox(model.init(jax.random.key(1), tokens))
  want, _ = model.apply(params, tokens)
  cache, parts = init_cache(cfg, 2, 6, jnp.float32), []
  for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
    logits, cache = model.apply(params, part, cache=cache)
    parts.append(logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'top': 9}, 'top is 9 and a token can reach 8 experts'),
    ({'groups': 3}, 'groups 3 must divide the 8 experts'),
    ({'groups': 8, 'top_groups': 2}, 'a token can reach 2 experts'),
    ({'score': 'tanh'}, "score is 'tanh'; give one of softmax, sigmoid"),
    ({'hidden': 0}, 'hidden is 0; give 1 or more'),
    ({'shared': 0}, 'shared_gate without a shared expert'),
  ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(QWEN, **changes)


def test_config_survives_json():
  cfg = _model(DEEPSEEK)
  assert config.from_json(config.to_json(cfg)) == cfg
