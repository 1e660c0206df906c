"""The kernels for TPUs, interpreted on the CPU: against the float64 recurrence,
on hostile inputs, and what a caller of any form may rely on.

They run outside of jit: then all lengths that fill the same chunks share one
compiled kernel, which is what costs the time here.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deltanet_jax as dn
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.config.mixers import GatedDeltaNetConfig, KDAConfig
from deltanet_jax.kernels import (
  delta_rule_tpu,
  kda_tpu,
  linear_attention_tpu,
  tpu,
  tpu_inverse,
)
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops import delta_rule, kda
from deltanet_jax.parallel import sequence, sharding
from tests import compile_kernels
from tests.lab.test_dryrun import needs_libtpu
from tests.ops import (
  test_ops_accuracy as accuracy,
  test_ops_contract as contract,
)

KERNELS = {
  'delta_rule': delta_rule_tpu.run,
  'kda': kda_tpu.run,
  'linear_attention': linear_attention_tpu.run,
}
LOW = {
  'delta': delta_rule_tpu.run,
  'kda': kda_tpu.run,
  'linear': linear_attention_tpu.run,
}
outcome = contract.outcome.__wrapped__
# more than continuous integration has time for
long = functools.partial(pytest.param, marks=pytest.mark.long)
every_rule = pytest.mark.parametrize(
  'variant', ['gated_delta', 'kda', 'scalar_gated']
)


@pytest.fixture(autouse=True)
def interpreted(quick_compile):
  with tpu.interpret(True):
    yield


def draw(variant, T):
  """The contract's inputs, of two value heads that read one key head."""
  rule, inputs, state, d_o, d_state = contract.draw(variant, T)
  heads = lambda name: 1 if name in 'qk' else 2
  inputs = {
    n: x if x is None else x[:2] if x.ndim == 1 else x[:, :, : heads(n)]
    for n, x in inputs.items()
  }
  return rule, inputs, state[:, :2], d_o[:, :, :2], d_state[:, :2]


def check(variant, T, segment_ids=None, change=lambda inputs: inputs):
  rule, inputs, *rest = draw(variant, T)
  inputs = change(inputs)
  got = outcome(KERNELS[rule], inputs, *rest, segment_ids)
  want = contract.reference(rule, inputs, *rest, segment_ids)
  contract.assert_near(got, want)


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize(
  'variant',
  ['linear', 'lightning', 'scalar_gated', 'delta', 'gated_delta', 'kda'],
)
def test_a_kernel_equals_the_float64_recurrence(variant):
  for T in (1, 63, 100):
    check(variant, T)


@every_rule
def test_a_document_sees_none_of_the_one_before(variant):
  # edges at the first and last tokens, one after another; an id comes back
  ends = [[1, 2, 48, 64, 99, 100], [50, 64, 70, 71, 95, 100]]
  ids = np.stack([
    np.repeat(np.arange(6) % 2, np.diff([0, *row])) for row in ends
  ])  # fmt: skip
  check(variant, 100, ids)


@every_rule
def test_a_gate_of_minus_infinity_is_a_reset(variant):
  def change(inputs):
    g = inputs['g']
    reset = np.random.default_rng(1).random(g.shape) < 0.05
    return inputs | {'g': np.where(reset, -np.inf, g)}

  check(variant, 100, change=change)


@every_rule
def test_what_is_not_finite_stays_in_its_document(variant):
  rule, inputs, *rest = draw(variant, 100)
  ids = np.repeat([[5, 6, 5]], [30, 30, 40], axis=1).repeat(2, 0)
  run = functools.partial(outcome, KERNELS[rule])
  want = run(inputs, *rest, ids)
  bad = inputs['k'].copy()
  bad[:, 40] = np.nan
  got = run(inputs | {'k': bad}, *rest, ids)
  inside = ids[0] == 6
  for name, x in got.items():
    clean = np.index_exp[:, ~inside] if x.shape[1] == 100 else ...
    np.testing.assert_array_equal(x[clean], want[name][clean], err_msg=name)
  assert np.isnan(got['o'][:, 40:60]).all()
  np.testing.assert_array_equal(got['o'][:, 30:40], want['o'][:, 30:40])


@every_rule
def test_two_halves_equal_the_whole(variant):
  rule, inputs, state, *_ = draw(variant, 100)

  # with what backward keeps: the program that the other tests run
  def run(q, state, **rest):
    return jax.vjp(lambda q: KERNELS[rule](q, **rest, state=state), q)[0]

  cut = lambda a, b: {
    n: None if x is None else x[:, a:b] for n, x in inputs.items()
  }
  whole, last = run(**inputs, state=state)
  first, middle = run(**cut(0, 37), state=state)
  second, end = run(**cut(37, 100), state=middle)
  halves = jnp.concatenate([first, second], 1)
  np.testing.assert_allclose(halves, whole, atol=2e-5)
  np.testing.assert_allclose(end, last, atol=2e-5)


