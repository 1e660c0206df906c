"""The interface of training objectives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from deltanet_jax.model import Reports
from deltanet_jax.parallel.sharding import Batch, Params


class Outcome(NamedTuple):
  """What an objective returns besides its value."""

  nats: jax.Array  # the loss that is reported, summed over tokens
  reports: Reports | tuple[()]  # the layers' reports; () if not needed


class Objective(Protocol):
  """An objective for one model, made by its configuration.

  batch: dict of [B,T] arrays: tokens, targets, positions, segment_ids (int32)
  and weights (float32)
  """

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Outcome]:
    """Returns what is minimized, summed over tokens, and the Outcome."""
    ...

  def has_gradient(self, path: Sequence[str]) -> bool:
    """False for a parameter that gets no gradient: it must not decay."""
    ...

  def adjust(self, params: Params, outcome: Outcome) -> Params:
    """Returns the parameters after the optimizer's update, with those changed
    that have an update rule of their own."""
    ...

  def figures(self, outcome: Outcome) -> dict[str, jax.Array]:
    """Returns further scalars for the log."""
    ...
