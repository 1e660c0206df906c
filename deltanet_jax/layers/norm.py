"""Normalizations, computed in float32 and returned in the input's type."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deltanet_jax.layers.proj import name_axes


def _rms(x, eps):
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _row(w, x):
  """Returns w [D] with the rank of x [...,D], so that their product needs no
  rank promotion."""
  return w.reshape((1,) * (x.ndim - 1) + w.shape)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(sum x^2 + eps) over the last axis."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)
  return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """y = x rsqrt(mean x^2 + eps) w over the last axis; w is `scale`, or
  1 + scale with `zero_centered`, so that weight decay pulls it to one."""

  eps: float = 1e-6
  zero_centered: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
    w = self.param(
      'scale', name_axes(init, ('norm',)), x.shape[-1:], jnp.float32
    )
    w = 1 + w if self.zero_centered else w
    return (_rms(x, self.eps) * _row(w, x)).astype(x.dtype)


class GatedRMSNorm(nn.Module):
  """y = x rsqrt(mean x^2 + eps) w * activation(z), of x and z [...,D]."""

  eps: float
  activation: str  # a function of jax.nn: 'silu' or 'sigmoid'

  @nn.compact
  def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
    w = self.param(
      'scale',
      name_axes(nn.initializers.ones, ('norm',)),
      x.shape[-1:],
      jnp.float32,
    )
    gate = getattr(jax.nn, self.activation)(z.astype(jnp.float32))
    return (_rms(x, self.eps) * _row(w, x) * gate).astype(x.dtype)


class LayerNorm(nn.Module):
  """y = (x - mean x) rsqrt(var x + eps) w + b over the last axis."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    weight = lambda name, init: self.param(
      name, name_axes(init, ('norm',)), x.shape[-1:], jnp.float32
    )
    y = x.astype(jnp.float32)
    y = _rms(y - y.mean(-1, keepdims=True), self.eps)
    y = y * _row(weight('scale', nn.initializers.ones), x)
    return (y + _row(weight('bias', nn.initializers.zeros), x)).astype(x.dtype)
