"""Realistic sizes, at which a compiler bug shows that small ones hide: rows of
one chunk, batches of 64 and more, keys 32 and wider, layers in a scan.

A zero entry state, the gradient of an unused state and that of a sum are
broadcast constants, by which XLA's CPU compiler multiplied wrongly
(docs/xla_cpu_repeated_number.py). The token scan is not affected, and all forms
are compared with it.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config import mixers
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.ops import delta_rule, kda, linear_attention

D, LAYERS = 64, 2
RULES = {
  'linear': linear_attention,
  'delta': delta_rule,
  'gated': delta_rule,
  'kda': kda,
}
LONG = [pytest.mark.slow, pytest.mark.long]
# batch, tokens, key width, chunk
SIZES = [
  (256, 16, 64, 16),
  pytest.param(64, 64, 32, 64, marks=LONG),
  pytest.param(4096, 1, 32, 64, marks=LONG),
  pytest.param(16, 512, 32, 64, marks=LONG),
  pytest.param(256, 64, 32, 64, marks=LONG),
  pytest.param(32, 128, 128, 128, marks=LONG),
]


def _normal(i, *shape):
  return jax.random.normal(jax.random.key(i), shape, jnp.float32)


def _unit(x):
  return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _layer(rule, form, x, w, **how):
  """One layer around a rule: its output [B,T,D] and last state."""
  q, k, v = (jnp.einsum('btd,dk->btk', x, w[n])[:, :, None] for n in 'qkv')
  b = jax.nn.sigmoid(jnp.einsum('btd,dh->bth', x, w['b']))
  gates = {
    'linear': (None,),
    'delta': (b, None),
    'gated': (b, -b),
    'kda': (b, -jax.nn.softplus(k)),
  }[rule]
  o, last = RULES[rule].FORMS[form](_unit(q), _unit(k), v, *gates, **how)
  return x + jnp.einsum('btk,kd->btd', o[:, :, 0], w['o']), last


def _weights(K):
  weights = {n: _normal(i, LAYERS, D, K) / 8 for i, n in enumerate('qkv')}
  weights['b'] = _normal(3, LAYERS, D, 1) / 8
  weights['o'] = _normal(4, LAYERS, K, D) / 6
  return weights


def _outcome(rule, form, B, T, K, **how):
  """x after two scanned layers, the last states, and the gradients of the sum
  of each."""
  weights = _weights(K)

  def run(x, weights):
    return jax.lax.scan(
      lambda x, w: _layer(rule, form, x, w, **how), x, weights
    )

  @jax.jit
  def everything(x, weights):
    sums = [lambda x, w, part=part: run(x, w)[part].sum() for part in (0, 1)]
    return run(x, weights), [jax.grad(f, (0, 1))(x, weights) for f in sums]

  return everything(_normal(5, B, T, D), weights)


def _same(got, want, bound=1e-4):
  def check(a, b):
    a, b = np.float64(a), np.float64(b)
    assert np.abs(a - b).max() <= bound * np.abs(b).max()

  jax.tree.map(check, got, want)


@pytest.mark.parametrize('B, T', [(64, 64), (256, 64), (256, 16)])
def test_rows_of_one_chunk_in_scanned_layers(B, T):
  # in a program of its own: another use of the state can hide the bug
  def outputs(form, **how):
    weights, x = _weights(32), _normal(5, B, T, D)
    layer = lambda x, w: (_layer('linear', form, x, w, **how)[0], None)
    return jax.jit(lambda x: jax.lax.scan(layer, x, weights)[0])(x)

  _same(outputs('chunked', chunk=T), outputs('recurrent'))


@pytest.mark.slow
@pytest.mark.parametrize('B, T, K, chunk', SIZES)
@pytest.mark.parametrize('rule', RULES)
def test_rows_of_other_lengths_in_scanned_layers(rule, B, T, K, chunk):
  want = _outcome(rule, 'recurrent', B, T, K)
  for form in ('chunked', 'associative'):
    _same(_outcome(rule, form, B, T, K, chunk=chunk), want)


@pytest.mark.slow
@pytest.mark.parametrize('rule', RULES)
def test_the_call_of_a_rule_by_itself_compiled_and_not(rule):
  """Eager, compiled, and compiled with a zero state that is a constant."""
  B, T, K = 256, 16, 32
  w = {n: _normal(i, D, K) / 8 for i, n in enumerate('qkv')}
  w |= {'b': _normal(3, D, 1) / 8, 'o': _normal(4, K, D) / 6}
  x = _normal(5, B, T, D)
  want = _layer(rule, 'recurrent', x, w)
  for form in ('chunked', 'associative'):
    call = functools.partial(_layer, rule, form, chunk=T)
    _same(call(x, w), want)
    _same(jax.jit(call)(x, w), want)
    zero = lambda x, w, call=call: call(x, w, state=jnp.zeros((B, 1, K, K)))
    _same(jax.jit(zero)(x, w), want)


MIXERS = {
  'linear': mixers.LinearAttentionConfig(1, 32, 32),
  'lightning': mixers.LightningConfig(1, 32),
  'delta': mixers.DeltaNetConfig(heads=1, key_dim=32, value_dim=32),
  'gated': mixers.GatedDeltaNetConfig(
    key_heads=1, value_heads=1, key_dim=32, value_dim=32
  ),
  'kda': mixers.KDAConfig(1, 32, 32),
}


def _model(mixer, **changes):
  mixer = dataclasses.replace(MIXERS[mixer], **changes)
  layer = Layer(mixer, MLPConfig(64))
  return HybridLM(ModelConfig(64, D, period=(layer,), repeats=LAYERS))


def _params(model):
  return nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


@pytest.mark.slow
@pytest.mark.parametrize('B', [64, pytest.param(256, marks=LONG)])
@pytest.mark.parametrize(
  'mixer',
  [
    'linear',
    'gated',
    *(pytest.param(x, marks=LONG) for x in ('lightning', 'delta', 'kda')),
  ],
)
def test_logits_and_gradients_of_scanned_layers(mixer, B):
  tokens = jax.random.randint(jax.random.key(1), (B, 64), 0, 64)
  params = _params(_model(mixer))

  def run(form):
    model = _model(mixer, form=form)

    @jax.jit
    def loss(params):
      logits, _ = model.apply(params, tokens)
      return -jax.nn.log_softmax(logits)[..., 0].mean()

    logits = jax.jit(lambda params: model.apply(params, tokens)[0])
    return logits(params), jax.value_and_grad(loss)(params)

  want = run('recurrent')
  for form in ('chunked', 'associative'):
    _same(run(form), want, 1e-3)  # gradients of sums over 4,096 tokens


@pytest.mark.slow
@pytest.mark.parametrize('mixer', MIXERS)
def test_a_prompt_and_a_step_with_a_cache_made_in_the_same_program(mixer):
  B, T = 256, 64
  tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, 64)
  params = _params(_model(mixer))

  @jax.jit
  def prompt_and_step(params, tokens):
    cache = init_cache(_model(mixer).cfg, B, T + 1, jnp.float32)
    first, cache = _model(mixer).apply(params, tokens[:, :T], cache=cache)
    last, _ = _model(mixer).apply(params, tokens[:, T:], cache=cache)
    return jnp.concatenate([first, last], 1)

  whole = jax.jit(_model(mixer, form='recurrent').apply)(params, tokens)[0]
  _same(prompt_and_step(params, tokens), whole, 2e-4)

  @jax.jit
  def first_token(params, tokens):
    cache = init_cache(_model(mixer).cfg, B, T, jnp.float32)
    return _model(mixer).apply(params, tokens[:, :1], cache=cache)[0]

  _same(first_token(params, tokens), whole[:, :1], 2e-4)
