"""The contract of every form of every rule: equal to the float64 recurrence for
any length, chunk and entry state, with packed documents, causal."""

import functools
import inspect
import itertools
import pkgutil
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import kernels, ops
from deltanet_jax.config.forms import FORMS, OWN
from deltanet_jax.ops import attention, delta_rule, kda, linear_attention
from deltanet_jax.parallel import sequence
from tests import float64

RULES = {
  'linear_attention': linear_attention,
  'delta_rule': delta_rule,
  'kda': kda,
}
# rule, key heads of 4 value heads, arguments after v
VARIANTS = {
  'linear': ('linear_attention', 4, {'g': None}),
  'lightning': ('linear_attention', 4, {'g': 'head'}),
  'scalar_gated': ('linear_attention', 2, {'g': 'token'}),
  'delta': ('delta_rule', 4, {'beta': 'token', 'g': None}),
  'gated_delta': ('delta_rule', 2, {'beta': 'token', 'g': 'token'}),
  'kda': ('kda', 4, {'beta': 'token', 'g': 'channel'}),
  'gdn2': ('kda', 2, {'beta': 'value', 'g': 'channel', 'erase': 'channel'}),
}
B, H, K, V = 2, 4, 8, 16


def draw(variant, T, seed=0):
  """Inputs by name, entry state and cotangents; beta up to 2, g to -10."""
  rule, J, gates = VARIANTS[variant]
  random = np.random.default_rng(seed)
  normal = lambda *s: random.standard_normal(s).astype(np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  inputs = {
    'q': unit(normal(B, T, J, K)),
    'k': unit(normal(B, T, J, K)),
    'v': normal(B, T, H, V),
  }
  shapes = {
    'head': (H,),
    'token': (B, T, H),
    'channel': (B, T, H, K),
    'value': (B, T, H, V),
  }
  for name, kind in gates.items():
    if kind is None:
      inputs[name] = None
    elif name == 'g':
      inputs[name] = -np.exp(2 * normal(*shapes[kind]) - 2)
    else:
      inputs[name] = 2 / (1 + np.exp(-normal(*shapes[kind])))
  state = normal(B, H, K, V)
  return rule, inputs, state, normal(B, T, H, V), normal(B, H, K, V)


def split_arguments(inputs):
  """Positional and keyword arguments of an op."""
  keywords = {'erase': inputs['erase']} if 'erase' in inputs else {}
  order = ('q', 'k', 'v', 'beta', 'g')
  return tuple(inputs[name] for name in order if name in inputs), keywords


@functools.partial(jax.jit, static_argnums=0, static_argnames='sizes')
def outcome(op, inputs, state, d_o, d_state, segment_ids=None, sizes=()):
  """o, last state and every gradient of `op`, by name."""

  def run(inputs, state):
    args, keywords = split_arguments(inputs)
    return op(
      *args, state=state, segment_ids=segment_ids, **keywords, **dict(sizes)
    )

  (o, last), vjp = jax.vjp(run, inputs, state)
  d_inputs, d_first = vjp((d_o, d_state))
  return {'o': o, 'last': last, 'state': d_first} | {
    name: d for name, d in d_inputs.items() if d is not None
  }


def reference(rule, inputs, state, d_o, d_state, segment_ids=None):
  args, keywords = split_arguments(inputs)
  return getattr(float64, rule)(
    *args,
    **keywords,
    state=state,
    d_o=d_o,
    d_state=d_state,
    segment_ids=segment_ids,
  )


def assert_near(got, want, bound=2e-5):
  """Largest error over the largest value, for every name in `want`."""
  assert set(got) == set(want)
  for name, x in want.items():
    chex.assert_shape(got[name], x.shape)
    error = np.abs(np.float64(got[name]) - x).max()
    scale = np.abs(x).max()
    assert error <= bound * scale, f'{name}: {error:.1e} of {scale:.1e}'


# 'tree' takes long to compile: in the fast tests its groups of documents alone
LONG = [pytest.mark.slow, pytest.mark.long]
every_kind = pytest.mark.parametrize(
  'kind', ['plain', pytest.param('tree', marks=LONG)]
)


def forms(rule, kind):
  """The form 'tree', or all others, by name."""
  every = RULES[rule].FORMS.items()
  return {
    form: op for form, op in every if (form == 'tree') == (kind == 'tree')
  }


def sizes(form, chunk=16):
  """The form's keyword arguments as items; the recurrent form has none."""
  return () if form == 'recurrent' else (('chunk', chunk),)


def test_every_module_with_forms_is_tested_here():
  found = {
    module.name
    for module in pkgutil.iter_modules(ops.__path__)
    if hasattr(
      __import__(f'deltanet_jax.ops.{module.name}', fromlist=['x']), 'FORMS'
    )
  }
  assert found == set(RULES) == set(FORMS)
  for name, rule in RULES.items():
    assert tuple(rule.FORMS) == OWN
    assert tuple(kernels.forms(rule)) == FORMS[name]
    for form in kernels.forms(rule).values():
      order = tuple(inspect.signature(form).parameters)
      inputs, gates = rule.DESCRIPTION.inputs, rule.DESCRIPTION.gates
      assert order[: len(inputs)] == tuple(inputs)
      assert {*gates, 'state', 'segment_ids'} <= set(order[len(inputs) :])


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_rules_carry_is_what_it_does_to_a_state(variant, quick_compile):
  rule, inputs, state, *_ = draw(variant, 20)
  description = RULES[rule].DESCRIPTION
  described = description.inputs | description.gates
  sizes = description.check(**inputs, state=state)
  assert sizes == dict(
    zip('BTHJKV', (B, 20, H, VARIANTS[variant][1], K, V), strict=True)
  )

  @jax.jit
  def exit_state(arrays, state=None):
    args, keywords = split_arguments(dict(zip(inputs, arrays, strict=True)))
    return RULES[rule].recurrent(*args, state=state, **keywords)[1]

  letters = [
    None if x is None else described[name].axes_of(x)
    for name, x in inputs.items()
  ]
  scalar = description.carry == 'scalar'
  arrays = list(inputs.values())
  carry, write = sequence._find_map(exit_state, scalar, letters, arrays)
  chex.assert_shape(carry, (B, H, 1, 1) if scalar else (B, H, K, K))
  through = carry * state if scalar else carry @ state
  zero = description.zero_state(sizes)
  assert zero.dtype == jnp.float32
  chex.assert_trees_all_close(
    (through + write, write),
    (exit_state(arrays, state), exit_state(arrays, zero)),
    atol=2e-5,
  )


# the time goes into compiling: every variant at T=100, which has many chunks of
# 16 and a padded one; one variant of each rule at the other sizes
@pytest.mark.parametrize(
  'variant, T, chunk',
  [(variant, 100, 16) for variant in VARIANTS]
  + [
    (variant, T, chunk)
    for variant in ('scalar_gated', 'gated_delta', 'gdn2')
    for T, chunk in ((1, 16), (7, 16), (64, 64), (100, 64))
  ],
)
@every_kind
def test_forms_equal_the_float64_recurrence(
  variant, T, chunk, kind, quick_compile
):
  rule, *case = draw(variant, T)
  want = reference(rule, *case)
  for form, op in forms(rule, kind).items():
    if form == 'recurrent' and (T, chunk) == (100, 64):
      continue  # has no chunks
    assert_near(outcome(op, *case, sizes=sizes(form, chunk)), want)


@pytest.mark.parametrize(
  'variant, kind',
  [
    (variant, 'plain')
    for variant in ('lightning', 'scalar_gated', 'delta', 'gated_delta', 'gdn2')
  ]
  + [(variant, 'tree') for variant in ('lightning', 'gated_delta', 'gdn2')],
)
def test_packed_documents_equal_separate_ones_over_several_groups(
  variant, kind, quick_compile
):
  # 150 tokens are 10 chunks of 16 in 3 groups of 4; documents end inside
  # chunks, at a chunk's edge (48) and at a group's (64), and an id comes back
  rule, *case = draw(variant, 150)
  ends = [[5, 6, 48, 64, 100, 150], [50, 64, 70, 71, 145, 150]]
  ids = np.zeros((B, 150), np.int32)
  for row, marks in enumerate(ends):
    for n, (start, stop) in enumerate(itertools.pairwise([0, *marks])):
      ids[row, start:stop] = 7 * (n % 2)
  want = reference(rule, *case, segment_ids=ids)
  for form, op in forms(rule, kind).items():
    # the tree's are odd, with a chunk left over
    group = {'chunked': (('group', 4),), 'tree': (('group', 3),)}
    got = outcome(op, *case, ids, sizes=sizes(form) + group.get(form, ()))
    # the gradient of Lightning's decay is a sum over all 300 tokens
    assert_near(got, want, 5e-5)


@pytest.mark.parametrize('variant', ['scalar_gated', 'gated_delta', 'gdn2'])
@every_kind
def test_two_halves_equal_the_whole(variant, kind, quick_compile):
  rule, inputs, state, *_ = draw(variant, 40)
  for form, op in forms(rule, kind).items():

    @jax.jit
    def run(inputs, state, op=op, form=form):
      args, keywords = split_arguments(inputs)
      return op(*args, state=state, **keywords, **dict(sizes(form)))

    cut = lambda a, b: {n: x[:, a:b] for n, x in inputs.items()}
    whole, last = run(inputs, state)
    first, middle = run(cut(0, 20), state)
    second, end = run(cut(20, 40), middle)
    chex.assert_trees_all_close(
      (jnp.concatenate([first, second], 1), end), (whole, last), atol=2e-5
    )


@pytest.mark.parametrize('variant', ['scalar_gated', 'gated_delta', 'kda'])
@every_kind
def test_no_output_depends_on_a_later_token(variant, kind, quick_compile):
  rule, inputs, state, d_o, d_state = draw(variant, 40)
  early = np.where(np.arange(40)[:, None, None] < 20, d_o, 0)
  for form, op in forms(rule, kind).items():
    gradient = outcome(op, inputs, state, early, 0 * d_state, sizes=sizes(form))
    for name in inputs:
      assert not np.any(gradient[name][:, 20:]), (form, name)
      assert np.any(gradient[name][:, 19]), (form, name)


@pytest.mark.parametrize('variant', ['scalar_gated', 'gated_delta', 'gdn2'])
@every_kind
def test_bfloat16_inputs_keep_a_float32_state(variant, kind, quick_compile):
  rule, inputs, state, d_o, d_state = draw(variant, 100)
  low = {
    name: jnp.asarray(x, jnp.bfloat16 if name in 'qkv' else jnp.float32)
    for name, x in inputs.items()
  }
  wide = {name: np.float32(x) for name, x in low.items()}
  want = reference(rule, wide, state, d_o, d_state)
  args, keywords = split_arguments(low)
  for form, op in forms(rule, kind).items():
    o, last = jax.jit(functools.partial(op, **dict(sizes(form))))(
      *args, state=state, **keywords
    )
    assert o.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    # operands are rounded to 8 bits, sums and the state are float32
    for got, name in ((o, 'o'), (last, 'last')):
      error = np.abs(np.float64(got) - want[name]).max()
      assert error < 2e-2 * np.abs(want[name]).max(), (form, name, error)


def test_what_does_not_fit_is_one_clear_error():
  _, inputs, state, *_ = draw('gated_delta', 20)
  args, _ = split_arguments(inputs)
  with pytest.raises(ValueError, match=r'chunk is 48; give 16, 32, 64'):
    delta_rule.chunked(*args, state=state, chunk=48)
  with pytest.raises(ValueError, match=r'chunk is 48; give 16, 32, 64'):
    kda.chunked(**draw('gdn2', 20)[1], chunk=48)
  q, k, v, beta, g = args
  for form in ('chunked', 'associative', 'tree'):
    with pytest.raises(ValueError, match='chunk is 0; give'):
      delta_rule.FORMS[form](*args, chunk=0)
    with pytest.raises(ValueError, match='chunk is -1; give'):
      linear_attention.FORMS[form](q, k, v, None, chunk=-1)
  with pytest.raises(ValueError, match='3 value heads are no multiple of 2'):
    delta_rule.recurrent(q, k, v[:, :, :3], beta[:, :, :3], g[:, :, :3])


@pytest.mark.parametrize('form', OWN)
@pytest.mark.parametrize('rule', RULES)
def test_a_misshapen_argument_is_named_with_the_shape_it_needs(rule, form):
  # the last variant has all gates
  variant = [name for name, row in VARIANTS.items() if row[0] == rule][-1]
  _, inputs, state, *_ = draw(variant, 20)
  inputs |= {'state': state, 'segment_ids': np.zeros((B, 20), np.int32)}
  op = RULES[rule].FORMS[form]
  for name in set(inputs) - {'q', 'v'}:
    # a batch of one row would broadcast silently
    wrong = inputs | {name: inputs[name][:1]}
    expected = re.escape(str(inputs[name].shape))
    with pytest.raises(ValueError, match=f'^{name} has shape .*{expected}'):
      op(**wrong)
  with pytest.raises(ValueError, match='^v has shape'):
    op(**inputs | {'v': inputs['v'][:, :1]})


def test_kda_without_an_erase_gate_takes_one_beta_per_head():
  _, inputs, *_ = draw('gdn2', 20)
  del inputs['erase']
  with pytest.raises(ValueError, match=r'^beta without erase .*\(2, 20, 4\)'):
    kda.chunked(**inputs)


def test_the_normalizer_makes_weights_that_sum_to_one():
  _, inputs, _, *_ = draw('linear', 50)
  q, k = (jax.nn.elu(inputs[n]) + 1 for n in 'qk')
  v = inputs['v']
  weights = np.einsum('bthk,bshk->bhts', np.float64(q), np.float64(k))
  weights = np.tril(weights)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bhts,bshv->bthv', weights, v)
  for form in forms('linear_attention', 'plain').values():
    o, state = linear_attention.normalized(form, q, k, v)
    chex.assert_shape(state, (B, H, K, V + 1))
    np.testing.assert_allclose(o, want, atol=2e-6)


@pytest.mark.parametrize('window', [None, 5])
def test_attention_equals_the_plain_softmax(window):
  random = np.random.default_rng(0)
  T, J = 20, 2
  q = random.standard_normal((B, T, H, K)).astype(np.float32)
  k, v = random.standard_normal((2, B, T, J, K)).astype(np.float32)
  segments = np.sort(random.integers(0, 3, (B, T)), axis=1)
  place = np.broadcast_to(np.arange(T), (B, T))
  mask = attention.visible(
    place,
    place,
    window=window,
    query_segments=segments,
    key_segments=segments,
  )
  got = attention.attention(q, k, v, mask, scale=0.3)
  for b in range(B):
    for t in range(T):
      for h in range(H):
        keys = [
          s
          for s in range(t + 1)
          if segments[b, s] == segments[b, t]
          and (window is None or t - s < window)
        ]
        logits = 0.3 * np.float64(k[b, keys, h // 2]) @ q[b, t, h]
        p = np.exp(logits - logits.max())
        want = (p / p.sum()) @ v[b, keys, h // 2]
        np.testing.assert_allclose(got[b, t, h], want, atol=2e-6)
