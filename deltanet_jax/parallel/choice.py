"""Choices that depend on the platform; no other file asks for it."""

from typing import NamedTuple

import jax


class Choice(NamedTuple):
  exchange: str  # 'exchanged' or 'gathered', see `parallel.experts`
  slices: bool  # whether slice_index of the devices tells slices apart
  kernels: bool  # whether the form 'auto' takes kernels, see `kernels`
  attention: str  # what 'auto' may take, see `kernels.attention`


def choose(device: jax.Device | jax.sharding.AbstractDevice | None) -> Choice:
  """The choices for a mesh of such devices; None: jax's default devices."""
  platform = jax.default_backend() if device is None else device.platform
  return Choice(
    # XLA's CPU backend lacks `lax.ragged_all_to_all`
    exchange='gathered' if platform == 'cpu' else 'exchanged',
    # on GPUs every machine is a slice of its own
    slices=platform == 'tpu',
    kernels=platform == 'tpu',
    attention={'tpu': 'splash', 'gpu': 'cudnn'}.get(platform, 'blocks'),
  )
