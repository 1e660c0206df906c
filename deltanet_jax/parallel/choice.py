"""What hangs on the platform: asked here and nowhere else."""

from typing import NamedTuple

import jax


class Choice(NamedTuple):
  exchange: str  # of rows and experts: 'exchanged' or 'gathered'
  slices: bool  # devices name the slice they belong to


def choose(device: jax.Device | jax.sharding.AbstractDevice | None) -> Choice:
  """The choices for a mesh of such devices; None: of jax's default ones."""
  platform = jax.default_backend() if device is None else device.platform
  return Choice(
    # XLA's CPU backend lacks `lax.ragged_all_to_all`
    exchange='gathered' if platform == 'cpu' else 'exchanged',
    # on GPUs, every machine calls itself a slice
    slices=platform == 'tpu',
  )