@every_rule
def test_no_output_depends_on_a_later_token(variant):
  rule, inputs, state, d_o, d_state = draw(variant, 100)
  early = np.where(np.arange(100)[:, None, None] < 20, d_o, 0)
  got = outcome(KERNELS[rule], inputs, state, early, 0 * d_state)
  for name in inputs:
    assert not np.any(got[name][:, 20:]), name
    assert np.any(got[name][:, 19]), name


@every_rule
@pytest.mark.parametrize('rows, tokens', [(0, 20), (2, 0)])
def test_no_rows_or_tokens_give_none_and_keep_the_state(variant, rows, tokens):
  rule, inputs, state, *_ = draw(variant, 20)
  inputs = {n: x[:rows, :tokens] for n, x in inputs.items()}
  o, last = KERNELS[rule](**inputs, state=state[:rows])
  assert o.shape == inputs['v'].shape
  np.testing.assert_array_equal(last, state[:rows])


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(
  'parts, bound',
  [(2, 2e-4), pytest.param(3, 2e-6, marks=pytest.mark.slow)],
)
def test_the_inverse_is_exact_for_keys_of_any_likeness(parts, bound):
  random = np.random.default_rng(0)
  unit, normal = accuracy.unit, functools.partial(accuracy.normal, random)
  cases = (0, 0.5), (0.5, 0.9), (0.9, 0.99), (1, 0.9999), (0.9, 1.9)
  links = []
  for cosine, beta in cases:
    k = np.sqrt(cosine) * unit(normal(1, 128))
    k = unit(k + np.sqrt(1 - cosine) * unit(normal(128, 128)))
    links.append(np.tril(beta * k @ k.T, -1))
  run = jax.jit(lambda a: tpu_inverse.inverses([a], parts)[0])
  for a in links:
    want = np.linalg.inv(np.eye(128) + np.float64(a))
    assert np.abs(run(a) - want).max() < bound * np.abs(want).max()


def check_low(rule, name, seed=0, heads=2):
  (inputs, state, d_o, d_state), want = accuracy.low_case(rule, name, seed)
  of_tokens = lambda x: x[:, :, :heads]
  inputs = {n: of_tokens(x) for n, x in inputs.items()}
  args = inputs, state[:, :heads], of_tokens(d_o), d_state[:, :heads]
  got = outcome(LOW[rule], *args)
  for n, x in want.items():
    own = x[:, :heads] if n in ('last', 'state') else of_tokens(x)
    error = np.abs(np.float64(got[n]) - own).max() / np.abs(x).max()
    assert error < 2.5e-2, (name, seed, n, error)


@pytest.mark.parametrize('rule', ['delta', 'kda', 'linear'])
def test_bfloat16_loses_no_more_than_its_own_digits(rule):
  for name in (*accuracy.CASES, 'worn'):
    check_low(rule, name, heads=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('rule', ['delta', 'kda', 'linear'])
def test_bfloat16_loses_no_more_in_other_draws(rule):
  for name in (*accuracy.CASES, 'worn'):
    for seed in range(4):
      check_low(rule, name, seed)


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['delta', long('kda')])
def test_float32_is_exact_where_keys_repeat_and_decay_is_strong(rule):
  # 4 chunks
  for name in accuracy.CASES:
    inputs, state, d_o, d_state = accuracy.case(name)
    if rule == 'kda':
      share = np.random.default_rng(0).random((*inputs['g'].shape, accuracy.D))
      inputs['g'] = np.float32(inputs['g'][..., None] * 2 * share)
    module = {'delta': delta_rule, 'kda': kda}[rule]
    args = inputs, state, d_o, d_state
    want = contract.reference(module.__name__.rpartition('.')[2], *args)
    got = accuracy.errors(outcome(LOW[rule], *args), want)
    decay = got.pop('g')
    assert max(got.values()) < 1e-5, (name, got)
    if decay > 5e-3:
      plain = contract.outcome(module.recurrent, *args)
      assert decay < 3 * accuracy.errors(plain, want)['g']


# ---------------------------------------------------------------- what it is in


def _mesh(**sizes):
  return jax.set_mesh(sharding.make_mesh(MeshConfig(**sizes)))


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [long((256, 128)), long((64, 256)), (128, 512)]
)
def test_widths_and_groups_of_all_kinds(sizes):
  K, V = sizes
  random = np.random.default_rng(0)
  normal = functools.partial(accuracy.normal, random)
  T, J, H = 150, 1, 5  # more value heads than some programs take
  q, k = (accuracy.unit(normal(1, T, J, K)) for _ in 'qk')
  beta = accuracy.sigmoid(normal(1, T, H)) * 2
  inputs = {'q': q, 'k': k, 'v': normal(1, T, H, V), 'beta': beta}
  inputs['g'] = -np.exp(normal(1, T, H) - 2)
  args = inputs, normal(1, H, K, V), normal(1, T, H, V), normal(1, H, K, V)
  got = outcome(delta_rule_tpu.run, *args)
  contract.assert_near(got, contract.reference('delta_rule', *args))


