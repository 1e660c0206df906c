"""Softmax attention by splash attention, interpreted on the CPU, and by cuDNN,
up to the call of the library: against float64, and what is refused."""

import dataclasses
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deltanet_jax as dn
from deltanet_jax import kernels
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, MeshConfig, MLPConfig
from deltanet_jax.config.mixers import AttentionConfig, MLAConfig
from deltanet_jax.kernels import attention, attention_cudnn, attention_tpu, tpu
from deltanet_jax.mixers.base import Context
from deltanet_jax.parallel import sharding
from tests import compile_kernels
from tests.lab.test_dryrun import needs_libtpu
from tests.mixers import test_attention as plain

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(autouse=True)
def interpreted():
  with tpu.interpret(True):
    yield


@pytest.fixture
def on_xla(monkeypatch):
  """XLA in place of cuDNN, with the same arguments."""
  call = jax.nn.dot_product_attention

  def attend(*args, implementation, **how):
    assert implementation == 'cudnn'
    return call(*args, implementation='xla', **how)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
  guarded = attention_cudnn.differentiate_once
  anywhere = lambda *args, **how: guarded(*args, **how | {'platform': None})
  monkeypatch.setattr(attention_cudnn, 'differentiate_once', anywhere)


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention_tpu, 'BLOCK', 128)


