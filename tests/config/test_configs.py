"""Every shipped configuration loads, builds, and has the size it states."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from deltanet_jax import config
from deltanet_jax.lab.cost import arguments, calc, presets_table
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding

FILES = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))
FILES = [path for path in FILES if path.stem != 'finetune']  # takes a model
OWN = ('quickstart', 'small_', 'hybrid_', 'gdn_')  # the others: released ones
every_file = pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path,
      id=path.stem,
      marks=() if path.stem.startswith(OWN) else pytest.mark.slow,
    )
    for path in FILES
  ],
)


def test_there_are_presets():
  assert len(FILES) >= 15


@every_file
def test_preset_builds_with_the_parameters_its_docstring_states(path):
  experiment = config.load(path)
  cfg = experiment.model
  doc = path.read_text().split('"""')[1]
  stated = re.search(r'([\d,]+) parameters', doc)
  if path.stem != 'quickstart':  # it states what its run prints instead
    assert calc.parameters(cfg) == int(stated[1].replace(',', ''))
  assert f'--config=configs/{path.name}' in doc
  model = HybridLM(cfg, jnp.dtype(experiment.train.dtype))
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  logits, _ = jax.eval_shape(
    lambda params, tokens: model.apply(
      {'params': params}, tokens, cache=init_cache(cfg, 1, 64, jnp.bfloat16)
    ),
    sharding.abstract_params(model),
    tokens,
  )
  assert (logits.shape, logits.dtype) == ((1, 1, cfg.vocab), jnp.float32)


@every_file
def test_preset_survives_json_and_fits_its_mesh(path):
  experiment = config.load(path)
  assert config.from_json(config.to_json(experiment)) == experiment
  mesh = sharding.make_mesh(experiment.mesh)
  sharding.param_shardings(HybridLM(experiment.model), mesh)


@pytest.mark.parametrize('name', ['quickstart', 'hybrid_kda', 'small_window'])
def test_the_table_of_presets_has_a_presets_row(name):
  lines = (arguments.CONFIGS / 'README.md').read_text().splitlines()
  assert presets_table.row(name) in lines


@pytest.mark.slow
def test_the_table_of_presets_is_up_to_date():
  rows = [presets_table.row(name) for name in arguments.presets()]
  table = (arguments.CONFIGS / 'README.md').read_text()
  assert table == presets_table.text(rows)  # python -m launch.presets


def test_the_table_counts_a_window_as_constant():
  row = presets_table.row('small_window')
  layer = arguments.preset('small_window').layers[0].mixer
  kept = 2 * 2 * layer.kv_heads * layer.head_dim * layer.window
  layers = len(arguments.preset('small_window').layers)
  assert row.endswith(f'| 0 | {layers * kept / 2**20:.1f} |')
