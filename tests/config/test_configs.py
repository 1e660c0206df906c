"""Every preset loads, builds, and has the number of parameters that it
states."""

import dataclasses
import json
import pathlib
import re
import sysconfig
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from deltanet_jax import config
from deltanet_jax.config import preset_names, stored
from deltanet_jax.lab.cost import calc, presets
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding

# every Experiment as stored when each preset was a file; what occurs more than
# once in it is an index into 'parts'
STORED = json.loads(
  (pathlib.Path(__file__).parents[1] / 'fixtures' / 'presets.json').read_text()
)
FINETUNED = [x for x in STORED['presets'] if x.startswith('finetune ')]
FORMER = [x for x in STORED['presets'] if x not in FINETUNED]
OWN = ('quickstart', 'small:', 'gdn:')  # the others: released ones
NAMES = preset_names.list_presets()
FOLDER = preset_names.find_folder()
every_preset = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name.startswith(OWN) else pytest.mark.slow)
    for name in NAMES
  ],
)


def read_row(name):
  """The row of a preset in its family's table, up to its comment's end."""
  family, _, size = name.partition(':')
  source = (FOLDER / f'{family}.py').read_text()
  return re.search(rf"^  '{size}':[^#]*#.*$", source, re.MULTILINE)[0]


def as_data(value):
  """Classes and fields, as they are stored."""
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value)]
    fields = {name: as_data(getattr(value, name)) for name in names}
    return {'class': type(value).__name__} | fields
  if isinstance(value, tuple):
    return [as_data(x) for x in value]
  if isinstance(value, str):
    return value.replace(sysconfig.get_path('stdlib'), '{stdlib}')
  return value


def read_stored(name):
  """As it was stored, in today's names."""

  def fill(tree):
    if isinstance(tree, list):
      return [fill(x) for x in tree]
    if not isinstance(tree, dict):
      return tree
    if '#' in tree:
      return fill(STORED['parts'][tree['#']])
    kind = stored.RENAMED.get(tree['class'], tree['class'])
    names = stored.RENAMED_FIELDS.get(kind, {})
    fields = {names.get(key, key): fill(x) for key, x in tree.items()}
    return fields | {'class': kind}

  return fill(STORED['parts'][STORED['presets'][name]])


def test_every_former_preset_has_a_name_of_today():
  former = preset_names.list_former()
  assert sorted(former.get(name, name) for name in FORMER) == sorted(NAMES)
  assert len(FORMER) == 40


@pytest.mark.parametrize('former', FORMER)
def test_a_preset_is_the_experiment_that_its_file_was(former):
  name = preset_names.list_former().get(former, former)
  experiment = config.load(name)
  assert as_data(experiment) == read_stored(former)
  if former == name:
    return
  family, size = name.split(':')
  place = f'{FOLDER}/{family}.py:{size}'
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert config.load(place) == experiment
  for old, new in ((former, name), (f'{FOLDER}/{former}.py', place)):
    with pytest.warns(UserWarning) as told:
      assert config.load(old) == experiment
    assert [str(x.message) for x in told] == [f'{old} is now {new}']


@pytest.mark.parametrize('name', FINETUNED)
def test_finetune_is_the_experiment_that_it_was(name):
  former = name.removeprefix('finetune ')
  model = config.load(preset_names.list_former()[former]).model
  if former == 'deepseek_v32':
    model = dataclasses.replace(model, mtp=model.period[0])
  start = types.SimpleNamespace(model=model, tokenizer='t/tokenizer.json')
  assert as_data(config.load('finetune', start)) == read_stored(name)


@pytest.mark.parametrize('family', preset_names.list_families())
def test_a_family_alone_is_the_size_in_its_command(family):
  if family == 'finetune':
    return
  doc = (FOLDER / f'{family}.py').read_text().split('"""')[1]
  place = re.search(r'--config=(\S+)', doc)[1]
  path, size = preset_names.locate_preset(str(FOLDER.parent / place))
  assert path == FOLDER / f'{family}.py'
  label = preset_names.label_preset(family)
  assert label == (f'{family}:{size}' if size else family)
  assert label in NAMES and config.load(label) == config.load(family)


@every_preset
def test_preset_builds_with_the_parameters_its_row_states(name):
  experiment = config.load(name)
  cfg = experiment.model
  if ':' in name:  # quickstart states what its run prints
    stated = re.search(r'# +([\d,]+)$', read_row(name))[1]
    assert calc.count_parameters(cfg) == int(stated.replace(',', ''))
  model = HybridLM(cfg, jnp.dtype(experiment.train.dtype))
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  logits, _ = jax.eval_shape(
    lambda params, tokens: model.apply(
      {'params': params}, tokens, cache=init_cache(cfg, 1, 64, jnp.bfloat16)
    ),
    sharding.make_abstract_params(model),
    tokens,
  )
  assert (logits.shape, logits.dtype) == ((1, 1, cfg.vocab), jnp.float32)


@every_preset
def test_preset_survives_json_and_fits_its_mesh(name):
  experiment = config.load(name)
  assert config.from_json(config.to_json(experiment)) == experiment
  mesh = sharding.make_mesh(experiment.mesh)
  sharding.make_param_shardings(HybridLM(experiment.model), mesh)


@pytest.mark.parametrize(
  'name', ['quickstart', 'small:hybrid_kda', 'small:window']
)
def test_the_table_of_presets_has_a_presets_row(name):
  lines = (FOLDER / 'README.md').read_text().splitlines()
  assert presets.format_row(name) in lines


@pytest.mark.slow
def test_the_table_of_presets_is_up_to_date():
  rows = {name: presets.format_row(name) for name in NAMES}
  table = (FOLDER / 'README.md').read_text()
  assert table == presets.format_page(rows)  # python -m launch.presets


def test_the_table_counts_a_window_as_constant():
  row = presets.format_row('small:window')
  layers = config.load('small:window').model.layers
  layer = layers[0].mixer
  kept = 2 * 2 * layer.kv_heads * layer.head_dim * layer.window
  assert row.endswith(f'| 0 | {len(layers) * kept / 2**20:.1f} |')
