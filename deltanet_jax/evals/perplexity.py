"""Loss and bits per byte on held-out text."""

import math
from typing import NamedTuple

import jax


class Score(NamedTuple):
  """Sums over the targets that were scored."""

  nats: float
  tokens: int
  ends: int  # of these tokens, ends of a document

  @property
  def loss(self):
    """Nats per token."""
    return self.nats / self.tokens

  @property
  def perplexity(self):
    return math.exp(self.loss)

  def bits_per_byte(self, size):
    """Bits per byte of a text of `size` bytes that these targets spell."""
    return self.nats / math.log(2) / size


def evaluate(total_loss, params, batches, place, eod):
  """The `Score` of batches as `TextData.heldout_batches` gives them.

  total_loss: jitted (params, batch) -> nats   place: host batch -> device batch
  eod: the id that ends a document
  """
  nats, tokens, ends = 0.0, 0, 0
  for batch in batches:
    # the sum over batches is kept on the host in float64
    nats += float(jax.device_get(total_loss(params, place(batch))))
    tokens += int(batch['weights'].sum())
    ends += int(batch['weights'][batch['targets'] == eod].sum())
  return Score(nats, tokens, ends)
