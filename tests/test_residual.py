"""The three ways to add a branch to the residual stream."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  Residual,
)
from deltanet_jax.config.mixers import LinearAttentionConfig
from deltanet_jax.layers.mlp import MLP
from deltanet_jax.mixers.base import Context
from deltanet_jax.model import Backbone, Block

pytestmark = pytest.mark.slow

D, T, EPS = 8, 5, 1e-6
MIXER = LinearAttentionConfig(heads=2, key_dim=4, value_dim=4, form='recurrent')


def _cfg(residual):
  layer = Layer(MIXER, MLPConfig(6), residual)
  return ModelConfig(
    vocab=11, d_model=D, period=(layer,), repeats=2, norm_eps=EPS
  )


@pytest.mark.parametrize(
  'residual',
  [
    Residual(),
    Residual('post'),
    Residual('normed', alpha=3.5, beta=0.5),
  ],
)
def test_a_block_joins_its_branches_as_its_equation_says(residual):
  cfg = _cfg(residual)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, T, D)).astype(np.float32)
  ctx = Context(jnp.arange(T)[None], None, jnp.float32(0))
  block = Block(cfg, cfg.period[0], jnp.float32)
  params = nn.unbox(block.init(jax.random.key(0), x, ctx, None))['params']
  params = jax.tree.map(
    lambda p: p + 0.2 * rng.standard_normal(p.shape, np.float32), params
  )
  got, *_ = block.apply({'params': params}, x, ctx, None)

  def norm(x, name):
    rms = np.sqrt(np.mean(np.square(x), -1, keepdims=True) + EPS)
    return x / rms * params[name]['scale']

  mixer = lambda x: MIXER.make(d_model=D).apply(
    {'params': params['mixer']}, x, ctx
  )[0]
  mlp = lambda x: MLP(6).apply({'params': params['ffn']}, x)
  want = x
  for f, name in ((mixer, 'mixer_norm'), (mlp, 'ffn_norm')):
    if residual.form == 'pre':
      want = want + f(norm(want, name))
    elif residual.form == 'post':
      want = want + norm(f(want), name)
    else:
      h = norm(want, name)
      want = 3.5 * h + 0.5 * f(h)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_layers_of_one_model_may_differ():
  pre, post = Residual(), Residual('post')
  cfg = _cfg(pre)
  mixed = dataclasses.replace(
    cfg, period=(*cfg.period, dataclasses.replace(cfg.period[0], residual=post))
  )
  tokens = jnp.arange(T)[None]
  params = nn.unbox(Backbone(mixed).init(jax.random.key(0), tokens))
  swapped = dataclasses.replace(mixed, period=mixed.period[::-1])
  y, z = (Backbone(c).apply(params, tokens)[0] for c in (mixed, swapped))
  assert np.abs(y - z).max() > 1e-3


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'form': 'deepnorm'}, "form is 'deepnorm'; give one of pre, post, normed"),
    ({'alpha': 2.0}, "alpha 2.0 and beta 1.0 belong to the form 'normed'"),
  ],
)
def test_a_residual_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Residual(**fields)
