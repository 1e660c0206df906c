"""Softmax attention in one of its forms, and which is taken.

  blocks   `ops.attention.attend`, on any platform
  splash   splash attention of jax, on TPUs
  cudnn    cuDNN, on NVIDIA GPUs since Ampere

They are for consecutive tokens that are queries and keys; caches, tokens that
see those after them, and time split over devices have blocks. 'auto', the
default, is that of the platform where its module `covers` the arguments, else
'blocks'.
"""

import importlib

import jax

from deltanet_jax import kernels
from deltanet_jax.ops.attention import Place, attend

_MODULES = {'splash': 'attention_tpu', 'cudnn': 'attention_cudnn'}


def choose_form(
  form: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  device: jax.Device | None = None,
) -> str:
  """Returns `form`, or what 'auto' stands for; arguments as for `attend_rows`,
  device as for `kernels.choose_form`."""
  if form != 'auto':
    return form
  best = kernels.find_choice(device).attention
  if best in _MODULES and _module(best).covers(q, k, v, segments):
    return best
  return 'blocks'


def attend_rows(
  form: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  at: Place,
  *,
  scale: float,
  window: int | None = None,
) -> jax.Array:
  """`ops.attention.attend` of consecutive tokens over themselves: o [B,T,H,V].

  q [B,T,H,K]   k [B,T,J,K]   v [B,T,J,V]   at: positions 0 to T - 1

  Raises:
    ValueError: the form does not cover it.
  """
  if form not in _MODULES:
    return attend(q, k, v, at, at, scale=scale, window=window, ahead=0)
  module = _module(form)
  if what := module.lacks(q, k, v):
    raise ValueError(f"form '{form}' with {what}, or take form='blocks'")
  return module.run(q, k, v, at.segments, scale=scale, window=window)


def _module(form):
  return importlib.import_module(f'deltanet_jax.kernels.{_MODULES[form]}')
