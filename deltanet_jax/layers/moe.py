"""Mixture of experts in place of the gated MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import MoEConfig
from deltanet_jax.layers.mlp import MLP
from deltanet_jax.layers.proj import Proj, name_axes, scaled_normal
from deltanet_jax.ops import routing
from deltanet_jax.parallel import experts


class MoE(nn.Module):
  """y [B,T,D] = sum over chosen e of w_e MLP_e(x), and the experts' Load.

  `ops.routing.route` gives w from the logits x router, in float32. A shared
  expert of width `shared` is added, multiplied by sigmoid(x shared_gate) with
  `shared_gate`.
  """

  cfg: MoEConfig
  dtype: DTypeLike = jnp.float32
  out_scale: float = 1.0  # factor of the last weights' initial values

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, routing.Load]:
    c, D = self.cfg, x.shape[-1]
    E, F = c.experts, c.hidden
    # rounding must not decide between close scores
    with jax.default_matmul_precision('highest'):
      logits = Proj((D, E), ('embed', 'experts'), 'BTD,DE->BTE', name='router')(
        x
      )
    bias = None
    if c.bias:
      bias = self.param(
        'bias', name_axes(nn.initializers.zeros, ('experts',)), (E,)
      )
    weight = lambda name, axes, shape, std: self.param(
      name, name_axes(scaled_normal(std), ('experts', *axes)), (E, *shape)
    )
    inward = ('embed', 'mlp'), (D, F), D**-0.5
    weights = (
      weight('gate', *inward),
      weight('up', *inward),
      weight('down', ('mlp', 'embed'), (F, D), self.out_scale * F**-0.5),
    )
    gate, up, down = (w.astype(self.dtype) for w in weights)
    y, load = experts.mix_experts(
      x.astype(self.dtype),
      logits,
      bias,
      (gate, up, down),
      self._route,
    )
    if c.shared:
      y += self._shared(x)
    return y, load

  def _route(self, logits, bias):
    c = self.cfg
    return routing.route(
      logits,
      score=c.score,
      top=c.top,
      bias=bias,
      groups=c.groups,
      top_groups=c.top_groups,
      renormalize=c.renormalize,
      eps=c.eps,
      scale=c.scale,
    )

  def _shared(self, x):
    c = self.cfg
    y = MLP(c.shared, self.dtype, self.out_scale, name='shared')(x)
    if not c.shared_gate:
      return y
    gate = Proj(
      (x.shape[-1],), ('embed',), 'BTD,D->BT', self.dtype, name='shared_gate'
    )(x)
    return jax.nn.sigmoid(gate)[..., None] * y
