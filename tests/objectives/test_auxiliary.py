"""Auxiliary losses, on a small model with experts, sparse attention and
multi-token prediction."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltanet_jax import config
from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import DSAConfig, GatedDeltaNetConfig
from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.model import (
  MTP,
  Backbone,
  HybridLM,
  LayerReport,
  Reports,
  embed,
  get_head_weight,
)
from deltanet_jax.objectives import auxiliary
from deltanet_jax.ops import routing
from deltanet_jax.train.optimizer import Optimizer
from deltanet_jax.train.state import create_state
from deltanet_jax.train.step import train_step

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('quick_compile'),
]

B, T, Z, D = 2, 10, 20, 8
MOE = MoEConfig(experts=4, top=2, hidden=6, score='sigmoid', bias=True)
DELTA = GatedDeltaNetConfig(
  key_heads=2, value_heads=2, key_dim=4, value_dim=4, form='recurrent'
)
SPARSE = dataclasses.replace(DSAConfig.tiny(), top=4)
CFG = ModelConfig(
  vocab=Z,
  d_model=D,
  prefix=(Layer(SPARSE, MLPConfig(6)),),
  repeats=2,
  period=(Layer(DELTA, MOE), Layer(SPARSE, MOE)),
  mtp=Layer(SPARSE, MOE),
)
SEGMENTS = np.asarray([[1] * 4 + [2] * 6, [3] * 10], np.int32)


@functools.cache
def _params():
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = lambda: nn.unbox(HybridLM(CFG).init(jax.random.key(0), tokens))
  return jax.tree.map(lambda x: x + 0.01, jax.jit(init)()['params'])


def _batch():
  rng = np.random.default_rng(0)
  index = np.arange(T, dtype=np.int32)
  return {
    'tokens': rng.integers(0, Z, (B, T), np.int32),
    'targets': rng.integers(0, Z, (B, T), np.int32),
    'positions': np.stack([np.r_[index[:4], index[:6]], index]),
    'segment_ids': SEGMENTS,
    'weights': np.ones((B, T), np.float32),
  }


@functools.cache
def _hidden_and_reports():
  batch = _batch()
  hidden, _, reports = jax.jit(Backbone(CFG).apply)(
    {'params': _params()['backbone']},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
  )
  return hidden, reports


def _further(params, hidden, batch):
  out, *_ = MTP(CFG).apply(
    {'params': params['mtp']},
    hidden,
    embed(params, batch['targets']),
    batch['positions'],
    batch['segment_ids'],
  )
  return out


def test_mtp_loss_scores_the_token_after_next_inside_a_document():
  params, batch, (hidden, _) = _params(), _batch(), _hidden_and_reports()
  batch['weights'][1, 3] = 0
  got = auxiliary.compute_mtp_loss(params, CFG, jnp.float32, hidden, batch)
  out = _further(params, hidden, batch)
  log_p = jax.nn.log_softmax(out @ get_head_weight(params, CFG))
  # row 0 holds two documents; in row 1 the target of token 3 has no weight
  places = [(0, t) for t in (0, 1, 2, 4, 5, 6, 7, 8)]
  places += [(1, t) for t in (0, 1, 4, 5, 6, 7, 8)]
  want = -sum(log_p[b, t, batch['targets'][b, t + 1]] for b, t in places)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_multi_token_prediction_sees_nothing_later():
  params, batch, (hidden, _) = _params(), _batch(), _hidden_and_reports()
  embedded = embed(params, batch['targets'])

  def at(hidden, embedded):
    out, *_ = MTP(CFG).apply(
      {'params': params['mtp']}, hidden, embedded, batch['positions']
    )
    return jnp.sum(out[:, 6] ** 2)

  for slope in jax.jit(jax.grad(at, (0, 1)))(hidden, embedded):
    sizes = np.abs(slope).max((0, 2))
    assert (sizes[7:] == 0).all() and sizes[6] > 0


def test_a_documents_prediction_does_not_depend_on_its_neighbors():
  params, batch, (hidden, _) = _params(), _batch(), _hidden_and_reports()
  whole = _further(params, hidden, batch)
  alone = _further(
    params, hidden[:1, 4:], {k: x[:1, 4:] for k, x in batch.items()}
  )
  np.testing.assert_allclose(whole[:1, 4:], alone, atol=1e-5)


def test_multi_token_prediction_continues_from_its_cache():
  params, batch, (hidden, _) = _params(), _batch(), _hidden_and_reports()
  index = jnp.broadcast_to(jnp.arange(T), (B, T))
  embedded = embed(params, batch['targets'])
  run = lambda hidden, embedded, index, cache=None: MTP(CFG).apply(
    {'params': params['mtp']}, hidden, embedded, index, cache=cache
  )
  want, *_ = run(hidden, embedded, index)
  cache, parts = CFG.mtp.mixer.init_cache(B, T, jnp.float32), []
  for part in (slice(0, 8), slice(8, 9), slice(9, 10)):
    out, cache, _ = run(
      hidden[:, part], embedded[:, part], index[:, part], cache
    )
    parts.append(out)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-5)


def test_balance_takes_every_layer_with_experts():
  _, reports = _hidden_and_reports()
  loads = [r.load for r in reports.period]
  share = np.concatenate([x.share for x in loads]).mean(0)
  score = np.concatenate([x.score for x in loads]).mean(0)
  chex.assert_shape([x.share for x in loads], (2, 4))
  np.testing.assert_allclose(
    auxiliary.compute_balance_loss(reports),
    4 * np.sum(share * score),
    rtol=1e-5,
  )


def test_load_figures_are_of_the_most_and_the_least_used_expert():
  even, uneven = np.full((2, 4), 0.5), np.array([[1.0, 0.25, 0.5, 0.25]])
  layer = lambda share: LayerReport(None, routing.Load(share, share))
  plain = LayerReport(None, None)
  reports = Reports((plain,), (layer(even), plain), (layer(uneven),))
  found = auxiliary.measure_loads(reports)
  assert {k: float(x) for k, x in found.items()} == {
    'expert_most': 2.0, 'expert_least': 0.5
  }  # fmt: skip
  assert auxiliary.measure_loads(Reports((), (), ())) == {}


def test_indexer_loss_is_the_sum_of_the_layers():
  _, reports = _hidden_and_reports()
  want = reports.prefix[0].mixer + reports.period[1].mixer.sum()
  np.testing.assert_allclose(
    auxiliary.compute_indexer_loss(reports), want, rtol=1e-6
  )
  assert reports.period[0].mixer is None and want > 0


def test_bias_update_changes_the_biases_of_the_layers_reported_and_no_more():
  params, (_, reports) = _params(), _hidden_and_reports()
  new = auxiliary.update_biases(params, reports, 0.1)
  for i, report in enumerate(reports.period):
    layer = params['backbone']['period'][f'layer_{i}']['ffn']
    want = routing.updated_bias(layer['bias'], report.load.share, 0.1)
    found = new['backbone']['period'][f'layer_{i}']['ffn']
    np.testing.assert_array_equal(found['bias'], want)
    assert np.abs(found['bias'] - layer['bias']).max() > 0.05
    layer['bias'], found['bias'] = None, None
  same = jax.tree.map(lambda a, b: a is b, params, new)
  assert all(jax.tree.leaves(same))
  _params.cache_clear()


def test_without_multi_token_prediction_there_are_no_weights_of_it():
  cfg = dataclasses.replace(CFG, mtp=None)
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = lambda cfg: jax.eval_shape(
    HybridLM(cfg).init, jax.random.key(0), tokens
  )['params']
  assert set(shapes(cfg)) == {'backbone', 'head'}
  mtp = nn.unbox(shapes(CFG))['mtp']
  assert set(mtp) == {'embed_norm', 'hidden_norm', 'proj', 'layer', 'norm'}
  chex.assert_shape(mtp['proj']['w'], (2 * D, D))


def test_config_survives_json():
  assert config.from_json(config.to_json(CFG)) == CFG


def _step(objective, accumulate=1):
  adam = optax.adam(1e-2)
  optimizer = Optimizer(adam.init, lambda *args: (*adam.update(*args), 1e-2))
  state = create_state(_params(), optimizer)
  return jax.jit(
    lambda state, batch: train_step(
      state,
      batch,
      optimizer=optimizer,
      accumulate=accumulate,
      objective=objective.make(CFG, jnp.float32),
    )
  )(state, _batch())


def _moved(state):
  change = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0, state.params, _params()
  )
  return {
    jax.tree_util.keystr(path): moved
    for path, moved in jax.tree_util.tree_leaves_with_path(change)
  }


@pytest.mark.long
def test_every_part_of_the_objective_moves_its_own_weights():
  everything = NextTokenConfig(
    further=0.3, balance=0.01, indexer=1.0, bias_rate=0.001
  )
  state, metrics = _step(everything)
  plain, plain_metrics = _step(NextTokenConfig())
  # the reported loss is that of the next token, whatever else is minimized
  np.testing.assert_allclose(metrics['loss'], plain_metrics['loss'], rtol=1e-6)
  assert metrics['grad_norm'] > plain_metrics['grad_norm']
  assert metrics['expert_least'] < 1 < metrics['expert_most']
  all_, next_ = _moved(state), _moved(plain)
  for name in all_:
    mtp, index = "['mtp']" in name, "['index_" in name
    bias = name.endswith("['ffn']['bias']")
    # the MTP layer has an indexer and biases that no loss trains
    assert all_[name] == (not (mtp and (index or bias))), name
    assert next_[name] == (not (mtp or index or bias)), name


@pytest.mark.long
def test_warm_up_moves_the_indexers_alone():
  state, _ = _step(NextTokenConfig(next=0.0, indexer=1.0))
  for name, moved in _moved(state).items():
    assert moved == ("['index_" in name and "['mtp']" not in name), name


@pytest.mark.long
def test_two_micro_batches_give_the_gradient_of_one_batch():
  objective = NextTokenConfig(further=0.3, indexer=1.0)
  _, a = _step(objective)
  _, b = _step(objective, accumulate=2)
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
  np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-4)


@pytest.mark.parametrize('name', ['further', 'balance', 'indexer', 'bias_rate'])
def test_an_objective_without_its_part_of_the_model_is_refused(name):
  model = ModelConfig(
    vocab=Z, d_model=D, repeats=1, period=(Layer(DELTA, MLPConfig(6)),)
  )
  rest = DataConfig('x', 8, 2), OptimConfig()
  train = TrainConfig(steps=1, objective=NextTokenConfig(**{name: 0.1}))
  with pytest.raises(
    ValueError, match=f'objective.{name} is 0.1 and the model'
  ):
    Experiment(model, *rest, train)
  cfg = dataclasses.replace(CFG, prefix=CFG.period)
  assert Experiment(cfg, *rest, train).train is train


def test_a_negative_weight_is_refused():
  with pytest.raises(ValueError, match='objective.balance is -1; give 0'):
    NextTokenConfig(balance=-1)


@pytest.mark.parametrize(
  'weights',
  [
    pytest.param(NextTokenConfig(), marks=pytest.mark.long),
    pytest.param(
      NextTokenConfig(next=0.0, indexer=1.0), marks=pytest.mark.long
    ),
    NextTokenConfig(further=0.5, indexer=1.0),
  ],
)
def test_what_moves_is_what_has_a_gradient(weights):
  objective = weights.make(CFG, jnp.float32)
  slope = jax.grad(lambda params: objective(params, _batch())[0])
  grads = jax.jit(slope)(_params())
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    keys = [key.key for key in path]
    if keys[-2:] != ['ffn', 'bias']:  # it changes by its own update rule alone
      assert objective.has_gradient(keys) == bool(np.any(grad)), keys
