"""Values and types of released tensors: rows beyond the vocabulary, NaN, scales
of FP8, and quantized weights, which are refused as such."""

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deltanet_jax import hf
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.hf import convert, files
from deltanet_jax.infer import text
from deltanet_jax.parallel import sharding
from deltanet_jax.runs.source import open_model
from tests import released, weights
from tests.hf.test_hf_files import refused

FLOAT8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
BF16 = ml_dtypes.bfloat16
EMBED, NORM = 'model.embed_tokens.weight', 'model.norm.weight'
QUERY, SCALE = (
  f'model.layers.1.self_attn.q_proj.weight{end}' for end in ('', '_scale_inv')
)
UE8M0 = {'quant_method': 'fp8', 'scale_fmt': 'ue8m0'}


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


def changed(folder, name='qwen3', more=None, **settings):
  found = weights.tensors(name) | (more or {})
  return weights.write(folder, name, found, **settings)


def query(params):
  """QUERY as it was loaded, [out, in]."""
  return (
    params['backbone']['period']['layer_0']['mixer']['q']['w'][1]
    .reshape(32, 64)
    .T
  )


def padded(found, rows):
  noise = np.random.default_rng(0)
  names = (EMBED, 'lm_head.weight')
  return {
    k: np.concatenate([x, noise.normal(size=(rows, 32)).astype(x.dtype)])
    for k, x in found.items()
    if k in names
  }


@pytest.mark.parametrize('name', ['qwen3', 'qwen3_moe'])
@pytest.mark.parametrize('rows', [1, 64])
def test_rows_beyond_the_vocabulary_are_left_out(name, rows, tmp_path):
  found = weights.tensors(name)
  _, wanted = hf.load_model(weights.write(tmp_path / 'plain', name))
  folder = changed(tmp_path / 'more', name, padded(found, rows))
  with pytest.warns(UserWarning) as said:
    model, params = hf.load_model(folder)
  assert model.cfg.vocab == 64
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  lines = [str(w.message) for w in said]
  assert len(lines) == (1 if name == 'qwen3' else 2)
  for words in (EMBED, f'{64 + rows} rows', 'from 64 on', 'vocab_size'):
    assert words in lines[0] and '\n' not in lines[0]
  with pytest.warns(UserWarning):
    hf.save_model(tmp_path / 'out', model, params, like=folder)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    _, again = hf.load_model(tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, again, wanted)


def test_other_tensors_and_shorter_embeddings_are_no_padding(tmp_path):
  short = {EMBED: weights.tensors('qwen3')[EMBED][:63]}
  refused(
    lambda: hf.load_model(changed(tmp_path / 'a', more=short)),
    EMBED,
    '(63, 32)',
  )
  wide = {QUERY: np.zeros((65, 32), np.float32)}
  refused(
    lambda: hf.load_model(changed(tmp_path / 'b', more=wide)), QUERY, '(65, 32)'
  )
  wide = {EMBED: np.zeros((65, 33), np.float32)}
  refused(
    lambda: hf.load_model(changed(tmp_path / 'c', more=wide)), EMBED, '(65, 33)'
  )


def test_a_repeated_head_may_be_padded_and_must_repeat(tmp_path):
  table = weights.tensors('qwen3')[EMBED]
  rows = np.ones((3, 32), np.float32)
  more = {'lm_head.weight': np.concatenate([table, rows])}
  with pytest.warns(UserWarning, match='67 rows'):
    hf.load_model(changed(tmp_path / 'a', more=more))
  more['lm_head.weight'][5, 5] += 1
  folder = changed(tmp_path / 'b', more=more)
  for call in (
    lambda: hf.load_model(folder),
    lambda: convert.convert_to_orbax(folder, tmp_path / 'orbax'),
  ):
    with pytest.warns(UserWarning):
      refused(call, 'lm_head.weight differs from')
  assert not (tmp_path / 'orbax').exists()
  more['lm_head.weight'] = table[:, :31]
  folder = changed(tmp_path / 'c', more=more)
  refused(lambda: hf.load_model(folder), 'lm_head.weight', '(64, 31)')


def with_value(value, dtype, scale=None):
  found = weights.tensors('qwen3')[QUERY].astype(dtype)
  found[7, 9] = value
  more = {QUERY: found}
  if scale is not None:
    more[SCALE] = scale
  return more


