"""Qwen3, dense and mixture of experts."""

from deltanet_jax.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.hf import common
from deltanet_jax.hf.common import Family
from deltanet_jax.mixers.config import AttentionConfig


def _attention(keys):
  keys.require('attention_bias', False, default=False)
  keys.require('use_sliding_window', False, None, default=False)
  keys.no_scaling()
  width = common.head_dim(keys)
  return AttentionConfig(
    heads=keys.get('num_attention_heads'),
    kv_heads=keys.get('num_key_value_heads'),
    head_dim=width,
    rotary_dim=keys.rotary_dim(width),
    rope_theta=keys.theta(),
    qk_norm=True,
    norm_eps=keys.get('rms_norm_eps'),
  )


def _read(keys, ffn):
  layer = Layer(_attention(keys), ffn)
  return common.model_config(keys, (layer,) * keys.get('num_hidden_layers'))


def _write(cfg, model_type, architecture):
  mixer = common.of_kind(cfg, AttentionConfig)
  return common.top_keys(cfg, model_type, architecture) | {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.kv_heads,
    'head_dim': mixer.head_dim,
    'rope_theta': mixer.rope_theta,
    'rope_scaling': None,
    'attention_bias': False,
    'use_sliding_window': False,
  }


def _read_dense(keys):
  return _read(keys, common.mlp(keys))


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
    experts=keys.get('num_experts', 'num_local_experts'),
    top=keys.get('num_experts_per_tok'),
    hidden=keys.get('moe_intermediate_size'),
    renormalise=keys.get('norm_topk_prob', default=False),
  )
  return _read(keys, ffn)


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


DENSE = Family(
  'qwen3',
  ('qwen3',),
  _read_dense,
  _write_dense,
  common.top_rules,
  (_dense_rules,),
)
MOE = Family(
  'qwen3_moe',
  ('qwen3_moe',),
  _read_moe,
  _write_moe,
  common.top_rules,
  (_moe_rules,),
)
