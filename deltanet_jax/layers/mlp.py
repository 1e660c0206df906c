"""Gated MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.layers.proj import Proj


class MLP(nn.Module):
  """y = (silu(x gate) * (x up)) down (arXiv:2002.05202, SwiGLU)."""

  hidden: int
  dtype: DTypeLike = jnp.float32
  out_scale: float = 1.0  # factor of the last weight's initial values

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    D, F = x.shape[-1], self.hidden
    inward = (D, F), ('embed', 'mlp'), 'BTD,DF->BTF', self.dtype
    gate = Proj(*inward, name='gate')(x)
    up = Proj(*inward, name='up')(x)
    return Proj(
      (F, D),
      ('mlp', 'embed'),
      'BTF,FD->BTD',
      self.dtype,
      scale=self.out_scale,
      name='down',
    )(jax.nn.silu(gate) * up)