ONE = np.ones((1, 1), np.float32)
DAMAGED = {
  'float32 nan': (with_value(np.nan, np.float32), QUERY),
  'float32 inf': (with_value(np.inf, np.float32), QUERY),
  'float32 -inf': (with_value(-np.inf, np.float32), QUERY),
  'float64 nan': (with_value(np.nan, np.float64), QUERY),
  'float16 inf': (with_value(-np.inf, np.float16), QUERY),
  'bfloat16 nan': (with_value(-np.nan, BF16), QUERY),
  'bfloat16 inf': (with_value(np.inf, BF16), QUERY),
  'float8 nan': (with_value(np.nan, FLOAT8, ONE), QUERY),
  'float8 -nan': (with_value(-np.nan, FLOAT8, ONE), QUERY),
  'scale nan': (with_value(1, FLOAT8, ONE * np.nan), SCALE),
  'scale inf': (with_value(1, FLOAT8, (ONE * np.inf).astype(BF16)), SCALE),
  'exponent 255': (
    with_value(1, FLOAT8, np.full((1, 1), 255, np.uint8).view(E8M0)),
    SCALE,
  ),
  'product': (with_value(256, FLOAT8, ONE * 2.0**120), QUERY),
  'vector': ({NORM: np.full(32, np.nan, np.float32)}, NORM),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_nan_and_infinity_are_named_and_refused(case, tmp_path):
  more, name = DAMAGED[case]
  folder = changed(tmp_path / 'a', more=more)
  for dtype in (jnp.float32, jnp.bfloat16):
    where = str(folder / 'model.safetensors')
    refused(
      lambda d=dtype: hf.load_model(folder, dtype=d), where, f'{name} holds NaN'
    )
  whose = NORM if name == NORM else QUERY
  checked = lambda: files.FolderTensors(folder).read_checked(
    whose
  )  # as a conversion does
  refused(checked, where, f'{name} holds NaN')


def test_the_largest_finite_values_are_loaded(tmp_path):
  most = np.finfo(np.float32).max
  _, params = hf.load_model(
    changed(tmp_path / 'a', more=with_value(most, np.float32))
  )
  assert query(params)[7, 9] == most
  more = with_value(448, FLOAT8, ONE * 2.0**119)  # 1.75 * 2^127
  _, params = hf.load_model(changed(tmp_path / 'b', more=more))
  assert query(params)[7, 9] == np.float32(1.75 * 2.0**127)
  kept = files.FolderTensors(tmp_path / 'b').read_checked(QUERY)
  assert kept.dtype == FLOAT8 and kept[7, 9] == 448


@pytest.mark.parametrize(
  'value, dtype, loaded',
  [(1e300, np.float64, jnp.float32), (3.4e38, np.float32, jnp.bfloat16)],
)
def test_what_the_wanted_type_does_not_hold_is_refused(
  value, dtype, loaded, tmp_path
):
  folder = changed(tmp_path, more=with_value(value, dtype))
  refused(
    lambda: hf.load_model(folder, dtype=loaded), QUERY, jnp.dtype(loaded).name
  )


@pytest.mark.parametrize('dtype', [np.float64, np.float32, np.float16, BF16,
                                   FLOAT8, E8M0])  # fmt: skip
def test_every_pattern_that_is_no_number_is_found(dtype):
  kind = np.dtype(dtype)
  bits = np.arange(2 ** min(16, 8 * kind.itemsize), dtype=np.uint64)
  bits <<= np.uint64(8 * kind.itemsize - min(16, 8 * kind.itemsize))
  values = bits.astype(f'u{kind.itemsize}').view(kind)
  with np.errstate(invalid='ignore'):  # signalling NaN
    wanted = np.isfinite(values.astype(np.float64))
  assert 0 < (~wanted).sum() < wanted.sum()
  assert files.is_finite(values[wanted])
  some = slice(None, None, max(1, (~wanted).sum() // 300))
  for value in values[~wanted][some]:
    assert not files.is_finite(np.array([1, value, 1], kind))


def float8(scale):
  """(more tensors, their query in float64): FP8 with that scale."""
  small = weights.tensors('qwen3')[QUERY].astype(FLOAT8)
  return {QUERY: small, SCALE: scale}


@pytest.mark.parametrize('exponent', [100, 126, 127, 128, 140])
@pytest.mark.parametrize('stored', ['F8_E8M0', 'U8'])
def test_scales_that_are_exponents_are_powers_of_two(
  exponent, stored, tmp_path
):
  scale = np.full((1, 1), exponent, np.uint8)
  more = float8(scale if stored == 'U8' else scale.view(E8M0))
  folder = changed(tmp_path, more=more, quantization_config=UE8M0)
  _, params = hf.load_model(folder)
  small = more[QUERY].astype(np.float64)
  wanted = np.ldexp(small, exponent - 127).astype(np.float32)
  np.testing.assert_array_equal(query(params), wanted)


def test_every_exponent_is_two_to_its_power(tmp_path):
  path = tmp_path / 'model.safetensors'
  exponents = np.arange(255, dtype=np.uint8)
  small = np.ones((255 * 128, 1), FLOAT8)
  weights.write_file(
    path, {'w': small, 'w_scale_inv': exponents[:, None].view(E8M0)}
  )
  found = files.FolderTensors(tmp_path).read('w')[::128, 0]
  wanted = np.ldexp(1.0, exponents.astype(int) - 127).astype(np.float32)
  np.testing.assert_array_equal(found, wanted)


def test_each_of_stacked_matrices_has_blocks_of_its_own(tmp_path):
  noise = np.random.default_rng(0)
  small = noise.normal(size=(3, 200, 300)).astype(FLOAT8)
  exponents = noise.integers(120, 135, (3, 2, 3), np.uint8)
  found = {'e': small, 'e_scale_inv': exponents.view(E8M0)}
  weights.write_file(tmp_path / 'model.safetensors', found)
  wanted = np.empty(small.shape, np.float32)
  for e, i, j in np.ndindex(*small.shape):
    at = int(exponents[e, i // 128, j // 128]) - 127
    wanted[e, i, j] = np.ldexp(float(small[e, i, j]), at)
  read = files.FolderTensors(tmp_path).read('e')
  np.testing.assert_array_equal(read, wanted)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize('shape', [(200, 300), (3, 200, 300)])
def test_blocks_with_exponents_are_those_of_transformers(shape, tmp_path):
  torch = pytest.importorskip('torch')
  fp8 = pytest.importorskip('transformers.integrations.finegrained_fp8')
  noise = np.random.default_rng(0)
  small = noise.normal(size=shape).astype(FLOAT8)
  exponents = noise.integers(100, 150, (*shape[:-2], 2, 3), np.uint8)
  weights.write_file(
    tmp_path / 'model.safetensors',
    {'w': small, 'w_scale_inv': exponents.view(E8M0)},
  )
  wanted = fp8._dequantize_fp8_weight(
    torch.from_numpy(small.view(np.uint8)).view(torch.float8_e4m3fn),
    torch.from_numpy(exponents).view(torch.float8_e8m0fnu),
    (128, 128),
    torch.float32,
  )
  found = files.FolderTensors(tmp_path).read('w')
  np.testing.assert_array_equal(found, wanted.numpy())


BAD_SCALES = {
  'U8 without a word': (float8(np.full((1, 1), 127, np.uint8)), (SCALE, 'U8')),
  'I32': (float8(np.ones((1, 1), np.int32)), (SCALE, 'I32')),
  'I8': (float8(np.ones((1, 1), np.int8)), (SCALE, 'I8')),
  'BOOL': (float8(np.ones((1, 1), bool)), (SCALE, 'BOOL')),
  'F8_E4M3': (float8(np.ones((1, 1), FLOAT8)), (SCALE, 'F8_E4M3')),
  'scalar': (float8(np.float32(1)[None].reshape(())), (SCALE, '()')),
  'vector': (float8(np.ones(1, np.float32)), (SCALE, '(1,)')),
  'a row each': (float8(np.ones((64, 1), np.float32)), (SCALE, '(64, 1)')),
  'none': ({QUERY: float8(ONE)[QUERY]}, (QUERY, f'no {SCALE}')),
  'a norm': (
    {NORM: np.ones(32, FLOAT8), f'{NORM}_scale_inv': np.ones(1, np.float32)},
    (NORM, '(32,)'),
  ),
  'no float8': (
    {QUERY + '_scale_inv': np.ones((1, 1), np.float32)},
    (f'{QUERY}_scale_inv', 'is F32, not float8'),
  ),
  'E8M0 weights': ({QUERY: float8(ONE)[QUERY].view(E8M0)}, (QUERY, 'F8_E8M0')),
  'U8 weights': ({QUERY: float8(ONE)[QUERY].view(np.uint8)}, (QUERY, 'U8')),
}


def readers(folder, tmp_path):
  """Everything that reads weights: hf.load_model, what train and evaluate do,
  convert and generate."""

  def generate():
    how = {'max_tokens': 1, 'sampling': Sampling(), 'seed': 0}
    return list(text.continue_text(open_model(str(folder)), 'a', **how))

  return (
    lambda: hf.load_model(folder),
    lambda: open_model(str(folder)).check(),
    lambda: convert.convert_to_orbax(folder, tmp_path / 'orbax'),
    generate,
  )


@pytest.mark.parametrize('case', BAD_SCALES)
def test_other_scales_are_refused_alike_by_every_reader(case, tmp_path):
  more, words = BAD_SCALES[case]
  folder = changed(tmp_path / 'a', more=more)
  released.tokenizer().save(str(folder / 'tokenizer.json'))
  where = str(folder / 'model.safetensors')
  found = {refused(c, where, *words) for c in readers(folder, tmp_path)}
  assert len(found) == 1
  assert not (tmp_path / 'orbax').exists()


def packed(*names):
  """Tensors beside or in the place of QUERY, as a method stores them."""
  at = QUERY.removesuffix('weight')
  return {f'{at}{name}': np.ones((4, 4), np.int32) for name in names}


QUANTIZED = {
  'awq': ({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, {}),
  'gptq': ({'quantization_config': {'quant_method': 'gptq', 'bits': 4}}, {}),
  'bitsandbytes': (
    {'quantization_config': {'quant_method': 'bitsandbytes'}}, {},
  ),
  'compressed-tensors': (
    {'quantization_config': {'quant_method': 'compressed-tensors'}}, {},
  ),
  'modelopt': (
    {'quantization_config': {'quant_method': 'modelopt', 'quant_algo': 'FP4'}},
    {},
  ),
  'mxfp4': (
    {'text_config': weights.settings('qwen3') | {
      'quantization_config': {'quant_method': 'mxfp4'}}}, {},
  ),
  'bits': ({'quantization': {'group_size': 64, 'bits': 4}}, {}),  # MLX
  'group_size': ({'quantization_config': {'group_size': 64, 'bits': 4}}, {}),
  'weight_block_size': (
    {'quantization_config': {'quant_method': 'fp8',
                             'weight_block_size': [64, 64]}}, {},
  ),
  "fmt 'e5m2'": ({'quantization_config': {'fmt': 'e5m2'}}, {}),
  "quantization_config has 'x'": ({'quantization_config': 'x'}, {}),
  'qweight': ({}, packed('qweight', 'qzeros', 'scales')),
  'g_idx': ({}, packed('g_idx')),
  'biases': ({}, packed('weight', 'biases')),
  'weight_packed': ({}, packed('weight_packed', 'weight_shape')),
  'weight_scale_2': ({}, packed('weight_scale_2', 'weight')),
  'weight.absmax': ({}, packed('weight.absmax')),
  'quant_state': ({}, packed('weight.quant_state.bitsandbytes__nf4')),
  'SCB': ({}, packed('weight', 'SCB')),
  'input_scale': ({}, packed('input_scale')),
  'gate_up_proj_blocks': ({}, packed('gate_up_proj_blocks')),
}  # fmt: skip


@pytest.mark.parametrize('case', QUANTIZED)
def test_quantized_folders_are_refused_as_such_by_every_reader(case, tmp_path):
  settings, more = QUANTIZED[case]
  folder = changed(tmp_path / 'a', more=more, **settings)
  released.tokenizer().save(str(folder / 'tokenizer.json'))
  for call in readers(folder, tmp_path):
    message = refused(call, str(folder)).replace(str(folder), '')
    assert 'quantized weights' in message and case in message
  assert not (tmp_path / 'orbax').exists()


@pytest.mark.parametrize('value', [
  None, {}, {'quant_method': 'fp8', 'weight_block_size': [128, 128],
             'fmt': 'e4m3', 'activation_scheme': 'dynamic'}, UE8M0,
  {'quant_method': 'fp8', 'dequantize': False,
   'modules_to_not_convert': ['lm_head']},
])  # fmt: skip
def test_blocks_of_fp8_are_no_quantized_weights_to_refuse(value, tmp_path):
  hf.load_model(changed(tmp_path, quantization_config=value))