@pytest.mark.slow
@pytest.mark.long
def test_documents_have_states_of_their_own():
  _, inputs, *_ = draw('gated_delta', 100)
  q, k, v, beta, g = (x[:1] for x in inputs.values())
  ends = np.array([0, 7, 7, 60, 100])

  def run(form, v):
    o, last = dn.gated_delta_rule(
      q, k, v, beta=beta, g=g, cu_seqlens=ends, form=form, chunk=64
    )
    return jnp.sum(o**2) + jnp.sum(last**2), (o, last)

  grad = lambda form: jax.grad(functools.partial(run, form), has_aux=True)(v)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    grad('kernel'),
    grad('chunked'),
  )


@pytest.mark.slow
def test_a_kernel_is_checkpointed_scanned_and_mapped():
  _, inputs, *_ = draw('gated_delta', 20)
  args = tuple(jnp.asarray(x) for x in inputs.values())

  def loss(form, v):
    q, k, _, beta, g = args

    @jax.checkpoint
    def layer(v, _):
      return dn.gated_delta_rule(q, k, v, beta=beta, g=g, form=form)[0], None

    return jnp.sum(jax.lax.scan(layer, v, length=2)[0] ** 2)

  for way in (lambda f: f, lambda f: lambda v: jax.vmap(f)(v[None])[0]):
    run = lambda form, way=way: way(jax.grad(functools.partial(loss, form)))
    got, want = run('kernel')(args[2]), run('chunked')(args[2])
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'cls, mesh',
  [
    (GatedDeltaNetConfig, {'fsdp': 2, 'tensor': 2}),
    long(GatedDeltaNetConfig, {'seq': 2}),
    (KDAConfig, {}),
    long(KDAConfig, {'fsdp': 2, 'tensor': 2}),
    long(KDAConfig, {'seq': 2}),
  ],
)
def test_a_mixer_runs_the_kernel_on_its_share_of_a_mesh(cls, mesh):
  sizes = {'key_dim': 8, 'value_dim': 8, 'conv': 0, 'norm_eps': 1e-5}
  heads = {'heads': 2} if cls is KDAConfig else {
    'key_heads': 2, 'value_heads': 2
  }  # fmt: skip
  x = jax.random.normal(jax.random.key(0), (2, 40, 16))
  ids = jnp.repeat(jnp.asarray([[0, 1], [0, 0]]), 20, 1)
  ctx = Context(None, ids)
  make = lambda form: cls(**heads, **sizes, form=form).make(d_model=16)
  params = nn.unbox(make('chunked').init(jax.random.key(1), x))
  loss = lambda form, params: jnp.sum(
    jnp.sin(make(form).apply(params, x, ctx)[0])
  )
  want = jax.jit(jax.grad(functools.partial(loss, 'chunked')))(params)
  if not mesh:
    got = jax.jit(jax.grad(functools.partial(loss, 'kernel')))(params)
  else:
    with _mesh(**mesh):
      assert sequence.is_split(40) == ('seq' in mesh)
      got = jax.jit(jax.grad(functools.partial(loss, 'kernel')))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want
  )


# ---------------------------------------------------------------- refusals


def _call(dtype=jnp.float32, K=8, V=8):
  q, v = jnp.zeros((1, 2, 1, K), dtype), jnp.zeros((1, 2, 1, V), dtype)
  beta = jnp.zeros((1, 2, 1))
  run = lambda v: dn.delta_rule(q, q, v, beta=beta, form='kernel')[0]
  return run, v


@pytest.mark.parametrize(
  'how, says',
  [
    ({'dtype': jnp.float16}, 'q, k, v of float16; give all three in bfloat16'),
    ({'K': 300}, '300 key channels; give 256 at most, or take form='),
    ({'V': 800}, '800 value channels; give 768 at most'),
  ],
)
def test_what_a_kernel_does_not_cover_is_one_line(how, says):
  run, v = _call(**how)
  with pytest.raises(ValueError, match=f"^form 'kernel' with .*{says}"):
    run(v)


def test_gates_apart_are_not_covered():
  _, inputs, *_ = contract.draw('gdn2', 20)
  with pytest.raises(ValueError, match='one beta for erasing and writing'):
    kda_tpu.run(**inputs)


def test_another_platform_and_a_second_derivative_are_refused():
  run, v = _call()
  with tpu.interpret(False):
    with pytest.raises(
      ValueError, match="^form 'kernel' is for TPUs, and .*cpu"
    ):
      run(v)
  first = jax.grad(lambda v: jnp.sum(run(v) ** 2))
  with pytest.raises(ValueError, match="^form 'kernel' has first derivatives"):
    jax.grad(lambda v: jnp.sum(first(v)))(v)


# ---------------------------------------------------------------- TPUs


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('name', ['Qwen3-Next', long('Kimi Linear')])
def test_the_kernels_are_compiled_for_a_tpu(name):
  row = compile_kernels.compile_alone('rule', name, 'v6e:2x2')
  assert row.startswith(f'| {name} |') and '| v6e |' in row
