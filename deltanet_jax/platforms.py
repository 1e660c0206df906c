"""Choices that depend on the platform; no other file asks for it."""

from typing import NamedTuple

import jax


class Choice(NamedTuple):
  exchange: str  # 'exchanged' or 'gathered', see `parallel.experts`
  slices: bool  # whether slice_index of the devices tells slices apart
  kernels: bool  # whether the form 'auto' takes kernels, see `kernels`
  attention: str  # what 'auto' may take, see `kernels.attention`
  ahead: int = 0  # training steps that are dispatched before one has ended


def choose(device: jax.Device | jax.sharding.AbstractDevice | None) -> Choice:
  """The choices for a mesh of such devices; None: jax's default devices."""
  device = device or jax.devices()[0]
  platform = device.platform
  # XLA lacks `lax.ragged_all_to_all` for CPUs, and for more than 16 v5e chips
  lacks = platform == 'cpu' or device.device_kind == 'TPU v5 lite'
  return Choice(
    exchange='gathered' if lacks else 'exchanged',
    # on GPUs every machine is a slice of its own
    slices=platform == 'tpu',
    kernels=platform == 'tpu',
    attention={'tpu': 'splash', 'gpu': 'cudnn'}.get(platform, 'blocks'),
    # on a simulated mesh the collectives of two steps can wait for each other
    ahead=0 if platform == 'cpu' else 2,
  )
