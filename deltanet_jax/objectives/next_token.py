"""The objective of language models: next-token loss and auxiliary losses."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.model import Backbone, Reports, get_head_weight
from deltanet_jax.objectives.auxiliary import (
  compute_balance_loss,
  compute_indexer_loss,
  compute_mtp_loss,
  find_part,
  measure_loads,
  update_biases,
)
from deltanet_jax.objectives.base import Outcome
from deltanet_jax.objectives.loss import cross_entropy
from deltanet_jax.parallel.sharding import Batch, Params


class NextToken:
  """The `Objective` of a NextTokenConfig."""

  def __init__(
    self, weights: NextTokenConfig, cfg: ModelConfig, dtype: DTypeLike
  ):
    self._weights, self._cfg, self._dtype = weights, cfg, dtype
    self._backbone = Backbone(cfg, dtype)

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Outcome]:
    """Returns the weighted sum of all losses, and the Outcome."""
    cfg, weights = self._cfg, self._weights
    outputs = self._backbone.apply(
      {'params': find_part(params, 'backbone')},
      batch['tokens'],
      positions=batch['positions'],
      segment_ids=batch['segment_ids'],
    )
    hidden, _, reports = cast(tuple[jax.Array, None, Reports], outputs)
    head = get_head_weight(params, cfg)
    nats = cross_entropy(hidden, head, batch['targets'], batch['weights'])
    total, count = weights.next * nats, batch['weights'].sum()
    if weights.further:
      mtp = compute_mtp_loss(params, cfg, self._dtype, hidden, batch)
      total += weights.further * mtp
    if weights.balance:
      total += weights.balance * count * compute_balance_loss(reports)
    if weights.indexer:
      total += weights.indexer * count * compute_indexer_loss(reports)
    return total, Outcome(nats, reports)

  def has_gradient(self, path: Sequence[str]) -> bool:
    """False for indexers and for the MTP layer if their losses have weight 0,
    for an indexer in the MTP layer, which has no loss, and for all other
    parameters during an indexer's warm-up."""
    weights = self._weights
    if any(key.startswith('index_') for key in path):
      return path[0] != 'mtp' and weights.indexer > 0
    if path[0] == 'mtp':
      return weights.further > 0
    return max(weights.next, weights.further, weights.balance) > 0

  def adjust(self, params: Params, outcome: Outcome) -> Params:
    """Updates the routers' selection biases by `bias_rate`."""
    rate, reports = self._weights.bias_rate, cast(Reports, outcome.reports)
    return update_biases(params, reports, rate) if rate else params

  def figures(self, outcome: Outcome) -> dict[str, jax.Array]:
    """`measure_loads` of the experts."""
    return measure_loads(cast(Reports, outcome.reports))


def make_loss(
  cfg: ModelConfig, dtype: DTypeLike
) -> Callable[[Params, Batch], jax.Array]:
  """Returns (params, batch) -> summed next-token loss in nats, for evaluation;
  batch as for an `Objective`."""
  objective = NextToken(NextTokenConfig(), cfg, dtype)
  return lambda params, batch: objective(params, batch)[0]
