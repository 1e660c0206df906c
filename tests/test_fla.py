"""The functions with flash-linear-attention's names: argument order, defaults,
and equality with that library's naive functions."""

import ast
import importlib.util
import inspect
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import fla
from tests import float64

pytestmark = pytest.mark.usefixtures('quick_compile')

B, T, H, HV, K, V = 2, 20, 2, 4, 8, 6
FORMS = ('chunk', 'fused_recurrent')
every_form = pytest.mark.parametrize('form', FORMS)


def draw(heads=H):
  """Arguments by that library's names; q and k are not normalized."""
  random = np.random.default_rng(0)
  normal = lambda *s: random.standard_normal(s).astype(np.float32)
  return {
    'q': normal(B, T, heads, K),
    'k': normal(B, T, heads, K),
    'v': normal(B, T, HV, V),
    'g': -np.exp(normal(B, T, HV) - 1),
    'beta': 1 / (1 + np.exp(-normal(B, T, HV))),
    'initial_state': normal(B, HV, K, V),
    'wide': -np.exp(normal(B, T, HV, K) - 1),
  }


def unit(x):
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def near(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def reference(rule, a, scale, **gates):
  nothing = np.zeros_like(a['v']), np.zeros_like(a['initial_state'])
  got = getattr(float64, rule)(
    unit(a['q']) * scale, unit(a['k']), a['v'], **gates,
    state=a['initial_state'], d_o=nothing[0], d_state=nothing[1],
  )  # fmt: skip
  return got['o'], got['last']


@every_form
def test_values_and_states_are_those_of_the_rules(form):
  a = draw()
  call = lambda name, *args, **how: getattr(fla, f'{form}_{name}')(
    a['q'], a['k'], a['v'], *args, initial_state=a['initial_state'],
    output_final_state=True, use_qk_l2norm_in_kernel=True, **how,
  )  # fmt: skip
  beta, g, wide = a['beta'], a['g'], a['wide']
  # by position, where all versions agree on it
  gates = (g, beta) if form == 'chunk' else (g, None, None, beta)
  want = reference('delta_rule', a, K**-0.5, beta=beta, g=g)
  near(call('gated_delta_rule', *gates), want)
  near(
    call('delta_rule', beta, scale=0.3),
    reference('delta_rule', a, 0.3, beta=beta, g=None),
  )
  near(call('kda', wide, beta), reference('kda', a, K**-0.5, beta=beta, g=wide))


@every_form
def test_linear_attention_takes_either_decay_or_none(form):
  a = draw()
  call = getattr(fla, f'{form}_simple_gla')
  q, k, v = unit(a['q']), unit(a['k']), a['v']
  how = {'initial_state': a['initial_state'], 'output_final_state': True}
  slope = a['g'][0, 0]
  for given, g in (
    ({'g': a['g']}, a['g']),
    ({'g_gamma': slope}, slope),
    ({}, None),
  ):
    want = reference('linear_attention', a, K**-0.5, g=g)
    near(call(q, k, v, **given, **how), want)
  with pytest.raises(ValueError, match='g and g_gamma are given; give one'):
    call(q, k, v, a['g'], slope)


@every_form
def test_rows_of_documents_and_no_final_state(form):
  a = draw()
  call = getattr(fla, f'{form}_gated_delta_rule')
  flat = lambda x: x.reshape(1, B * T, *x.shape[2:])
  how = {'beta': a['beta'], 'g': a['g']}
  o, none = call(a['q'], a['k'], a['v'], **how)
  assert none is None
  packed, last = call(
    flat(a['q']), flat(a['k']), flat(a['v']),
    **{n: flat(x) for n, x in how.items()},
    output_final_state=True, cu_seqlens=jnp.arange(B + 1) * T,
  )  # fmt: skip
  near((packed,), (flat(o),))
  assert last.shape == (B, HV, K, V) and last.dtype == jnp.float32


def test_bfloat16_stays_what_it_is():
  a = {n: jnp.asarray(x, jnp.bfloat16) for n, x in draw().items()}
  o, last = fla.chunk_delta_rule(
    a['q'], a['k'], a['v'], a['beta'], output_final_state=True,
    use_qk_l2norm_in_kernel=True,
  )  # fmt: skip
  assert o.dtype == jnp.bfloat16 and last.dtype == jnp.float32


def test_gates_left_out_are_one_and_none():
  a = draw()
  run = fla.fused_recurrent_gated_delta_rule
  how = {'use_qk_l2norm_in_kernel': True, 'output_final_state': True}
  one = np.ones_like(a['beta'])
  want = run(a['q'], a['k'], a['v'], g=0 * one, beta=one, **how)
  near(run(a['q'], a['k'], a['v'], **how), want)
  near(fla.fused_recurrent_delta_rule(a['q'], a['k'], a['v'], **how), want)
  with pytest.raises(ValueError, match='call fused_recurrent_kda'):
    run(a['q'], a['k'], a['v'], a['g'], a['beta'])


def _source(path):
  """A file of the library, which needs Triton to be imported as a whole."""
  pytest.importorskip('torch')
  pytest.importorskip('einops')
  spec = importlib.util.find_spec('fla')
  if spec is None:
    pytest.skip('needs fla-core')
  return pathlib.Path(spec.submodule_search_locations[0]) / 'ops' / path


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(
  'rule, naive, gates',
  [
    ('gated_delta_rule', 'naive_recurrent_gated_delta_rule', ('g', 'beta')),
    ('kda', 'naive_recurrent_kda', ('g', 'beta')),
    ('simple_gla', 'naive_recurrent_simple_gla', ('g',)),
    ('delta_rule', 'delta_rule_recurrence', ('beta',)),
  ],
)
def test_the_librarys_naive_function_computes_the_same(rule, naive, gates):
  path = _source(f'{rule}/naive.py')
  import torch

  spec = importlib.util.spec_from_file_location(f'naive_{rule}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  # as many keys as values, which those functions ask for
  a = draw(HV)
  a['k'] = unit(a['k'])
  a['g'] = a['wide'] if rule == 'kda' else a['g']
  given = {n: a[n] for n in ('q', 'k', 'v', *gates)}
  # one of them has the heads before time
  turn = lambda x: x.swapaxes(1, 2) if rule == 'delta_rule' else x
  o, last = getattr(module, naive)(
    **{n: torch.from_numpy(turn(x)) for n, x in given.items()},
    initial_state=torch.from_numpy(a['initial_state']),
    output_final_state=True,
  )
  how = {'initial_state': a['initial_state'], 'output_final_state': True}
  for form in FORMS:
    ours = getattr(fla, f'{form}_{rule}')
    near(ours(**given, **how), (turn(o.numpy()), last.numpy()))


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(
  'rule', ['gated_delta_rule', 'delta_rule', 'kda', 'simple_gla']
)
@every_form
def test_arguments_stand_where_they_stand_there(rule, form):
  path = _source(f'{rule}/{form}.py')
  name = f'{form}_{rule}'
  (theirs,) = (
    node.args
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name == name
  )
  theirs = [x.arg for x in (*theirs.args, *theirs.kwonlyargs)]
  ours = inspect.signature(getattr(fla, name)).parameters
  assert set(ours) <= set(theirs)
  placed = [n for n, x in ours.items() if x.kind is not x.KEYWORD_ONLY]
  assert placed == theirs[: len(placed)]
