"""Loss, perplexity and bits per byte from sums over targets."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.data.rows import HostBatch
from deltanet_jax.parallel.sharding import Batch, Params


class Score(NamedTuple):
  """Sums over the scored targets."""

  nats: float
  tokens: int
  ends: int  # of these tokens, those that end a document

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    """e^loss; inf where that overflows."""
    try:
      return math.exp(self.loss)
    except OverflowError:
      return math.inf

  def bits_per_byte(self, size: int) -> float:
    """Bits per byte, if the targets decode to a text of `size` bytes."""
    return self.nats / math.log(2) / size


def score_batches(
  total_loss: Callable[[Params, Batch], jax.Array],
  params: Params,
  batches: Iterable[HostBatch],
  place: Callable[[HostBatch], Batch],
  eod: int,
) -> Score:
  """The `Score` of batches, as of `TextData.make_heldout_batches`.

  total_loss: jitted, summed nats   place: puts a batch on the devices
  eod: the id that ends a document
  """
  nats, tokens, ends = 0.0, 0, 0
  for host_batch in batches:
    batch = place(host_batch)  # includes the rows of other processes
    # summed over batches on the host, in float64
    nats += float(jax.device_get(total_loss(params, batch)))
    counts = jax.device_get(_counts(batch['weights'], batch['targets'], eod))
    tokens, ends = tokens + int(counts[0]), ends + int(counts[1])
  return Score(nats, tokens, ends)


@jax.jit
def _counts(weights, targets, eod):
  """The number of scored targets, and of those that are `eod`."""
  scored = weights > 0
  return jnp.sum(scored), jnp.sum(scored & (targets == eod))


def sum_scores(
  scored: Iterable[tuple[HostBatch, np.ndarray | float]], eod: int
) -> Score:
  """The `Score` of pairs (host batch, nats summed over its scored targets)."""
  nats, tokens, ends = 0.0, 0, 0
  for batch, loss in scored:
    nats += float(loss)  # in float64
    tokens += int(batch['weights'].sum())
    ends += int(batch['weights'][batch['targets'] == eod].sum())
  return Score(nats, tokens, ends)
