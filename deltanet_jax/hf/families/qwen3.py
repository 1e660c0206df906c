"""Qwen3, dense and mixture of experts."""

from deltanet_jax.config.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import ATTENTION


def _read(keys, ffn, kv_heads, width):
  keys.require('attention_bias', False, default=False)
  keys.require('use_sliding_window', False, None, default=False)
  keys.kinds('layer_types', ATTENTION)
  heads = common.heads(keys, kv_heads, width)
  attention = AttentionConfig(
    **heads,
    **rope.read(keys, heads['head_dim']),
    qk_norm=True,
    norm_eps=keys.number('rms_norm_eps', default=1e-6),
  )
  layers = (Layer(attention, ffn),) * keys.layers()
  return common.model_config(keys, layers)


def _write(cfg, model_type, architecture):
  mixer = common.of_kind(cfg, AttentionConfig)
  return common.top_keys(cfg, model_type, architecture) | {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.kv_heads,
    'head_dim': mixer.head_dim,
    **rope.write(mixer),
    'attention_bias': False,
    'use_sliding_window': False,
  }


def _read_dense(keys):
  return _read(keys, common.mlp(keys), kv_heads=32, width=128)


def _write_dense(cfg):
  ffn = common.ffn_of_kind(cfg, MLPConfig)
  return _write(cfg, 'qwen3', 'Qwen3ForCausalLM') | {
    'intermediate_size': ffn.hidden
  }


def _dense_rules(layer):
  return (
    *common.NORMS,
    *common.attention_rules(layer.mixer),
    *common.mlp_rules(),
  )


def _read_moe(keys):
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  ffn = MoEConfig(
    experts=keys.size('num_experts', 'num_local_experts'),
    top=keys.size('num_experts_per_tok', default=8),
    hidden=keys.size('moe_intermediate_size'),
    renormalise=keys.flag('norm_topk_prob', default=False),
  )
  return _read(keys, ffn, kv_heads=4, width=None)


def _write_moe(cfg):
  ffn = common.ffn_of_kind(cfg, MoEConfig)
  return _write(cfg, 'qwen3_moe', 'Qwen3MoeForCausalLM') | {
    'num_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'moe_intermediate_size': ffn.hidden,
    'norm_topk_prob': ffn.renormalise,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }


def _moe_rules(layer):
  return (
    *common.NORMS,
    *common.attention_rules(layer.mixer),
    *common.moe_rules(layer.ffn, f'{common.LAYER}mlp.', common.PROJECTIONS),
  )


_WINDOWS = {'of use_sliding_window': 'sliding_window max_window_layers'}

DENSE = Family(
  'qwen3',
  ('qwen3',),
  _read_dense,
  _write_dense,
  common.top_rules,
  (_dense_rules,),
  harmless=_WINDOWS,
)
MOE = Family(
  'qwen3_moe',
  ('qwen3_moe',),
  _read_moe,
  _write_moe,
  common.top_rules,
  (_moe_rules,),
  harmless=_WINDOWS
  | {'of dense layers, and every layer has experts': 'intermediate_size'},
)
