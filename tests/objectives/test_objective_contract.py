"""The contract of every objective, found in `config.objectives`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config
from deltanet_jax.config import objectives
from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import make_mesh

KINDS = [
  kind
  for _, kind in inspect.getmembers(objectives, inspect.isclass)
  if issubclass(kind, objectives.ObjectiveConfig)
  and kind is not objectives.ObjectiveConfig
]
LAYERS = tuple(
  Layer(mixer, MLPConfig(8))
  for mixer in (GatedDeltaNetConfig.tiny(), AttentionConfig.tiny())
)
MODEL = ModelConfig(vocab=11, d_model=8, period=LAYERS, repeats=1)

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def params():
  mesh = make_mesh(MeshConfig())
  return sharding.init_params(HybridLM(MODEL), jax.random.key(0), mesh)


def make_batch(rows=3, tokens=9):
  keys = jax.random.split(jax.random.key(1), 3)
  ids = jax.random.randint(keys[0], (rows, tokens + 1), 0, MODEL.vocab)
  documents = jnp.cumsum(jax.random.bernoulli(keys[1], 0.2, (rows, tokens)), 1)
  return {
    'tokens': ids[:, :-1],
    'targets': ids[:, 1:],
    'weights': jax.random.bernoulli(keys[2], 0.7, (rows, tokens)).astype(float),
    'segment_ids': documents.astype(jnp.int32),
    'positions': jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (rows, 1)),
  }


def test_there_are_objectives():
  assert objectives.NextTokenConfig in KINDS


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_it_is_a_sum_over_rows(kind, params):
  objective = kind().make(MODEL, jnp.float32)
  batch, run = make_batch(), jax.jit(objective)
  whole, outcome = run(params, batch)
  rows = [
    run(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
    for i in range(3)
  ]
  chex.assert_trees_all_close(whole, sum(row[0] for row in rows), rtol=1e-5)
  nats = sum(row[1].nats for row in rows)
  chex.assert_trees_all_close(outcome.nats, nats, rtol=1e-5)
  chex.assert_shape((whole, outcome.nats), ())
  assert all(x.shape == () for x in objective.figures(outcome).values())


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_gradients_are_where_it_says(kind, params):
  objective = kind().make(MODEL, jnp.float32)
  slope = jax.jit(jax.grad(lambda p: objective(p, make_batch())[0]))
  for path, grad in jax.tree_util.tree_leaves_with_path(slope(params)):
    names = [key.key for key in path]
    assert objective.has_gradient(names) == bool(np.any(grad)), names


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_what_it_adjusts_keeps_its_shapes(kind, params):
  objective = kind().make(MODEL, jnp.float32)
  _, outcome = jax.eval_shape(objective, params, make_batch())
  adjusted = jax.eval_shape(objective.adjust, params, outcome)
  chex.assert_trees_all_equal_shapes_and_dtypes(adjusted, params)


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_its_configuration_survives_json(kind):
  cfg = kind()
  assert config.from_json(config.to_json(cfg), kind) == cfg
  cfg.check_model(MODEL)
