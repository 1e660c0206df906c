"""What is learned beside the next token: further tokens, balanced experts, an
indexer that knows the attention."""

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


def compute_further_loss(
  params: Params,
  cfg: ModelConfig,
  dtype: DTypeLike,
  hidden: jax.Array,
  batch: Batch,
) -> jax.Array:
  """Summed nats of the tokens after the targets (arXiv:2412.19437 eq. 24).

  hidden [B,T,D]: Backbone's, batch: as for the main loss. A document's last
  target has none after it and counts nothing.
  """
  out, *_ = MTP(cfg, dtype).apply(
    {'params': find_part(params, 'mtp')},
    hidden,
    embed(params, batch['targets'], dtype),
    batch['positions'],
    batch['segment_ids'],
  )
  # zero, and so without weight, behind the last column
  after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  weights = batch['weights'] * after(batch['weights'])
  weights *= after(batch['segment_ids']) == batch['segment_ids']
  return cross_entropy(
    out, get_head_weight(params, cfg), after(batch['targets']), weights
  )


def compute_balance_loss(reports: Reports) -> jax.Array:
  """The balance loss of all layers with experts, taken together."""
  return balance_loss(_loads(reports))


def measure_loads(reports: Reports) -> dict[str, jax.Array]:
  """How evenly experts are used: the share of tokens of the most and the least
  chosen one of any layer, over an equal share. {} of a model without experts.
  """
  loads = _loads(reports)
  if loads is None:
    return {}
  relative = loads.share / loads.share.mean(-1, keepdims=True)
  return {'expert_most': relative.max(), 'expert_least': relative.min()}


def _loads(reports):
  """The Load of all layers with experts [layers,E]; None of no layers."""
  loads = [r.load for r in _layers(reports) if r.load is not None]
  if not loads:
    return None
  rows = lambda x: x.reshape(-1, x.shape[-1])
  return jax.tree.map(lambda *x: jnp.concatenate([rows(a) for a in x]), *loads)


def compute_indexer_loss(reports: Reports) -> jax.Array:
  """The indexers' losses, summed over layers (a mean over tokens in each).

  Its gradient moves the indexers only. Alone, with DSAConfig.stage 'dense', it
  is the warm-up; added to the main loss, with 'sparse', the second stage.
  """
  return sum(r.mixer.sum() for r in _layers(reports) if r.mixer is not None)


def update_biases(params: Params, reports: Reports, rate: float) -> Params:
  """HybridLM's parameters with every router's selection bias moved towards
  balance by `rate` (arXiv:2408.15664), from the shares of one batch."""
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
  """The parameters of the module `name` in those of another."""
  part = params[name]
  assert isinstance(part, dict)
  return part


def _layers(reports):
  is_report = lambda x: isinstance(x, LayerReport)
  return jax.tree.leaves(reports, is_leaf=is_report)
