"""With cu_seqlens every document of a row has a state of its own: each form of
each rule gives what the document gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deltanet_jax as dn
from tests import float64
from tests.ops.test_ops_contract import assert_near

pytestmark = pytest.mark.usefixtures('quick_compile')

T, J, H, K, V = 60, 2, 4, 8, 6
N, CHUNK = 6, 16
# ends inside chunks and at their edges; documents of one token and empty ones
LENGTHS = (
  (17, 0, 1, 16, 26, 0),
  (0, 32, 0, 0, 16, 12),
  (0, 0, 60, 0, 0, 0),
  (1, 1, 15, 31, 1, 11),
)
# function, the float64 rule, the gates besides q, k and v
RULES = {
  'gated_delta_rule': ('delta_rule', ('beta', 'g')),
  'kda': ('kda', ('beta', 'g', 'erase')),
  'gated_linear_attention': ('linear_attention', ('g',)),
  'lightning_attention': ('linear_attention', ('g',)),
  'delta_rule': ('delta_rule', ('beta',)),
}
every_form = pytest.mark.parametrize(
  'form',
  [
    'recurrent',
    'associative',
    'chunked',
    pytest.param('tree', marks=[pytest.mark.slow, pytest.mark.long]),
  ],
)
every_rule = pytest.mark.parametrize(
  'name',
  [
    *list(RULES)[:3],
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(RULES)[3:]),
  ],
)


def draw(name, hostile=False, seed=0):
  """Inputs by name, the states, cotangents of o and of the last states.

  hostile: one key, beta near 1 and at 2, decays from none to e^-60.
  """
  random = np.random.default_rng(seed)
  normal = lambda *s: random.standard_normal(s).astype(np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  shape = {'kda': (1, T, H, K), 'lightning_attention': (H,)}.get(
    name, (1, T, H)
  )
  inputs = {
    'q': unit(normal(1, T, J, K)),
    'k': unit(normal(1, T, J, K)),
    'v': normal(1, T, H, V),
    'beta': 2 / (1 + np.exp(-normal(1, T, H))),
    'g': -np.exp(2 * normal(*shape) - 2),
    'erase': 2 / (1 + np.exp(-normal(1, T, H, K))),
  }
  if hostile:
    inputs['k'] = np.repeat(inputs['k'][:, :1], T, 1)
    inputs['beta'] = random.choice(np.float32([0.9999, 1, 2]), (1, T, H))
    inputs['g'] = random.choice(np.float32([0, -1e-3, -60]), shape)
    inputs['erase'] = np.repeat(inputs['beta'][..., None], K, -1)
  names = ('q', 'k', 'v', *RULES[name][1])
  inputs = {n: np.float32(inputs[n]) for n in names}
  if name == 'kda':
    inputs['beta'] = np.repeat(inputs['beta'][..., None], V, -1)
  return inputs, normal(N, H, K, V), normal(1, T, H, V), normal(N, H, K, V)


def split(inputs):
  gates = dict(inputs)
  return [gates.pop(n) for n in 'qkv'], gates


@functools.partial(jax.jit, static_argnames=('name', 'form'))
def outcome(name, form, inputs, state, d_o, d_state, cu_seqlens):
  """o, the last states and every gradient, by name."""

  def run(inputs, state):
    qkv, gates = split(inputs)
    return getattr(dn, name)(
      *qkv, **gates, state=state, cu_seqlens=cu_seqlens, form=form, chunk=CHUNK
    )

  (o, last), pull = jax.vjp(run, inputs, state)
  d_inputs, d_first = pull((d_o, d_state))
  return {'o': o, 'last': last, 'state': d_first} | d_inputs


def reference(name, inputs, state, d_o, d_state, cu_seqlens):
  """Every document by itself, in float64."""
  rule = getattr(float64, RULES[name][0])
  parts = []
  for n in range(N):
    cut = lambda x, n=n: x[:, cu_seqlens[n] : cu_seqlens[n + 1]]
    own = {m: x if x.ndim == 1 else cut(x) for m, x in inputs.items()}
    (q, k, v), gates = split(own)
    if RULES[name][0] != 'kda':
      gates = {'g': None} | gates
    alone = slice(n, n + 1)
    parts.append(
      rule(
        q=q, k=k, v=v, **gates, state=state[alone],
        d_o=cut(d_o), d_state=d_state[alone],
      )
    )  # fmt: skip
  join = {'last': 0, 'state': 0}
  return {
    m: sum(part[m] for part in parts)
    if m == 'g' and parts[0][m].ndim == 1
    else np.concatenate([part[m] for part in parts], join.get(m, 1))
    for m in parts[0]
    if parts[0][m] is not None
  }


@every_form
@every_rule
def test_each_document_is_as_if_alone(name, form):
  for seed, lengths in enumerate(LENGTHS):
    cu_seqlens = np.cumsum([0, *lengths])
    for hostile in (False, True):
      case = draw(name, hostile, seed)
      got = outcome(name, form, *case, cu_seqlens)
      want = reference(name, *case, cu_seqlens)
      if hostile:  # the decay's gradient: a difference of nearly equal terms
        decay, exact = got.pop('g', None), want.pop('g', None)
        if decay is not None:
          assert np.abs(decay - exact).max() < 5e-3 * np.abs(exact).max()
      assert got['last'].dtype == jnp.float32
      assert_near(got, want)


@every_form
@pytest.mark.parametrize(
  'name',
  [
    'gated_delta_rule',
    pytest.param('kda', marks=[pytest.mark.slow, pytest.mark.long]),
  ],
)
def test_bfloat16_keeps_float32_states(name, form):
  cu_seqlens = np.cumsum([0, *LENGTHS[0]])
  inputs, state, d_o, d_state = draw(name)
  low = {
    n: jnp.asarray(x, jnp.bfloat16) if n in 'qkv' else x
    for n, x in inputs.items()
  }
  d_o = jnp.asarray(d_o, jnp.bfloat16)
  got = outcome(name, form, low, state, d_o, d_state, cu_seqlens)
  assert got['o'].dtype == got['k'].dtype == jnp.bfloat16
  assert got['last'].dtype == got['state'].dtype == jnp.float32
  wide = {n: np.float32(x) for n, x in low.items()}
  want = reference(name, wide, state, np.float32(d_o), d_state, cu_seqlens)
  assert_near(got, want, 2.5e-2)


@every_form
def test_what_is_not_finite_stays_in_its_document(form):
  cu_seqlens = np.cumsum([0, *LENGTHS[3]])
  inputs, state, d_o, d_state = draw('gated_delta_rule')
  run = functools.partial(outcome, 'gated_delta_rule', form)
  want = run(inputs, state, d_o, d_state, cu_seqlens)
  bad_state, bad_k = state.copy(), inputs['k'].copy()
  bad_state[1], bad_k[0, 20] = np.nan, np.nan  # documents 1 and 3
  got = run(inputs | {'k': bad_k}, bad_state, d_o, d_state, cu_seqlens)
  good = [0, 2, 4, 5]
  tokens = np.isin(np.repeat(np.arange(N), LENGTHS[3]), good)
  for name, x in got.items():
    clean = np.index_exp[good] if len(x) == N else np.index_exp[:, tokens]
    np.testing.assert_array_equal(x[clean], want[name][clean], err_msg=name)
  assert np.isnan(got['o'][0, 1]).all() and np.isnan(got['last'][3]).all()


@pytest.mark.parametrize('form', ['associative', 'chunked'])
def test_long_documents_take_several_chunks_at_once(form):
  inputs, state, d_o, d_state = draw('gated_delta_rule')
  long = lambda x: np.tile(x, (1, 10, *[1] * (x.ndim - 2)))  # 600 tokens
  inputs, d_o = {n: long(x) for n, x in inputs.items()}, long(d_o)
  case = inputs, state[:2], d_o, d_state[:2], np.array([0, 331, 600])
  got = outcome('gated_delta_rule', form, *case)
  assert_near(got, outcome('gated_delta_rule', 'recurrent', *case), 5e-5)


def test_tokens_after_the_last_document_are_none_of_them():
  cu_seqlens = np.cumsum([0, 17, 0, 1, 16, 3, 0])
  case = draw('gated_delta_rule')
  got = outcome('gated_delta_rule', 'chunked', *case, cu_seqlens)
  after = {n: x[:, 37:] for n, x in got.items() if len(x) == 1}
  assert not any(np.any(x) for x in after.values())


def test_a_state_is_zero_where_none_is_given():
  inputs, state, *_ = draw('delta_rule')
  (q, k, v), gates = split(inputs)
  cu_seqlens = jnp.array([0, 20, 20, 60])
  o, last = dn.delta_rule(q, k, v, **gates, cu_seqlens=cu_seqlens)
  assert last.shape == (3, H, K, V) and not last[1].any()
  alone = [x[:, 20:] for x in (q, k, v)]
  want, end = dn.delta_rule(*alone, beta=gates['beta'][:, 20:])
  np.testing.assert_allclose(o[:, 20:], want, atol=2e-6)
  np.testing.assert_allclose(last[2:], end, atol=2e-6)


def test_no_tokens_leave_the_states_and_no_documents_none():
  inputs, state, *_ = draw('delta_rule')
  (q, k, v), gates = split({n: x[:, :0] for n, x in inputs.items()})
  empty = jnp.zeros(N + 1, jnp.int32)
  o, last = dn.delta_rule(q, k, v, **gates, state=state, cu_seqlens=empty)
  assert o.shape == v.shape
  np.testing.assert_array_equal(last, state)
  o, last = dn.delta_rule(q, k, v, **gates, cu_seqlens=empty[:1])
  assert last.shape == (0, H, K, V)


@pytest.mark.parametrize(
  'rows, change, message',
  [
    (2, {}, r'cu_seqlens of shape \(7,\) with 2 rows; give \[N\+1\] with one'),
    (1, {'segment_ids': np.zeros((1, T), int)}, 'with 1 rows and segment_ids'),
    (1, {'state': np.zeros((1, H, K, V))}, r'\[N,H,K,V\] = \(6, 4, 8, 6\)'),
    (1, {'cu_seqlens': np.zeros((1, 7), int)}, r'of shape \(1, 7\) with 1'),
    (1, {'chunk': 0}, 'chunk is 0; give 1 token or more'),
    (1, {'chunk': 48}, 'chunk is 48; give 16, 32, 64'),
  ],
)
def test_what_does_not_fit_is_one_line(rows, change, message):
  inputs, *_ = draw('delta_rule')
  (q, k, v), gates = split({n: x.repeat(rows, 0) for n, x in inputs.items()})
  how = {'cu_seqlens': np.zeros(7, int)} | change
  with pytest.raises(ValueError, match=message):
    dn.delta_rule(q, k, v, **gates, **how)
