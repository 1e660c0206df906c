"""The names of `import deltanet_jax as dn`, each used as in a user's own
program."""

import ast
import doctest
import functools
import importlib.util
import inspect
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import deltanet_jax as dn
from deltanet_jax import functional

pytestmark = pytest.mark.usefixtures('quick_compile')

SOURCE = pathlib.Path(dn.__file__).read_text()
FORMS = ('recurrent', 'associative', 'chunked')
every_form = pytest.mark.parametrize(
  'form', [*FORMS, pytest.param('tree', marks=pytest.mark.slow)]
)
B, T, H, K, V, D = 2, 20, 2, 4, 6, 8
CONFIGS = {
  'gated_deltanet': dn.GatedDeltaNetConfig.tiny(),
  'attention': dn.AttentionConfig.tiny(),
  'mla': dn.MLAConfig.tiny(),
}


def test_the_import_brings_no_jax_and_a_name_brings_itself():
  script = """
import sys
import deltanet_jax as dn
assert 'jax' not in sys.modules and 'numpy' not in sys.modules
assert 'kda' in dir(dn) and 'fla' in dir(dn)
dn.config.load('qwen3:0p6b'), dn.GatedDeltaNetConfig, dn.Sampling()
assert 'jax' not in sys.modules
dn.kda
assert 'jax' in sys.modules and 'flax' not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-c', script], text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr


def _typed_names():
  """The names that editors and type checkers see."""
  block = next(x for x in ast.parse(SOURCE).body if isinstance(x, ast.If))
  return [alias.asname for node in block.body for alias in node.names]


def test_editors_are_told_of_the_names_that_there_are():
  names = _typed_names()
  assert len(names) == len(set(names)) > 20
  assert set(names) == {*dn._MODULES, 'config', 'fla'} <= set(dir(dn))
  for name in names:
    assert inspect.getdoc(getattr(dn, name)), name


def test_another_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="has no attribute 'gdn'"):
    dn.gdn  # noqa: B018
  assert not hasattr(dn, 'delta')
  # and a module is found all the same
  from deltanet_jax import progress

  assert inspect.ismodule(progress)


def draw(seed=0, **gates):
  random = np.random.default_rng(seed)
  normal = lambda *s: random.standard_normal(s).astype(np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  qkv = unit(normal(B, T, H, K)), unit(normal(B, T, H, K)), normal(B, T, H, V)
  return qkv, {
    'beta': 1 / (1 + np.exp(-normal(B, T, H))),
    'g': -np.exp(normal(B, T, H) - 1),
  }


def test_the_examples_are_true():
  found = doctest.testmod(functional)
  assert found.attempted > 30 and not found.failed


def test_every_function_has_an_example_and_says_its_shapes():
  for name in _typed_names():
    if dn._MODULES.get(name) == 'functional':
      text = inspect.getdoc(getattr(dn, name))
      assert '>>> ' in text and '[B,T,' in text and 'arXiv:' in text, name


def test_a_function_is_compiled_once_for_its_shapes():
  qkv, gates = draw()
  run = functools.partial(dn.gated_delta_rule, chunk=32)
  run(*qkv, **gates)
  count = functional._compiled._cache_size()
  qkv, gates = draw(seed=1)
  run(*qkv, **gates)
  assert functional._compiled._cache_size() == count
  run(*(x[:, :9] for x in qkv), **{n: x[:, :9] for n, x in gates.items()})
  assert functional._compiled._cache_size() == count + 1


@pytest.mark.parametrize(
  'name', [n for n, m in dn._MODULES.items() if m == 'functional']
)
def test_gates_go_by_name_and_all_forms_take_the_same(name):
  parameters = inspect.signature(getattr(dn, name)).parameters
  by_name = [n for n, x in parameters.items() if x.kind is x.KEYWORD_ONLY]
  assert list(parameters)[:3] == ['q', 'k', 'v']
  assert [*'qkv', *by_name] == list(parameters)
  if name != 'attention':
    how = ['state', 'segment_ids', 'cu_seqlens', 'form', 'chunk']
    assert by_name[-5:] == how


@every_form
def test_forms_agree_from_a_state_over_documents(form):
  qkv, gates = draw()
  state = np.random.default_rng(3).standard_normal((B, H, K, V))
  ids = np.repeat([[0, 1, 0]], [7, 4, 9], 1).repeat(B, 0)
  how = {'state': state, 'segment_ids': ids, 'chunk': 16}
  got = dn.gated_delta_rule(*qkv, **gates, **how, form=form)
  want = dn.gated_delta_rule(*qkv, **gates, **how, form='recurrent')
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_unknown_form_and_a_wrong_gate_are_one_line():
  qkv, gates = draw()
  with pytest.raises(
    ValueError, match="form is 'fast'; give one of auto, recurrent"
  ):
    dn.gated_delta_rule(*qkv, **gates, form='fast')
  with pytest.raises(
    ValueError, match=r'^g has shape \(2, 20, 2\); expected \['
  ):
    dn.lightning_attention(*qkv, g=gates['g'])
  with pytest.raises(
    ValueError, match=r'^g has shape \(2,\); expected \[B,T,H'
  ):
    dn.gated_linear_attention(*qkv, g=gates['g'][0, 0])
  with pytest.raises(TypeError, match='positional'):
    dn.gated_delta_rule(*qkv, gates['g'], gates['beta'])


@pytest.mark.parametrize('ends', [[0, 9, 7, 20], [0, 9, 21], [1, 20]])
@pytest.mark.parametrize('array', [np.array, jnp.array])
def test_documents_that_are_none_are_one_line(ends, array):
  qkv, gates = (jax.tree.map(lambda x: x[:1], tree) for tree in draw())
  with pytest.raises(ValueError, match=r'^cu_seqlens is \[.*ascending to 20'):
    dn.gated_delta_rule(*qkv, **gates, cu_seqlens=array(ends))
  _, states = dn.gated_delta_rule(*qkv, **gates, cu_seqlens=[0, 9, 9])
  assert states.shape == (2, H, K, V)


CU = {'cu_seqlens': np.array([0, 7, 7, 20])}


def _loss(form, how, q, k, v, gates):
  o, last = dn.gated_delta_rule(q, k, v, **gates, form=form, chunk=16, **how)
  return (o * o).sum() + (last * last).sum()


@pytest.mark.parametrize('how', [{}, CU], ids=['rows', 'documents'])
@every_form
def test_second_derivatives(form, how):
  qkv, gates = draw()
  cut = lambda x: x[:1]
  args = jax.tree.map(cut, (*qkv, gates))
  along = jax.tree.map(jnp.cos, args)

  @jax.jit
  def second(args):
    slope = lambda args: sum(
      jnp.vdot(d, a)
      for d, a in zip(
        jax.tree.leaves(jax.grad(loss)(args)), jax.tree.leaves(along),
        strict=True,
      )
    )  # fmt: skip
    loss = lambda args: _loss(form, how, *args)
    return slope(args), jax.grad(slope)(args)

  slope, got = second(args)
  # along the same direction: the slope's difference
  move = lambda t: jax.tree.map(lambda x, a: x + t * a, args, along)
  change = (second(move(1e-2))[0] - second(move(-1e-2))[0]) / 2e-2
  exact = sum(
    float(jnp.vdot(d, a))
    for d, a in zip(jax.tree.leaves(got), jax.tree.leaves(along), strict=True)
  )
  np.testing.assert_allclose(exact, change, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['kda', 'linear', 'attention'])
def test_second_derivatives_of_the_others(name):
  (q, k, v), gates = jax.tree.map(lambda x: x[:1], draw())
  beta, g = gates['beta'], gates['g']
  wide = np.repeat(g[..., None], K, -1)

  def loss(x):
    more = 1 + x
    o = {
      'kda': lambda: dn.kda(q, k, more * v, beta=more * beta, g=more * wide)[0],
      'linear': lambda: dn.gated_linear_attention(q, more * k, v, g=more * g)[
        0
      ],
      'attention': lambda: dn.attention(more * q, more * k, more * v),
    }[name]()
    return (o * o).sum()

  slope = jax.jit(jax.grad(loss))
  got = jax.jit(jax.grad(jax.grad(loss)))(0.0)
  want = (slope(1e-2) - slope(-1e-2)) / 2e-2
  np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize('form', ['recurrent', 'associative'])
def test_forward_mode_equals_reverse_mode(form):
  qkv, gates = draw()
  along = jax.tree.map(jnp.cos, (*qkv, gates))
  f = lambda args: _loss(form, {}, *args)
  _, forward = jax.jvp(f, ((*qkv, gates),), (along,))
  grads = jax.grad(f)((*qkv, gates))
  pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True)
  np.testing.assert_allclose(
    forward, sum(jnp.vdot(a, b) for a, b in pairs), rtol=1e-4
  )


def test_where_forward_mode_is_not_there_jax_says_so():
  qkv, gates = draw()
  args = (*qkv, gates)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(lambda args: _loss('chunked', {}, *args), (args,), (args,))


@every_form
def test_it_is_right_inside_other_transformations(form):
  qkv, gates = draw()
  run = lambda q, k, v, gates: dn.gated_delta_rule(
    q, k, v, **gates, form=form, chunk=16
  )
  want = run(*qkv, gates)
  row = lambda *args: jax.tree.map(
    lambda x: x[0], run(*jax.tree.map(lambda x: x[None], args))
  )
  spec = PartitionSpec('x')
  with jax.set_mesh(Mesh(jax.devices()[:B], 'x')):
    split = jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)
    others = [
      jax.jit(jax.vmap(row))(*qkv, gates),
      jax.jit(jax.checkpoint(run))(*qkv, gates),
      jax.jit(split)(*qkv, gates),
    ]
  for got in others:
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('how', [{}, CU], ids=['rows', 'documents'])
@every_form
def test_no_rank_is_promoted(form, how):
  qkv, gates = draw()
  args = jax.tree.map(lambda x: x[:1], (*qkv, gates))
  with jax.numpy_rank_promotion('raise'):
    jax.eval_shape(jax.grad(lambda args: _loss(form, how, *args)), args)
    jax.eval_shape(lambda *qkv: dn.attention(*qkv), *qkv)
    slope = np.zeros(H, np.float32)
    linear = lambda *qkv: dn.lightning_attention(*qkv, g=slope, form=form)
    jax.eval_shape(linear, *qkv)


@pytest.mark.parametrize('window', [None, 3])
def test_attention_is_the_softmax_over_keys_that_a_token_sees(window):
  qkv, _ = draw()
  q, k, v = (np.float64(x) for x in qkv)
  ids = np.repeat([[0, 1, 0]], [7, 4, 9], 1).repeat(B, 0)
  run = np.cumsum(np.diff(ids, axis=1, prepend=0) != 0, 1)
  distance = np.arange(T)[:, None] - np.arange(T)
  seen = (distance >= 0) & (distance < (window or T))
  seen = seen & (run[:, :, None] == run[:, None])
  scores = np.einsum('bthk,bshk->bhts', q, k) * K**-0.5
  weight = np.where(seen[:, None], np.exp(scores), 0)
  weight /= weight.sum(-1, keepdims=True)
  got = dn.attention(*qkv, window=window, segment_ids=ids)
  want = np.einsum('bhts,bshv->bthv', weight, v)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_mixer_alone_and_in_a_users_model(name):
  cfg = CONFIGS[name]
  x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)))

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      y, _ = cfg.make(d_model=D, name='mix')(x)
      return x + y

  params = jax.jit(Model().init)(jax.random.key(0), x)
  y = jax.jit(Model().apply)(params, x)
  alone = jax.jit(cfg.make(d_model=D).apply)
  own = {'params': params['params']['mix']}
  z, aux = alone(own, x)
  assert aux.cache is None
  np.testing.assert_allclose(x + z, y, atol=1e-6)
  # in two parts, from a cache: positions go on
  cache = cfg.init_cache(B, T, jnp.float32)
  first, aux = alone(own, x[:, :10], cache=cache)
  second, _ = alone(own, x[:, 10:], cache=aux.cache)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), z, atol=1e-5)
  # and begin again in a second document
  ids = jnp.repeat(jnp.array([[3, 4]]), 10, 1).repeat(B, 0)
  packed, _ = alone(own, x, dn.Context(segment_ids=ids))
  index = jnp.broadcast_to(jnp.arange(T) % 10, (B, T))
  given, _ = alone(own, x, dn.Context(index, ids))
  np.testing.assert_array_equal(packed, given)
  np.testing.assert_allclose(packed[:, :10], first, atol=1e-5)


def test_what_does_not_fit_a_mixer_or_a_model_is_one_line():
  mixer = CONFIGS['gated_deltanet']
  for shape in ((1, 8, D + 1), (8, D)):
    with pytest.raises(ValueError, match=rf'^x has shape .* with D = {D}, the'):
      mixer.make(d_model=D).init(jax.random.key(0), jnp.zeros(shape))
  with pytest.raises(ValueError, match=r'GatedDeltaNetConfig; give Layer\(mix'):
    dn.ModelConfig(8, D, period=(mixer,), repeats=1)


def test_a_mixer_in_flax_nnx():
  from flax import nnx

  x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)))

  class Model(nnx.Module):
    def __init__(self, rngs):
      mixer = CONFIGS['gated_deltanet'].make(d_model=D)
      self.mix = nnx.bridge.ToNNX(mixer, rngs=rngs)

    def __call__(self, x):
      y, _ = self.mix(x)
      return x + y

  # the axis names of a weight are this library's, not those of a mesh
  with nnx.use_eager_sharding(False):
    model = nnx.bridge.lazy_init(Model(nnx.Rngs(0)), x)
  loss = lambda model: (model(x) ** 2).mean()
  value, grads = nnx.value_and_grad(loss)(model)
  assert np.isfinite(value)
  assert all(np.any(d) for d in jax.tree.leaves(grads))


@pytest.mark.skipif(
  importlib.util.find_spec('equinox') is None, reason='needs equinox'
)
def test_a_mixer_in_equinox():
  import equinox as eqx

  mixer = CONFIGS['gated_deltanet'].make(d_model=D)

  class Model(eqx.Module):
    params: dict

    def __init__(self, key):
      self.params = nn.unbox(mixer.init(key, jnp.zeros((1, 1, D))))

    def __call__(self, x):
      y, _ = mixer.apply(self.params, x)
      return x + y

  x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)))
  grads = eqx.filter_grad(lambda model: (model(x) ** 2).mean())(
    Model(jax.random.key(0))
  )
  assert all(np.any(d) for d in jax.tree.leaves(grads))


def test_a_model_is_made_decoded_and_generated_from():
  layer = dn.Layer(CONFIGS['gated_deltanet'], dn.MLPConfig(8))
  model = dn.HybridLM(dn.ModelConfig(16, 16, period=(layer,), repeats=2))
  tokens = jnp.arange(12).reshape(2, 6)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
  apply = jax.jit(model.apply)
  whole, none = apply(params, tokens)
  assert none is None
  cache = model.init_cache(2, 8)
  _, cache = apply(params, tokens[:, :5], cache=cache)
  last, _ = apply(params, tokens[:, 5:], cache=cache)
  np.testing.assert_allclose(last, whole[:, 5:], atol=1e-5)
  ids = dn.generate(
    params['params'],
    model.cfg,
    [1, 2, 3],
    max_tokens=4,
    sampling=dn.Sampling(temperature=0),
    key=jax.random.key(0),
    dtype=np.float32,
    vocab=16,
  )
  assert len(list(ids)) == 4
