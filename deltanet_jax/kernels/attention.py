"""Softmax attention in one of its forms.

  blocks   `ops.attention.attend`, on any platform
  splash   splash attention of jax, on TPUs
  cudnn    cuDNN, on NVIDIA GPUs

They are for consecutive tokens that are queries and keys. Caches, single
tokens, tokens that see those after them and split time have blocks.
"""

import importlib

import jax

from deltanet_jax.ops.attention import Place, attend

# where the library's are
MODULES = {'splash': 'attention_tpu', 'cudnn': 'attention_cudnn'}


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
  if form in MODULES:
    return _module(form).run(q, k, v, at.segments, scale=scale, window=window)
  return attend(q, k, v, at, at, scale=scale, window=window, ahead=0)


def _module(form):
  return importlib.import_module(f'deltanet_jax.kernels.{MODULES[form]}')
