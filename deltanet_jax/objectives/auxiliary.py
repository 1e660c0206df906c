"""Auxiliary losses: multi-token prediction, the experts' load balance, DSA's
indexers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.model import (
  MTP,
  LayerReport,
  Reports,
  embed,
  get_head_weight,
)
from deltanet_jax.objectives.loss import cross_entropy
from deltanet_jax.ops.routing import balance_loss, updated_bias
from deltanet_jax.parallel.sharding import Batch, Params


def compute_mtp_loss(
  params: Params,
  cfg: ModelConfig,
  dtype: DTypeLike,
  hidden: jax.Array,
  batch: Batch,
) -> jax.Array:
  """The loss of multi-token prediction (arXiv:2412.19437 eq. 24): summed nats
  of the tokens that follow the targets.

  hidden [B,T,D]: the Backbone's output   batch: as for the next token
  A document's last target has no following token and does not count.
  """
  out, *_ = MTP(cfg, dtype).apply(
    {'params': find_part(params, 'mtp')},
    hidden,
    embed(params, batch['targets'], dtype),
    batch['positions'],
    batch['segment_ids'],
  )
  # the column behind the last is zero, and so has no weight
  after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  weights = batch['weights'] * after(batch['weights'])
  weights *= after(batch['segment_ids']) == batch['segment_ids']
  return cross_entropy(
    out, get_head_weight(params, cfg), after(batch['targets']), weights
  )


def compute_balance_loss(reports: Reports) -> jax.Array:
  """`balance_loss` over all layers with experts."""
  return balance_loss(_loads(reports))


def measure_loads(reports: Reports) -> dict[str, jax.Array]:
  """The load of the most and the least used expert of any layer, 1 for an equal
  share; {} for a model without experts."""
  loads = _loads(reports)
  if loads is None:
    return {}
  relative = loads.share / loads.share.mean(-1, keepdims=True)
  return {'expert_most': relative.max(), 'expert_least': relative.min()}


def _loads(reports):
  """The Load [layers,E] of all layers with experts; None if there are none."""
  loads = [r.load for r in _layers(reports) if r.load is not None]
  if not loads:
    return None
  rows = lambda x: x.reshape(-1, x.shape[-1])
  return jax.tree.map(lambda *x: jnp.concatenate([rows(a) for a in x]), *loads)


def compute_indexer_loss(reports: Reports) -> jax.Array:
  """The indexers' losses, mean over tokens and summed over layers.

  Its gradient reaches the indexers alone. By itself, with DSAConfig.stage
  'dense', it is the warm-up; added to the main loss, with 'sparse', it is the
  second stage.
  """
  return sum(r.mixer.sum() for r in _layers(reports) if r.mixer is not None)


def update_biases(params: Params, reports: Reports, rate: float) -> Params:
  """Returns HybridLM's parameters with every router's selection bias updated
  by the loads of one batch (arXiv:2408.15664, `routing.updated_bias`)."""
  backbone = find_part(params, 'backbone')
  for part in reports._fields:
    for i, report in enumerate(getattr(reports, part)):
      if report.load is None:
        continue
      layers = find_part(backbone, part)
      layer = find_part(layers, f'layer_{i}')
      ffn = find_part(layer, 'ffn')
      if 'bias' not in ffn:
        continue
      bias: Any = ffn['bias']
      bias = updated_bias(bias, report.load.share, rate)
      layer = layer | {'ffn': ffn | {'bias': bias}}
      backbone = backbone | {part: layers | {f'layer_{i}': layer}}
  return params | {'backbone': backbone}


def find_part(params: Params, name: str) -> Params:
  """The parameters of the submodule `name`."""
  part = params[name]
  assert isinstance(part, dict)
  return part


def _layers(reports):
  is_report = lambda x: isinstance(x, LayerReport)
  return jax.tree.leaves(reports, is_leaf=is_report)
