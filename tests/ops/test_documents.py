"""Documents in a row, and extreme inputs of the rules: non-finite values, g =
-inf, empty arrays, other JAX defaults."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config import mixers
from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.forms import OWN
from deltanet_jax.mixers.base import Context
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.ops import attention
from deltanet_jax.ops.documents import number_segments
from tests.ops.test_ops_contract import (
  LONG,
  RULES,
  B,
  H,
  V,
  assert_near,
  draw,
  every_kind,
  forms,
  outcome,
  reference,
  sizes,
  split_arguments,
)

pytestmark = pytest.mark.usefixtures('quick_compile')
every_form = pytest.mark.parametrize(
  'form',
  ['recurrent', 'associative', 'chunked', pytest.param('tree', marks=LONG)],
)
every_gate = pytest.mark.parametrize(
  'variant', ['scalar_gated', 'gated_delta', 'gdn2']
)
CONFIGS = [
  pytest.param(cls.tiny(), id=name)
  for name, cls in inspect.getmembers(mixers, inspect.isclass)
  if hasattr(cls, 'tiny')
]


def test_runs_are_counted_and_not_told_by_their_ids():
  ids = jnp.asarray([[1, 1, 2, 1, 1], [-7, 2**31 - 1, 0, 0, -7]], jnp.int32)
  np.testing.assert_array_equal(
    number_segments(ids), [[0, 0, 1, 2, 2], [0, 1, 2, 2, 3]]
  )
  chex.assert_shape(number_segments(ids[:, :0]), (2, 0))


# documents of 17, 9 and 14 tokens: their edges lie inside chunks of 16; and one
# that ends at a chunk's edge
ENDS = np.array([[0, 17, 26, 40], [0, 10, 32, 40]])
T = 40
IDS = np.stack([np.repeat([5, 6, 5], np.diff(e)) for e in ENDS])
AT = np.array([20, 15])  # the bad token: in the middle document


def _inside(n):
  """[B,T] bool: tokens of document n."""
  t = np.arange(T)
  return np.stack([(t >= e[n]) & (t < e[n + 1]) for e in ENDS])


@every_form
@every_gate
def test_what_is_not_finite_stays_in_its_document(variant, form):
  rule, inputs, state, d_o, d_state = draw(variant, T)
  run = functools.partial(outcome, RULES[rule].FORMS[form], sizes=sizes(form))
  want = run(inputs, state, d_o, d_state, IDS)
  rows, others = np.arange(B), ~_inside(1)
  seen = _inside(1) & (np.arange(T) >= AT[:, None])

  def check(got):
    for name, x in got.items():
      clean = others if x.shape[:2] == (B, T) else ...
      np.testing.assert_array_equal(x[clean], want[name][clean], err_msg=name)

  for name in inputs:
    for value in (np.nan, np.inf):
      if name == 'q' and form == 'recurrent' and value == np.inf:
        continue
      bad = {n: np.array(x) for n, x in inputs.items()}
      bad[name][rows, AT] = value
      got = run(bad, state, d_o, d_state, IDS)
      check(got)
      after = seen if name != 'q' else np.arange(T) == AT[:, None]
      assert not np.isfinite(got['o'][after]).any((-1, -2)).any(), name
  # a non-finite gradient of o, and of the last state
  bad = np.array(d_o)
  bad[rows, AT] = np.nan
  got = run(inputs, state, bad, d_state, IDS)
  check(got)
  before = _inside(1) & (np.arange(T) <= AT[:, None])
  assert not np.isfinite(got['v'][before]).all((-1, -2)).any()
  got = run(inputs, state, d_o, np.nan * d_state, IDS)
  others = ~_inside(2)
  for name in inputs:
    np.testing.assert_array_equal(got[name][others], want[name][others])
  assert not np.isfinite(got['v'][_inside(2)]).all((-1, -2)).any()


@every_form
@every_gate
def test_an_entry_state_that_is_not_finite_stays_in_the_first_document(
  variant, form
):
  rule, inputs, state, d_o, d_state = draw(variant, T)
  run = functools.partial(outcome, RULES[rule].FORMS[form], sizes=sizes(form))
  want = run(inputs, state, d_o, d_state, IDS)
  got = run(inputs, np.nan * state, d_o, d_state, IDS)
  for name in ('o', *inputs):
    later = ~_inside(0)
    np.testing.assert_array_equal(got[name][later], want[name][later])
  assert not np.isfinite(got['o'][_inside(0)]).any()
  np.testing.assert_array_equal(got['last'], want['last'])


@pytest.mark.parametrize(
  'variant',
  [
    pytest.param('scalar_gated', marks=pytest.mark.slow),
    'gated_delta',
    pytest.param('kda', marks=pytest.mark.slow),
    pytest.param('lightning', marks=pytest.mark.slow),
  ],
)
@every_kind
def test_a_gate_of_minus_infinity_is_a_reset(variant, kind):
  rule, inputs, *rest = draw(variant, 40)
  reset = np.random.default_rng(1).random(inputs['g'].shape) < 0.05
  if variant == 'lightning':  # one decay per head
    reset = np.arange(H) == 1
  inputs['g'] = np.where(reset, -np.inf, inputs['g'])
  want = reference(rule, inputs, *rest)
  for form, op in forms(rule, kind).items():
    assert_near(outcome(op, inputs, *rest, sizes=sizes(form)), want)


@every_form
@every_gate
@pytest.mark.parametrize('rows, tokens', [(0, 20), (2, 0), (0, 0)])
def test_no_rows_or_no_tokens_give_none_and_keep_the_state(
  variant, form, rows, tokens
):
  rule, inputs, state, d_o, d_state = draw(variant, 20)
  cut = lambda x: x[:rows, :tokens]
  inputs = {name: cut(x) for name, x in inputs.items()}
  for ids in (None, np.zeros((rows, tokens), np.int32)):
    got = outcome(
      RULES[rule].FORMS[form],
      inputs,
      state[:rows],
      cut(d_o),
      d_state[:rows],
      ids,
      sizes=sizes(form),
    )
    chex.assert_shape(got['o'], (rows, tokens, H, V))
    if not tokens:
      np.testing.assert_array_equal(got['last'], state[:rows])
      np.testing.assert_array_equal(got['state'], d_state[:rows])


@pytest.mark.parametrize('rows, tokens', [(0, 5), (2, 0)])
def test_attention_to_nothing_is_nothing(rows, tokens):
  q, k, v = (jnp.zeros((rows, tokens, n, 8)) for n in (4, 2, 2))
  at = attention.Place(jnp.arange(tokens), None)
  o = attention.attend(q, k, v, at, at, scale=1.0, ahead=0)
  chex.assert_shape(o, (rows, tokens, 4, 8))


@pytest.mark.parametrize('rows, tokens', [(0, 8), (2, 0)])
@pytest.mark.parametrize('mixer', CONFIGS)
def test_a_model_takes_no_rows_and_no_tokens(mixer, rows, tokens):
  layer = Layer(mixer, MLPConfig(8))
  model = HybridLM(ModelConfig(16, 16, period=(layer,), repeats=1))
  params = jax.eval_shape(
    lambda: nn.unbox(
      model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )
  )
  ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  logits, _ = jax.eval_shape(model.apply, params, ids)
  chex.assert_shape(logits, (rows, tokens, 16))
  logits, _ = jax.eval_shape(
    lambda p, t, s: model.apply(p, t, segment_ids=s), params, ids, ids
  )
  chex.assert_shape(logits, (rows, tokens, 16))
  cache = jax.eval_shape(lambda: init_cache(model.cfg, rows, 8, jnp.float32))
  logits, after = jax.eval_shape(
    lambda p, t, c: model.apply(p, t, cache=c), params, ids, cache
  )
  chex.assert_shape(logits, (rows, tokens, 16))
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(
    lambda x: x.shape, cache
  )


@pytest.mark.parametrize(
  'variant, dtype',
  [
    ('gated_delta', 'float32'),
    pytest.param('lightning', 'float32', marks=pytest.mark.slow),
    pytest.param('gdn2', 'float32', marks=pytest.mark.slow),
    pytest.param('gated_delta', 'bfloat16', marks=pytest.mark.slow),
    pytest.param('gdn2', 'bfloat16', marks=LONG),
    pytest.param('gated_delta', 'float64', marks=LONG),
    pytest.param('gdn2', 'float64', marks=pytest.mark.slow),
  ],
)
@every_kind
def test_forms_work_where_64_bits_are_the_default(variant, dtype, kind):
  with jax.enable_x64(True):
    rule, inputs, state, d_o, d_state = draw(variant, 20)
    inputs = {
      n: jnp.asarray(x, dtype if n in 'qkv' else jnp.float32)
      for n, x in inputs.items()
    }
    want = reference(
      rule,
      {n: np.float64(x) for n, x in inputs.items()},
      state,
      d_o,
      d_state,
    )
    for form, op in forms(rule, kind).items():
      cotangent = jnp.asarray(d_o, dtype)
      got = outcome(op, inputs, state, cotangent, d_state, sizes=sizes(form))
      assert got['o'].dtype == dtype and got['last'].dtype == jnp.float32
      bound = 2e-2 if dtype == 'bfloat16' else 2e-5
      for name, x in got.items():
        error = np.abs(np.float64(x) - want[name]).max()
        assert error <= bound * np.abs(want[name]).max(), (form, name)


@pytest.mark.parametrize('mixer', CONFIGS)
def test_mixers_rely_on_no_implicit_promotion_of_ranks(mixer):
  x = np.random.default_rng(0).standard_normal((2, 20, 16), np.float32)
  positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
  ids = jnp.asarray(np.repeat([[3, 4]], 10, axis=1).repeat(2, 0))
  module = mixer.make(d_model=16)
  with jax.numpy_rank_promotion('raise'):
    ctx = Context(positions, ids, jnp.float32(0.5))

    def loss(params, x):
      return module.apply(params, x, ctx)[0].sum()

    params = jax.eval_shape(
      lambda: nn.unbox(module.init(jax.random.key(0), x, ctx))
    )
    jax.eval_shape(jax.grad(loss, (0, 1)), params, x)
    cache = mixer.init_cache(2, 24, jnp.float32)
    ctx = ctx.replace(segment_ids=None)
    for n in (20, 1):
      part = ctx.replace(positions=positions[:, :n])
      jax.eval_shape(
        lambda p, part=part, n=n: module.apply(p, x[:, :n], part, cache),
        params,
      )


def test_a_model_relies_on_no_implicit_promotion_of_ranks():
  ffn = MoEConfig(4, 2, 8, bias=True, shared=8, shared_gate=True)
  layer = Layer(mixers.GatedDeltaNetConfig.tiny(), ffn)
  mtp = Layer(mixers.AttentionConfig.tiny(), MLPConfig(8))
  model = HybridLM(ModelConfig(16, 16, period=(layer,), repeats=2, mtp=mtp))
  ids = jnp.zeros((2, 20), jnp.int32)
  with jax.numpy_rank_promotion('raise'):
    params = jax.eval_shape(
      lambda: nn.unbox(model.init(jax.random.key(0), ids))
    )
    loss = lambda p: model.apply(p, ids, segment_ids=ids)[0].sum()
    jax.eval_shape(jax.grad(loss), params)


@pytest.mark.parametrize('form', OWN)
@pytest.mark.parametrize('variant', ['lightning', 'gated_delta', 'gdn2'])
def test_rules_rely_on_no_implicit_promotion_of_ranks(variant, form):
  rule, inputs, state, *_ = draw(variant, 20)
  args, keywords = split_arguments(inputs)
  ids = np.zeros((B, 20), np.int32)

  def loss(args, keywords, state):
    how = dict(sizes(form)) | keywords
    o, last = RULES[rule].FORMS[form](
      *args, state=state, segment_ids=ids, **how
    )
    return o.sum() + last.sum()

  with jax.numpy_rank_promotion('raise'):
    jax.eval_shape(jax.grad(loss, (0, 1, 2)), args, keywords, state)
