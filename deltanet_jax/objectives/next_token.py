"""The next token's loss, and further tokens, balance and indexers beside it."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.model import Backbone, Reports, get_head_weight
from deltanet_jax.objectives.auxiliary import (
  compute_balance_loss,
  compute_further_loss,
  compute_indexer_loss,
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
    """The weighted sum of all parts, and the Outcome."""
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
      further = compute_further_loss(params, cfg, self._dtype, hidden, batch)
      total += weights.further * further
    if weights.balance:
      total += weights.balance * count * compute_balance_loss(reports)
    if weights.indexer:
      total += weights.indexer * count * compute_indexer_loss(reports)
    return total, Outcome(nats, reports)

  def has_gradient(self, path: Sequence[str]) -> bool:
    """None have the block of a further token that is not asked for, indexers
    (the objective knows none in that block), and all others while only the
    indexers warm up."""
    weights = self._weights
    if any(key.startswith('index_') for key in path):
      return path[0] != 'mtp' and weights.indexer > 0
    if path[0] == 'mtp':
      return weights.further > 0
    return max(weights.next, weights.further, weights.balance) > 0

  def adjust(self, params: Params, outcome: Outcome) -> Params:
    """With the routers' selection biases moved by `bias_rate`."""
    rate, reports = self._weights.bias_rate, cast(Reports, outcome.reports)
    return update_biases(params, reports, rate) if rate else params

  def figures(self, outcome: Outcome) -> dict[str, jax.Array]:
    """How evenly the experts are used."""
    return measure_loads(cast(Reports, outcome.reports))


def make_loss(
  cfg: ModelConfig, dtype: DTypeLike
) -> Callable[[Params, Batch], jax.Array]:
  """The function (params, batch) -> summed next-token loss in nats, by which a
  model is evaluated; batch as for an `Objective`."""
  objective = NextToken(NextTokenConfig(), cfg, dtype)
  return lambda params, batch: objective(params, batch)[0]
