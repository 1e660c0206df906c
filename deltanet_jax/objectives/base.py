"""What a training step asks of its objective."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from deltanet_jax.model import Reports
from deltanet_jax.parallel.sharding import Batch, Params


class Outcome(NamedTuple):
  """What an objective says beside its value."""

  nats: jax.Array  # what is reported as the loss, summed over tokens
  reports: Reports | tuple[()]  # of the layers; () where none are kept


class Objective(Protocol):
  """Made by its configuration for a model. batch: dict of [B,T] tokens,
  targets, positions, segment_ids (int32) and weights (float32)."""

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Outcome]:
    """What is minimized, summed over tokens, and the Outcome."""
    ...

  def has_gradient(self, path: Sequence[str]) -> bool:
    """Whether the parameter at `path` has one; what has none must not decay."""
    ...

  def adjust(self, params: Params, outcome: Outcome) -> Params:
    """The parameters after the optimizer's update, with what moves by a rule of
    its own."""
    ...

  def figures(self, outcome: Outcome) -> dict[str, jax.Array]:
    """Scalars for the log beside the loss."""
    ...
