"""Forms of other backends join a rule's own, and a rule that nobody knows by
name runs wherever rules run."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import kernels
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, MeshConfig, MLPConfig
from deltanet_jax.config.forms import FORMS, OWN
from deltanet_jax.config.mixers import GatedDeltaNetConfig, KDAConfig
from deltanet_jax.lab.bench import bench
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops import delta_rule, kda, linear_attention, scan
from deltanet_jax.ops.description import KEY, QUERY, VALUE, Description, Input
from deltanet_jax.parallel import sequence, sharding
from deltanet_jax.platforms import Choice

B, T, J, H, K, V = 2, 32, 2, 4, 8, 16
KERNEL = """
from deltanet_jax.ops import delta_rule

def twice(*args, **how):
  o, state = delta_rule.chunked(*args, **how)
  return 2 * o, state

FORMS = {'twice': twice}
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  (tmp_path / 'delta_rule_tpu.py').write_text(KERNEL)
  monkeypatch.setattr(kernels, '__path__', [str(tmp_path)])
  name = 'deltanet_jax.kernels.delta_rule_tpu'
  monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setitem(FORMS, 'delta_rule', (*OWN, 'twice'))
  yield
  sys.modules.pop(name, None)


def test_a_run_on_other_devices_is_refused_by_one_line():
  mixer = GatedDeltaNetConfig(2, 2, 8, 8, form='kernel')
  layers = [Layer(mixer, MLPConfig(8))]
  kernels.require_platform(layers, 'tpu')
  with pytest.raises(ConfigError, match="'kernel', .*devices are cpu; give"):
    kernels.require_platform(layers, 'cpu')


@pytest.mark.parametrize(
  'change, on_tpu',
  [
    ({}, 'kernel'),
    ({'K': 256, 'V': 512}, 'kernel'),
    ({'K': 63}, 'chunked'),
    ({'V': 513}, 'chunked'),
    ({'q': 'float32'}, 'chunked'),
    ({'all': 'float16'}, 'chunked'),
    ({'erase': True}, 'chunked'),
  ],
  ids=str,
)
def test_auto_is_the_kernel_on_a_tpu_for_what_it_covers(change, on_tpu):
  sizes = {'K': 64, 'V': 64} | change
  dtype = change.get('all', 'bfloat16')
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, 4, 2, *shape), dtype)
  key, value = (array(dtype, sizes[name]) for name in 'KV')
  inputs = array(change.get('q', dtype), sizes['K']), key, value, array('f4')
  gates = {'erase': key} if 'erase' in change else {}
  rules = [kda] if gates else [delta_rule, kda, linear_attention]
  for rule in rules:
    arrays = (*inputs, key) if rule is kda else inputs
    choose = functools.partial(kernels.choose_form, 'auto', rule, arrays, gates)
    platform = lambda name: types.SimpleNamespace(
      platform=name, device_kind=name
    )
    assert choose(platform('tpu')) == on_tpu
    assert choose(platform('cuda')) == choose(platform('cpu')) == 'chunked'
    assert choose() == 'chunked'  # where the tests run
  assert kernels.choose_form('recurrent', kda, inputs, {}) == 'recurrent'


def test_auto_asks_the_mesh_for_its_devices(monkeypatch):
  tpu = Choice('exchanged', True, True, 'splash')
  seen = []
  monkeypatch.setattr(kernels, 'choose', lambda x: seen.append(x) or tpu)
  q = jax.ShapeDtypeStruct((1, 4, 2, 64), 'bfloat16')
  with jax.set_mesh(sharding.make_mesh(MeshConfig())):
    assert kernels.choose_form('auto', delta_rule, (q, q, q), {}) == 'kernel'
  assert seen[0].platform == 'cpu'


