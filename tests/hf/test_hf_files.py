"""Released folders as they are found: where their files may lie, how layers are
stored and called, what values and types their tensors may have."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.hf import convert, converted, files, hub
from deltanet_jax.hf.names import INDEX
from deltanet_jax.parallel import sharding
from deltanet_jax.runs.release import _Released
from deltanet_jax.runs.source import open_model
from tests import weights

NORM = 'model.norm.weight'
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
MOE = ['qwen3_moe', 'qwen3_5_moe', *map(slow, (
  'qwen3_next', 'deepseek_v3', 'kimi_linear', 'minimax_m1', 'minimax_m2',
))]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def shapes_once():
  """Tracing a model takes longer than reading its files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding,
      'make_abstract_params',
      functools.cache(sharding.make_abstract_params),
    )
    yield


@functools.cache
def plain(name):
  """The parameters of a fixture."""
  with tempfile.TemporaryDirectory() as folder:
    return hf.load_model(weights.write(pathlib.Path(folder), name))[1]


def assert_loads(folder, name, **kwargs):
  _, params = hf.load_model(folder, **kwargs)
  jax.tree.map(np.testing.assert_array_equal, params, plain(name))


def refused(call, *words):
  """The message of a ConfigError, one line with these words."""
  with pytest.raises(ConfigError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message
  return message


BAD_NAMES = [
  '../model.safetensors', '/etc/model.safetensors', 'a/../../b.safetensors',
  './model.safetensors', 'a//b.safetensors', 'a/', '', '.', '..', 'a/.',
  'model.safetensors/', 'x\0.safetensors', 'x\n.safetensors',
  '\ud800.safetensors', 'config.json', None, 1, ['a.safetensors'], {},
]  # fmt: skip


@pytest.mark.parametrize('file', BAD_NAMES, ids=repr)
def test_a_name_that_could_lie_elsewhere_is_refused_before_reading(
  file, tmp_path, monkeypatch
):
  folder = weights.write(tmp_path / 'model', 'qwen3')
  (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
  index = {key: 'model.safetensors' for key in weights.tensors('qwen3')}
  weights.write_index(folder, index | {NORM: file})
  monkeypatch.setattr(files, 'File', None)  # reads nothing
  where = INDEX, NORM, repr(file)
  refused(lambda: hf.load_model(folder), *where)
  refused(lambda: open_model(str(folder)), *where)
  refused(lambda: convert.convert_to_orbax(folder, tmp_path / 'orbax'), *where)
  assert not (tmp_path / 'orbax').exists()


@pytest.mark.parametrize(
  'index',
  ['[]', 'null', '"x"', '{}', '{"weight_map": null}', '{"weight_map": []}',
   '{"weight_map": {}}', '{', '\udcff', '[' * 100_000],
  ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_index_is_one_line(index, tmp_path):
  folder = weights.write(tmp_path, 'qwen3')
  data = index.encode(errors='surrogateescape')
  (folder / INDEX).write_bytes(data)
  refused(lambda: hf.load_model(folder), str(folder))


def test_values_nested_to_any_depth_are_one_line(tmp_path):
  folder = weights.write(tmp_path, 'qwen3')
  for depth in range(900, 1000):
    deep = '[' * depth + ']' * depth
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": {deep}}}}}')
    refused(lambda: hf.load_model(folder), INDEX)


def test_files_in_subfolders_are_read(tmp_path):
  parts = ['a/model-1.safetensors', 'b/c/model-2.safetensors', 'x.safetensors']
  folder = weights.write(tmp_path, 'qwen3', files=parts)
  assert_loads(folder, 'qwen3')


def test_linked_files_are_read_and_folders_linked_to_elsewhere_are_not(
  tmp_path,
):
  parts = ['a/model-1.safetensors', 'x.safetensors']
  folder = weights.write(tmp_path / 'plain', 'qwen3', files=parts)
  assert_loads(weights.snapshot(folder, tmp_path / 'cache'), 'qwen3')
  (folder / 'a').rename(folder / 'inside')
  (folder / 'a').symlink_to('inside')
  assert_loads(folder, 'qwen3')
  (folder / 'a').unlink()
  (folder / 'inside').rename(tmp_path / 'outside')
  (folder / 'a').symlink_to('../outside')
  refused(lambda: hf.load_model(folder), 'a/model-1.safetensors', 'outside')


def test_subfolders_of_the_hub_are_fetched_when_the_index_names_them(
  tmp_path, monkeypatch
):
  real = pytest.importorskip('huggingface_hub')
  parts = ['a/model-1.safetensors', 'x.safetensors']
  folder, asked = weights.write(tmp_path, 'qwen3', files=parts), []
  monkeypatch.setattr(
    real,
    'snapshot_download',
    lambda name, **how: asked.append(how['allow_patterns']) or str(folder),
  )
  hub.find_folder('hub:a/b')
  assert asked[1:] == [parts[:1]]


RECORD = {'family': 'qwen3', 'config': {}, 'float8': {}, 'format': 2}


@pytest.mark.parametrize(
  'found',
  [
    ['../x.safetensors', 'float32', [1]],
    ['/x.safetensors', 'float32', [1]],
    ['x.safetensors', 'float99', [1]],
    ['x.safetensors', 'int32', [1]],
    ['x.safetensors', 'float32', 1],
    ['x.safetensors', 'float32', ['1', None]],
    ['x.safetensors'],
    None,
  ],
)
def test_names_that_a_conversion_or_a_run_stored_are_no_more_trusted(
  found, tmp_path
):
  record = RECORD | {'tensors': {NORM: found}}
  (tmp_path / 'orbax').mkdir()
  path = tmp_path / 'orbax' / converted.RECORD
  path.write_text(json.dumps(record))
  back = tmp_path / 'back'
  refused(
    lambda: convert.convert_to_released(path.parent, back), str(path), NORM
  )
  assert not back.exists()
  refused(
    lambda: _Released(record['tensors'], {}, '/gone', 'start.json'),
    'start.json',
    NORM,
  )


def fused(found, layers, kinds=('gate_up', 'down')):
  """Tensors with some layers' experts as transformers 5 holds them in memory:
  gate_up_proj [E,2F,D], gate above up, and down_proj [E,D,F]."""
  found, places = dict(found), weights_of_experts(found)
  for at in filter(layers, places):
    parts = {'gate_up': ('gate_proj', 'up_proj'), 'down': ('down_proj',)}
    if f'{at}0.w1.weight' in found:
      parts = {'gate_up': ('w1', 'w3'), 'down': ('w2',)}
    for kind in kinds:
      found[f'{at}{kind}_proj'] = np.stack(
        [
          np.concatenate(
            [found.pop(f'{at}{e}.{part}.weight') for part in parts[kind]]
          )
          for e in range(places[at])
        ]
      )
  return found


def weights_of_experts(found):
  """{where a layer's experts are: how many}."""
  counts = {}
  for name in found:
    at, experts, rest = name.partition('.experts.')
    if experts and rest.endswith(('.down_proj.weight', '.w2.weight')):
      counts[f'{at}.experts.'] = counts.get(f'{at}.experts.', 0) + 1
  return counts


@pytest.mark.parametrize('name', MOE)
@pytest.mark.parametrize('kinds', [('gate_up', 'down'), ('gate_up',)])
def test_experts_are_fused_in_some_layers_and_apart_in_others(
  name, kinds, tmp_path
):
  found = weights.tensors(name)
  places = sorted(weights_of_experts(found))
  assert len(places) > 1
  for i, chosen in enumerate((places[:1], places[1:], places)):
    mixed = fused(found, chosen.__contains__, kinds)
    assert mixed.keys() != found.keys()
    assert_loads(weights.write(tmp_path / str(i), name, mixed), name)


@pytest.mark.slow
def test_experts_of_the_further_token_are_fused(tmp_path):
  whole = weights.tensors('qwen3_next') | weights.tensors('qwen3_next', 'mtp')
  apart = weights.write(tmp_path / 'apart', 'qwen3_next', whole)
  mixed = fused(whole, lambda at: at.startswith('mtp.'))
  assert 'mtp.layers.0.mlp.experts.down_proj' in mixed
  one = weights.write(tmp_path / 'fused', 'qwen3_next', mixed)
  (_, wanted), (_, found) = hf.load_model(apart), hf.load_model(one)
  assert 'mtp' in found
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('drop', ['1.mlp.experts.2.up', '1.mlp.experts.0.down'])
def test_a_missing_expert_is_named_where_layers_differ(drop, tmp_path):
  found = fused(weights.tensors('qwen3_moe'), lambda at: 'layers.0.' in at)
  gone = next(name for name in found if drop in name)
  del found[gone]
  folder = weights.write(tmp_path, 'qwen3_moe', found)
  refused(lambda: hf.load_model(folder), f'no tensor {gone}')


PREFIXES = [
  ('model.language_model.', ''),
  ('model.language_model.', 'model.'),
  ('model.language_model.language_model.', ''),
  ('model.language_model.language_model.', 'model.language_model.'),
  ('language_model.model.', 'language_model.'),
  ('thinker.text.model.', 'thinker.'),
  ('_orig_mod.model.', '_orig_mod.'),
  ('', ''),
]


@pytest.mark.parametrize('inner, outer', PREFIXES)
@pytest.mark.parametrize(
  'name', ['qwen3_5', slow('deepseek_v3'), slow('qwen3_next')]
)
def test_parameters_are_found_under_any_prefix(name, inner, outer, tmp_path):
  found = weights.tensors(name)
  moved = {
    inner + key.removeprefix('model.')
    if key.startswith('model.')
    else outer + key: x
    for key, x in found.items()
  }
  assert f'{outer}lm_head.weight' in moved
  assert_loads(weights.write(tmp_path, name, moved), name)


@pytest.mark.parametrize('inner, outer', PREFIXES)
def test_other_parts_of_a_wrapped_model_are_passed_over(inner, outer, tmp_path):
  found = weights.tensors('qwen3_5')
  moved = {
    inner + key.removeprefix('model.')
    if key.startswith('model.')
    else outer + key: x
    for key, x in found.items()
  }
  more = {
    f'{outer}mtp.fc.weight': np.zeros((2, 2), np.float32),
    f'{outer}visual.patch.weight': np.zeros((2, 2), np.float32),
  }
  assert_loads(weights.write(tmp_path, 'qwen3_5', moved | more), 'qwen3_5')


def further_of_deepseek():
  """DeepSeek's tensors with a further token: one more layer, which repeats the
  embedding and the head."""
  found = weights.tensors('deepseek_v3')
  at, last = 'model.layers.3.', 'model.layers.2.'
  more = {k.replace(last, at): x for k, x in found.items() if last in k}
  noise = np.random.default_rng(0)
  more[f'{at}eh_proj.weight'] = noise.normal(size=(32, 64)).astype(np.float32)
  for norm in ('enorm', 'hnorm', 'shared_head.norm'):
    more[f'{at}{norm}.weight'] = noise.normal(size=32).astype(np.float32)
  more[f'{at}embed_tokens.weight'] = found['model.embed_tokens.weight']
  more[f'{at}shared_head.head.weight'] = found['lm_head.weight']
  return found | more


@pytest.mark.slow
@pytest.mark.parametrize('name', ['qwen3_next', 'deepseek_v3'])
def test_a_further_token_is_found_under_a_prefix(name, tmp_path):
  if name == 'deepseek_v3':
    whole = further_of_deepseek()
  else:
    whole = weights.tensors(name) | weights.tensors(name, 'mtp')
  plain = weights.write(tmp_path / 'plain', name, whole)
  moved = {f'language_model.{key}': x for key, x in whole.items()}
  wrapped = weights.write(tmp_path / 'wrapped', name, moved)
  (_, wanted), (_, found) = hf.load_model(plain), hf.load_model(wrapped)
  assert 'mtp' in found
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_the_head_of_a_further_token_may_be_the_embedding(tmp_path):
  found = further_of_deepseek()
  table = found['model.embed_tokens.weight']
  del found['lm_head.weight']
  at = 'model.layers.3.shared_head.head.weight'
  tied = {'tie_word_embeddings': True}
  folder = weights.write(tmp_path, 'deepseek_v3', found | {at: table}, **tied)
  model, _ = hf.load_model(folder)
  assert model.cfg.tied and model.cfg.mtp is not None
  weights.write(folder, 'deepseek_v3', found, **tied)
  refused(
    lambda: hf.load_model(folder), f'{at} differs from the model.embed_tokens'
  )


def test_what_is_missing_is_named_as_the_folder_would_have_it(tmp_path):
  found = weights.tensors('qwen3')
  moved = {
    key.replace('model.', 'language_model.model.', 1): x
    for key, x in found.items()
    if key != NORM
  }
  folder = weights.write(tmp_path, 'qwen3', moved)
  refused(lambda: hf.load_model(folder), f'no tensor language_model.{NORM}')


@pytest.mark.parametrize(
  'buffer',
  [
    'model.rotary_emb.inv_freq',
    'rotary_emb.inv_freq',
    'model.rotary_emb.original_inv_freq',
    'model.layers.1.self_attn.rotary_emb.inv_freq',
    'model.layers.1.self_attn.rotary_emb.cos_cached',
    'model.layers.1.self_attn.masked_bias',
    'model.layers.1.attention.masked_bias',
    'model.layers.0.self_attn.slope_rate',
    'model.position_ids',
  ],
)
def test_buffers_that_hold_no_parameter_are_passed_over(buffer, tmp_path):
  more = {buffer: np.ones(8, np.float32)}
  folder = weights.write(tmp_path, 'qwen3', weights.tensors('qwen3') | more)
  assert_loads(folder, 'qwen3')
  assert buffer not in open_model(str(folder)).released['tensors']


@pytest.mark.parametrize(
  'name', ['model.rotary_emb.scale', 'model.layers.1.self_attn.bias',
           'inv_freq', 'model.layers.1.mlp.gate.weight']
)  # fmt: skip
def test_a_tensor_that_is_none_of_the_models_is_named(name, tmp_path):
  more = {name: np.ones(8, np.float32)}
  folder = weights.write(tmp_path, 'qwen3', weights.tensors('qwen3') | more)
  refused(lambda: hf.load_model(folder), name, '(8,)', 'model.safetensors')


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['qwen3_moe', 'qwen3_next', 'qwen3_5_moe', 'deepseek_v3']
)
def test_fused_experts_are_those_that_the_classes_hold(name, tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.AutoConfig.from_pretrained(weights.FIXTURES / name)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    weights.FIXTURES / name, config=config
  )
  held = {k: v.numpy() for k, v in model.state_dict().items()}
  assert_loads(weights.write(tmp_path / 'all', name, held), name)
  last = f'.layers.{len(model.model.layers) - 1}.'
  apart = lambda found: {k: v for k, v in found.items() if last not in k}
  one = lambda found: {k: v for k, v in found.items() if last in k}
  for i, (first, second) in enumerate([(apart, one), (one, apart)]):
    mixed = first(held) | second(weights.tensors(name))
    assert any('gate_up_proj' in k for k in mixed)
    assert any('.experts.0.' in k for k in mixed)
    assert_loads(weights.write(tmp_path / str(i), name, mixed), name)
