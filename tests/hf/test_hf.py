"""Released folders: what is read is what is written, and what is wrong is
named."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltanet_jax import hf
from deltanet_jax.config import ConfigError, pattern
from deltanet_jax.hf import families, files, layout, output, plan
from deltanet_jax.hf.names import INDEX
from deltanet_jax.model import MTP, HybridLM, embed, get_head_weight
from deltanet_jax.parallel import sharding
from tests.parity import FIXTURES, SYSTEMS, quantize

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
  """Makes a copy of a fixture that may be spoiled."""

  def make(name='qwen3', change=None, **settings):
    path = tmp_path / name
    path.mkdir()
    tensors = load_file(FIXTURES / name / 'model.safetensors')
    if change is not None:
      tensors = change(tensors)
    described = {k: (v.dtype, v.shape) for k, v in tensors.items()}
    output.write_file(path / 'model.safetensors', described, tensors.values())
    text = (FIXTURES / name / 'config.released.json').read_text()
    found = json.loads(text) | settings
    (path / 'config.json').write_text(json.dumps(found))
    return path

  return make


def contents(path):
  source = files.FolderTensors(path)
  return {name: source.read(name) for name in source.names}


def raw_contents(path):
  """As they are stored: float8 and its scales apart."""
  source = files.FolderTensors(path)
  return {name: source.read_raw(name) for name in source.names}


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, tensor in wanted.items():
    assert found[name].dtype == tensor.dtype, name
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize('name', SYSTEMS)
def test_saved_tensors_are_the_loaded_ones(name, folder, tmp_path):
  source = folder(name)
  model, params = hf.load_model(source)
  out = tmp_path / 'out'
  hf.save_model(out, model, params)
  wanted = contents(source)
  if name == 'qwen3_5_moe':  # this fixture has one tensor for each expert
    experts = [k for k in contents(out) if k.endswith('gate_up_proj')]
    assert len(experts) == len(model.cfg.layers)
    again, read = hf.load_model(out)
    assert families.is_same_model(again.cfg, model.cfg)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    hf.save_model(tmp_path / 'like', model, params, like=source)
    out = tmp_path / 'like'
  assert_same(contents(out), wanted)
  again, read = hf.load_model(out)
  assert families.is_same_model(again.cfg, model.cfg)
  jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_loaded_model_is_saved_under_its_own_familys_names(folder, tmp_path):
  # to Qwen3-Next this model would be its own, under other names
  model, params = hf.load_model(folder('qwen3_5_moe'))
  assert families.match_family(model.cfg).name == 'qwen3_next'
  hf.save_model(tmp_path / 'out', model, params)
  saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert saved['model_type'] == 'qwen3_5_moe_text'
  names = files.FolderTensors(tmp_path / 'out').names
  assert 'model.layers.0.linear_attn.in_proj_qkv.weight' in names


def test_files_are_those_of_the_public_library(folder, tmp_path):
  source = folder()
  model, params = hf.load_model(source)
  hf.save_model(tmp_path / 'out', model, params)
  found = load_file(tmp_path / 'out' / 'model.safetensors')
  assert_same(found, load_file(source / 'model.safetensors'))


def test_many_files_with_an_index(folder, tmp_path):
  source = folder('qwen3_next')
  model, params = hf.load_model(source)
  out = tmp_path / 'out'
  hf.save_model(out, model, params, shard_bytes=100_000)
  index = json.loads((out / INDEX).read_text())
  names = sorted(path.name for path in out.glob('*.safetensors'))
  assert len(names) > 2
  assert set(index['weight_map'].values()) == set(names)
  total = sum(x.nbytes for x in contents(out).values())
  assert index['metadata']['total_size'] == total
  for path in out.glob('*.safetensors'):
    assert path.stat().st_size < 110_000
  assert_same(contents(out), contents(source))


def test_bfloat16_folders_stay_bfloat16(folder, tmp_path):
  half = lambda tensors: {
    k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()
  }
  source = folder(change=half)
  model, params = hf.load_model(source)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  hf.save_model(tmp_path / 'out', model, params, like=source)
  assert_same(contents(tmp_path / 'out'), contents(source))


def test_matrices_take_the_dtype_and_vectors_stay_float32(folder):
  _, params = hf.load_model(folder('qwen3_next'), dtype=jnp.bfloat16)
  for path, x in plan.list_leaves(params):
    scanned = path[1] == 'period'
    wanted = jnp.bfloat16 if x.ndim - scanned > 1 else jnp.float32
    assert x.dtype == wanted, path


def test_float8_is_multiplied_by_its_blocks_scales():
  noise = np.random.default_rng(0)
  tensor = noise.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
  scale = noise.uniform(0.5, 2, size=(2, 3)).astype(np.float32)
  found = files.dequantize(tensor, scale)
  wanted = np.empty((200, 300), np.float32)
  for i in range(200):
    for j in range(300):
      wanted[i, j] = np.float32(tensor[i, j]) * scale[i // 128, j // 128]
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('name', ['deepseek_v3', 'minimax_m2'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_float8_folder_is_saved_as_it_is(name, dtype, folder, tmp_path):
  settings = {'quantization_config': {'weight_block_size': [128, 128]}}
  source = folder(name, change=quantize, **settings)
  model, params = hf.load_model(source, dtype=dtype)
  hf.save_model(tmp_path / 'out', model, params, like=source)
  found, wanted = (raw_contents(at) for at in (tmp_path / 'out', source))
  small = [name for name, x in wanted.items() if x.dtype.itemsize == 1]
  assert len(small) > 20
  if dtype == jnp.bfloat16:  # the rest of this folder is float32
    kept = {*small, *(name + files.SCALE for name in small)}
    assert found.keys() == wanted.keys()
    found, wanted = ({k: x[k] for k in kept} for x in (found, wanted))
  assert_same(found, wanted)
  saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert saved['quantization_config'] == settings['quantization_config']


def test_trained_float8_is_saved_as_bfloat16_and_says_so(folder, tmp_path):
  source = folder('deepseek_v3', change=quantize, quantization_config={})
  model, params = hf.load_model(source)
  params['backbone']['period']['layer_0']['mixer']['o']['w'] += 1.0
  with pytest.warns(UserWarning, match='o_proj.weight differs from'):
    hf.save_model(tmp_path / 'out', model, params, like=source)
  found, wanted = contents(tmp_path / 'out'), contents(source)
  wanted = {k: v for k, v in wanted.items() if not k.endswith('_scale_inv')}
  assert found.keys() == wanted.keys()
  for name, x in wanted.items():
    more = 1 if 'o_proj' in name and 'layers.0' not in name else 0
    rounded = (x + np.float32(more)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
      found[name].astype(rounded.dtype), rounded, err_msg=name
    )
  saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert 'quantization_config' not in saved


GONE, WIDE = 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'


def without(tensors):
  return {k: v for k, v in tensors.items() if k != GONE}


def widened(tensors):
  return tensors | {WIDE: np.zeros(33, np.float32)}


def added(tensors):
  return tensors | {'model.layers.7.mlp.bias': np.zeros(3, np.float32)}


def integers(tensors):
  return tensors | {WIDE: np.zeros(32, np.int32)}


@pytest.mark.parametrize(
  'change, pieces',
  [
    (without, (GONE, '(48, 32)')),
    (widened, (WIDE, '(33,)', '(32,)', 'model.safetensors')),
    (added, ('model.layers.7.mlp.bias', '(3,)', 'model.safetensors')),
  ],
)
def test_wrong_tensors_are_named_with_file_and_shape(folder, change, pieces):
  source = folder(change=change)
  with pytest.raises(ConfigError) as error:
    hf.load_model(source)
  for piece in (*pieces, str(source)):
    assert piece in str(error.value)


def test_a_type_that_is_no_number_of_ours_is_named(folder):
  source = folder()
  path = source / 'model.safetensors'
  save_file(integers(load_file(path)), path)
  with pytest.raises(ConfigError, match=f'{WIDE} has type I32'):
    hf.load_model(source)


def test_float8_without_its_scale_is_named(folder):
  name = 'model.layers.1.self_attn.o_proj.weight'
  drop = lambda tensors: {
    k: v for k, v in quantize(tensors).items() if k != name + '_scale_inv'
  }
  with pytest.raises(ConfigError, match=re.escape(name)):
    hf.load_model(folder('deepseek_v3', change=drop))


def test_a_cut_file_is_an_error_with_its_name(folder):
  source = folder()
  path = source / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ConfigError, match='model.safetensors: cannot be read'):
    hf.load_model(source)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2' is not supported; supported"),
    ({'attention_bias': True}, 'attention_bias is True; supported: False'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'rope_scaling': {'type': 'linear'}}, "rope scaling 'linear'"),
    ({'num_attention_heads': 3}, 'no multiple of kv_heads'),
  ],
)
def test_settings_that_we_do_not_have_are_refused(folder, settings, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    hf.load_model(folder(**settings))


def test_no_folder_no_config_and_no_weights_are_errors(tmp_path, folder):
  with pytest.raises(ConfigError, match='config.json: no such file'):
    hf.load_model(tmp_path / 'nowhere')
  source = folder()
  (source / 'model.safetensors').unlink()
  with pytest.raises(ConfigError, match=r'no \*\.safetensors'):
    hf.load_model(source)


def test_an_index_to_a_missing_file_is_an_error(folder, tmp_path):
  model, params = hf.load_model(folder())
  hf.save_model(tmp_path / 'out', model, params, shard_bytes=20_000)
  first = sorted((tmp_path / 'out').glob('*.safetensors'))[0]
  first.unlink()
  with pytest.raises(ConfigError, match=first.name):
    hf.load_model(tmp_path / 'out')


def test_the_text_of_a_multimodal_model_is_read(folder):
  inner = lambda tensors: (
    {
      k.replace('model.', 'model.language_model.', 1): v
      for k, v in tensors.items()
    }
    | {'model.visual.patch.weight': np.zeros((2, 2), np.float32)}
  )
  source = folder('qwen3_5', change=inner)
  _, params = hf.load_model(source)
  wanted = contents(source)['model.language_model.embed_tokens.weight']
  np.testing.assert_array_equal(params['backbone']['embed'], wanted)


def test_olmo_norms_under_the_name_that_transformers_writes(folder):
  rename = lambda tensors: {
    k.replace('.post_attention_layernorm.', '.feedforward_layer_norm.'): v
    for k, v in tensors.items()
  }
  source = folder('olmo_hybrid', change=rename)
  _, params = hf.load_model(source)
  norm = params['backbone']['period']['layer_1']['mixer_norm']['scale'][0]
  name = 'model.layers.1.feedforward_layer_norm.weight'
  np.testing.assert_array_equal(norm, contents(source)[name])


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(folder):
  table = 'model.embed_tokens.weight'
  same = lambda tensors: tensors | {'lm_head.weight': tensors[table]}
  source = folder(change=same)
  hf.load_model(source)
  tensors = contents(source)
  tensors['lm_head.weight'] = tensors[table] + 1
  save_file(tensors, source / 'model.safetensors')
  with pytest.raises(ConfigError, match='lm_head.weight differs from'):
    hf.load_model(source)


def test_multi_token_prediction_is_the_references(folder, tmp_path):
  more = load_file(FIXTURES / 'qwen3_next' / 'mtp.safetensors')
  source = folder('qwen3_next', change=lambda tensors: tensors | more)
  model, params = hf.load_model(source)
  reference = np.load(FIXTURES / 'qwen3_next' / 'mtp.npz')
  tokens = jnp.asarray(reference['tokens'], jnp.int32)[:, 1:]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, *_ = MTP(model.cfg).apply(
    {'params': params['mtp']},
    reference['main_hidden'][:, :-1],
    embed(params, tokens),
    positions,
  )
  np.testing.assert_allclose(hidden, reference['hidden'], atol=2e-5)
  logits = hidden @ get_head_weight(params, model.cfg)
  np.testing.assert_allclose(logits, reference['logits'], atol=5e-5)
  hf.save_model(tmp_path / 'out', model, params)
  assert_same(contents(tmp_path / 'out'), contents(source))


def test_deepseeks_prediction_layer_with_its_copies(folder, tmp_path):
  at, last = 'model.layers.3.', 'model.layers.2.'

  def add(tensors):
    more = {k.replace(last, at): v + 1 for k, v in tensors.items() if last in k}
    norms = ('enorm', 'hnorm', 'shared_head.norm')
    more |= {f'{at}{n}.weight': np.ones(32, np.float32) for n in norms}
    return (
      tensors
      | more
      | {
        f'{at}eh_proj.weight': np.ones((32, 64), np.float32),
        f'{at}embed_tokens.weight': tensors['model.embed_tokens.weight'],
        f'{at}shared_head.head.weight': tensors['lm_head.weight'],
      }
    )

  source = folder('deepseek_v3', change=add)
  model, params = hf.load_model(source)
  assert params['mtp']['proj']['w'].shape == (64, 32)
  hf.save_model(tmp_path / 'out', model, params, like=source)
  assert_same(contents(tmp_path / 'out'), contents(source))


@pytest.mark.parametrize(
  'kind, shapes',
  [
    (layout.Linear(), [(6, 4)]),
    (layout.Linear(inward=2), [(2, 3, 5)]),
    (layout.Linear(groups=2), [(5, 2, 3), (5, 4, 3), (5, 2, 1)]),
    (layout.Linear(lead=1), [(3, 4, 5), (3, 4, 5)]),
    (layout.Conv(), [(4, 2, 3), (4, 5, 1)]),
    (layout.Flat(before=2, after=1), [(7,)]),
  ],
)
def test_layouts_undo_themselves(kind, shapes):
  noise = np.random.default_rng(0)
  weights = [noise.normal(size=shape) for shape in shapes]
  tensor = kind.join(weights)
  assert tensor.shape == kind.shape(shapes)
  for found, wanted in zip(kind.split(tensor, shapes), weights, strict=True):
    np.testing.assert_array_equal(found, wanted)


def test_fused_rows_are_groups_of_every_part():
  # 2 key heads: [q k v v z z] each, as Qwen3-Next fuses them
  rows = np.arange(12)[:, None] * np.ones((1, 3))
  q, k, v = layout.Linear(groups=2).split(rows, [(3, 2), (3, 2), (3, 4, 2)])
  assert (q[0].tolist(), k[0].tolist()) == ([0, 6], [1, 7])
  assert v[0].tolist() == [[2, 3], [4, 5], [8, 9], [10, 11]]


@pytest.mark.parametrize(
  'layers, folded',
  [
    ('aaaa', ('', 'a', 4, '')),
    ('abababx', ('', 'ab', 3, 'x')),
    ('dkkmkkkmkkkmkkm', ('d', 'kkmk', 3, 'km')),
    ('abc', ('', 'abc', 1, '')),
  ],
)
def test_layers_are_folded_into_their_period(layers, folded):
  found = pattern.fold_layers(layers)
  assert tuple(x if isinstance(x, int) else ''.join(x) for x in found) == folded


def test_a_plan_that_misses_a_weight_is_an_error(folder):
  family, cfg = families.read_config(folder())
  less = family._replace(layer_rules=(lambda layer: (),))
  shapes = sharding.make_abstract_params(HybridLM(cfg))
  with pytest.raises(ValueError, match='hold 0 of the'):
    plan.build_plan(less, cfg, shapes)