def test_a_kernel_is_one_more_form_of_its_rule_alone(kernel):
  assert tuple(kernels.forms(delta_rule)) == FORMS['delta_rule']
  assert tuple(delta_rule.FORMS) == OWN
  assert 'twice' not in kernels.forms(linear_attention)
  KDAConfig.tiny()
  with pytest.raises(
    ValueError, match="form is 'twice'; give one of auto, rec"
  ):
    KDAConfig(heads=2, key_dim=8, value_dim=8, form='twice')
  settings = bench.BenchSettings('delta_rule', ('twice',), (), (5,))
  assert list(bench.find_functions(settings)) == ['twice']


def test_a_mixer_runs_the_kernel_that_its_configuration_names(
  kernel, quick_compile
):
  x = jax.random.normal(jax.random.key(0), (2, 5, 16))
  ctx = Context(jnp.tile(jnp.arange(5), (2, 1)), None, jnp.float32(0.0))
  run = lambda form: GatedDeltaNetConfig(
    key_heads=2, value_heads=2, key_dim=8, value_dim=8, form=form, norm_eps=1e9
  ).make(d_model=16)
  params = run('chunked').init(jax.random.key(1), x, ctx)
  one, two = (
    run(form).apply(params, x, ctx)[0] for form in ('chunked', 'twice')
  )
  np.testing.assert_allclose(2 * one, two, rtol=1e-4)


def _channels(k, v, q, a, state):
  """A decay for every key channel, that no rule of ours has by itself."""
  repeat = lambda x: jnp.repeat(x, v.shape[1] // q.shape[1], axis=1)
  state = jnp.exp(a)[..., None] * state + repeat(k)[..., None] * v[:, :, None]
  return jnp.einsum('bhk,bhkv->bhv', repeat(q), state), state


def _heads(k, v, q, w, state):
  """A number for every head, not a logarithm."""
  repeat = lambda x: jnp.repeat(x, v.shape[1] // q.shape[1], axis=1)
  state = w[..., None, None] * state + repeat(k)[..., None] * v[:, :, None]
  return jnp.einsum('bhk,bhkv->bhv', repeat(q), state), state


def _rule(step, carry, **gate):
  def recurrent(*args, state=None, segment_ids=None):
    arrays = dict(zip(description.inputs, args, strict=True))
    state = scan.initial_state(description, state, segment_ids, **arrays)
    return scan.token_scan(step, args, state, segment_ids)

  # another order than ours
  description = Description(carry, {'k': KEY, 'v': VALUE, 'q': QUERY} | gate)
  rule = types.ModuleType('deltanet_jax.ops.toy')
  rule.DESCRIPTION, rule.FORMS = description, {'recurrent': recurrent}
  return rule


STRANGERS = {
  'channels': _rule(_channels, 'matrix', a=Input('BTHK', 'decay')),
  'heads': _rule(_heads, 'scalar', w=Input('BTH', 'gate')),
}


@pytest.mark.parametrize('name', STRANGERS)
def test_a_strangers_rule_runs_over_split_time_and_in_the_bench(
  name, monkeypatch, quick_compile
):
  rule = STRANGERS[name]
  monkeypatch.setitem(sys.modules, rule.__name__, rule)
  settings = bench.BenchSettings(
    'toy', ('recurrent',), (), (T,), batch=B, heads=H, grouped=H // J, dim=K
  )
  (form,) = bench.find_functions(settings).values()
  inputs, state, _ = bench.make_inputs(settings.at(T), jax.random.key(0))
  assert [x.shape[2] for x in inputs] == [J, H, J, H]
  ids = np.repeat([[0, 1, 0, 2]], 8, 1) * np.array([[0], [1]])

  def pull(run, *inputs):
    o, pull = jax.vjp(run, *inputs)
    return o, pull(jnp.sin(o))

  whole = lambda *inputs: form(*inputs, state=state, segment_ids=ids)[0]
  split = lambda *inputs: sequence.run_rule(rule, form, inputs, ids, {})
  want = jax.jit(functools.partial(pull, whole))(*inputs)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(seq=4, tensor=2))):
    got = jax.jit(functools.partial(pull, split))(*inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
  )