def check(form, T, ends, window, dtype, bound):
  inputs = [np.float32(jnp.asarray(x, dtype)) for x in plain.row(T)]
  ids = plain.documents(T, ends)
  how = {'scale': plain.SCALE, 'window': window, 'segment_ids': ids}
  run = functools.partial(dn.attention, form=form, **how)
  got = plain.pull(run, *inputs, dtype)
  errors = plain.errors_of(got, inputs, ids, window)
  assert max(errors.values()) < bound, errors


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize(
  'T, ends, window, dtype',
  [
    (300, 170, None, 'float32'),
    (300, 170, 140, 'float32'),
    pytest.param(300, 170, None, 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_splash_is_the_softmax_gradients_too(T, ends, window, dtype):
  check('splash', T, ends, window, dtype, 4e-6 if dtype == 'float32' else 2e-2)


@pytest.mark.parametrize('window', [None, 1, 128, 129, 200, 1000])
def test_which_blocks_are_seen_is_what_the_library_finds(window):
  masks, splash = attention_tpu.masks, attention_tpu.splash
  shape = 640, 640
  mask = masks.CausalMask(shape)
  if window is not None:
    mask = masks.LocalMask(shape, (window - 1, 0), 0)
  want = splash.make_splash_mha_single_device(
    masks.MultiHeadMask([mask] * 2), block_sizes=splash.BlockSizes(*[128] * 8)
  )
  got = attention_tpu._make_kernel(2, 5, 128, window, False)
  # an array of jax would be made on the devices of a mesh, perhaps of none here
  assert {type(x) for x in jax.tree.leaves(got)} == {np.ndarray}
  jax.tree.map(
    np.testing.assert_array_equal, *map(jax.tree.leaves, (got, want))
  )


@pytest.mark.usefixtures('on_xla')
@pytest.mark.parametrize(
  'T, ends, window', [(15, None, 5), (15, 4, None), (16, 4, 3)]
)
def test_cudnn_is_given_the_masks(T, ends, window):
  check('cudnn', T, ends, window, 'bfloat16', 2e-2)


def test_programs_for_cuda_call_cudnn(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as library

  monkeypatch.setattr(library, 'check_cudnn_version', lambda: 91_100)

  def calls(T, ids, window):
    shape = lambda *sizes, dtype='bfloat16': jax.ShapeDtypeStruct(
      (2, T, *sizes), dtype
    )
    ids = shape(dtype='int32') if ids else None
    run = functools.partial(dn.attention, form='cudnn', window=window)
    grad = jax.grad(lambda *x, ids: jnp.sum(run(*x, segment_ids=ids)))
    args = shape(4, 20), shape(2, 20), shape(2, 12)
    traced = jax.jit(grad).trace(*args, ids=ids)
    text = traced.lower(lowering_platforms=('cuda',))
    call = r'\$fmha(\w+).*window_length\\22: (\d+).*} : \(tensor<([\dx]+)x'
    return re.findall(call, text.as_text())

  one, two = calls(15, False, 5)
  assert one == ('Softmax', '5', '2x16x4x24')
  assert two == ('SoftmaxBackward', '5', '2x16x4x24')
  one, two = calls(15, True, 5)
  assert one == ('ScaleBiasSoftmax', '0', '2x16x4x24')
  assert two == ('ScaleBiasSoftmaxBackward', '0', '2x16x4x24')


# ---------------------------------------------------------------- what it is in


@pytest.mark.parametrize('cls', [AttentionConfig, MLAConfig])
def test_a_mixer_has_its_form_for_whole_rows_alone(cls):
  cfg = dataclasses.replace(cls.tiny(), form='splash')
  cache = cfg.init_cache(1, 8, jnp.float32)

  def program(*cache):
    layer, key = cfg.make(d_model=16), jax.random.key(0)
    run = lambda x: layer.init_with_output(key, x, Context(), *cache)
    return str(jax.make_jaxpr(run)(jnp.zeros((1, 4, 16))))

  assert 'form=splash' in program()
  assert 'form=splash' not in program(cache)


@pytest.mark.slow
def test_latent_attention_has_splash_on_its_share_of_a_mesh():
  cfg = lambda form: dataclasses.replace(MLAConfig.tiny(), form=form)
  x = jax.random.normal(jax.random.key(0), (2, 40, 16))
  ctx = Context(None, jnp.repeat(jnp.asarray([[0, 1], [0, 0]]), 20, 1))
  params = nn.unbox(cfg('blocks').make(d_model=16).init(jax.random.key(1), x))

  def loss(form, params):
    layer = cfg(form).make(d_model=16)
    run = jax.checkpoint(lambda x, _: (layer.apply(params, x, ctx)[0], None))
    return jnp.sum(jax.lax.scan(run, x, length=2)[0] ** 2)

  grad = lambda form: jax.jit(jax.grad(functools.partial(loss, form)))(params)
  want = grad('blocks')
  with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))):
    got = grad('splash')
  near = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
  jax.tree.map(near, got, want)


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize(
  'change, on_tpu, on_gpu',
  [
    ({}, 'splash', 'cudnn'),
    ({'K': 192}, 'splash', 'blocks'),
    ({'K': 192, 'card': 9.0}, 'splash', 'cudnn'),
    ({'card': 7.5}, 'splash', 'blocks'),
    ({'dtype': 'float32'}, 'splash', 'blocks'),
    ({'dtype': 'float16'}, 'blocks', 'cudnn'),
    ({'T': 4097}, 'splash', 'blocks'),
    ({'T': 4097, 'segments': None}, 'splash', 'cudnn'),
  ],
  ids=str,
)
def test_auto_is_the_library_of_the_platform_for_what_it_covers(
  change, on_tpu, on_gpu, monkeypatch
):
  of = {'K': 128, 'T': 4096, 'dtype': 'bfloat16', 'card': 8.0} | change
  monkeypatch.setattr(attention_cudnn, 'find_capability', lambda: of['card'])
  shape = lambda *sizes, dtype=of['dtype']: jax.ShapeDtypeStruct(
    (1, of['T'], *sizes), dtype
  )
  segments = change.get('segments', shape(dtype='int32'))
  choose = functools.partial(
    attention.choose_form, 'auto', shape(4, of['K']), shape(2, of['K']),
    shape(2, 128), segments,
  )  # fmt: skip
  platform = lambda name: types.SimpleNamespace(platform=name, device_kind=name)
  assert choose(platform('tpu')) == on_tpu
  assert choose(platform('gpu')) == on_gpu
  assert choose(platform('cpu')) == choose() == 'blocks'  # as the tests run on


# ---------------------------------------------------------------- refusals


def _call(form, dtype='bfloat16', K=8, T=2):
  q = jnp.zeros((1, T, 1, K), dtype)
  return lambda v: dn.attention(q, q, v, form=form), q


@pytest.mark.parametrize(
  'form, how, says',
  [
    ('splash', {'dtype': 'float16'}, 'q, k, v of float16; give all three in'),
    ('splash', {'K': 520}, '520 channels; give 512 at most, or take form='),
    ('splash', {'T': 2**18 + 1}, '262145 tokens; give 262144 at most'),
    ('cudnn', {'dtype': 'float32'}, 'q, k, v of float32; give all three in'),
    ('cudnn', {'K': 264}, '264 channels; give 256 at most, or take form='),
  ],
)
def test_what_a_library_does_not_cover_is_one_line(form, how, says):
  run, v = _call(form, **how)
  with pytest.raises(ValueError, match=f"^form '{form}' with .*{says}"):
    run(v)


def test_a_run_on_other_devices_is_refused():
  for form, own in (('splash', 'tpu'), ('cudnn', 'gpu')):
    mixer = dataclasses.replace(AttentionConfig.tiny(), form=form)
    layers = [Layer(mixer, MLPConfig(8))]
    kernels.require_platform(layers, own)
    with pytest.raises(ConfigError, match=f"'{form}', .*are cpu; give 'auto'"):
      kernels.require_platform(layers, 'cpu')


def test_another_platform_and_a_second_derivative_are_refused():
  run, v = _call('splash')
  with tpu.interpret(False):
    says = "^form 'splash' is for TPUs, and .*cpu; take form='blocks'"
    with pytest.raises(ValueError, match=says):
      run(v)
  with pytest.raises(ValueError, match="^form 'cudnn'.*; take form='blocks'"):
    _call('cudnn')[0](v)
  first = lambda v, w: jnp.sum(jax.grad(lambda v: jnp.sum(w * run(v)))(v))
  for argument in (0, 1):
    says = "^form 'splash' has first derivatives alone; take form='blocks'"
    with pytest.raises(ValueError, match=says):
      jax.grad(first, argument)(v, v)


# ---------------------------------------------------------------- TPUs


@needs_libtpu
@pytest.mark.slow
def test_splash_is_compiled_for_a_tpu():
  row = compile_kernels.compile_alone('attention', 'Kimi Linear', 'v6e:2x2')
  assert row.startswith('| Kimi Linear |') and '| v6e |' in row
