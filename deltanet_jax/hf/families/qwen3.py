"""Qwen3, dense and mixture of experts."""

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import ATTENTION, ConfigKeys
from deltanet_jax.hf.names import Json


def _read(
  keys: ConfigKeys,
  ffn: MLPConfig | MoEConfig,
  kv_heads: int,
  width: int | None,
) -> ModelConfig:
  keys.require('attention_bias', False, default=False)
  keys.require('use_sliding_window', False, None, default=False)
  keys.kinds('layer_types', ATTENTION)
  attention = common.read_attention(
    keys, kv_heads=kv_heads, width=width, qk_norm=True
  )
  layers = (Layer(attention, ffn),) * keys.layers()
  return common.make_model_config(keys, layers)


def _write(cfg: ModelConfig) -> Json:
  mixer, ffn = common.find_part(cfg, AttentionConfig), cfg.layers[0].ffn
  settings: Json = {
    **common.write_attention(mixer),
    **rope.write_positions(mixer),
    'attention_bias': False,
    'use_sliding_window': False,
  }
  if isinstance(ffn, MLPConfig):
    return settings | {'intermediate_size': ffn.hidden}
  return settings | {
    'num_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'moe_intermediate_size': ffn.hidden,
    'norm_topk_prob': ffn.renormalize,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }


def _rules(layer):
  return (
    *common.NORMS,
    *common.make_attention_rules(layer.mixer),
    *common.make_ffn_rules(layer.ffn),
  )


def _read_moe(keys: ConfigKeys) -> ModelConfig:
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  ffn = MoEConfig(
    experts=keys.size('num_experts', 'num_local_experts'),
    top=keys.size('num_experts_per_tok', default=8),
    hidden=keys.size('moe_intermediate_size'),
    renormalize=keys.flag('norm_topk_prob', default=False),
  )
  return _read(keys, ffn, kv_heads=4, width=None)


_WINDOWS = {
  'windows, see use_sliding_window': 'sliding_window max_window_layers'
}
_DENSE = {'dense layers, of which there are none': 'intermediate_size'}

FAMILIES = (
  Family(
    'qwen3',
    ('qwen3',),
    'Qwen3ForCausalLM',
    lambda keys: _read(keys, common.read_mlp(keys), kv_heads=32, width=128),
    _write,
    (_rules,),
    harmless=_WINDOWS,
  ),
  Family(
    'qwen3_moe',
    ('qwen3_moe',),
    'Qwen3MoeForCausalLM',
    _read_moe,
    _write,
    (_rules,),
    harmless=_WINDOWS | _DENSE,
  ),
)
