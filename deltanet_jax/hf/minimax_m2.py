"""MiniMax-M2."""

from deltanet_jax.experiment import Layer, MoEConfig
from deltanet_jax.hf import common
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.mixers.config import AttentionConfig

_MOE = f'{LAYER}block_sparse_moe.'


def _read(keys):
  keys.require('use_qk_norm', True, default=True)
  keys.require('qk_norm_type', 'per_layer', default='per_layer')
  keys.require('scoring_func', 'sigmoid', default='sigmoid')
  keys.require('use_routing_bias', True, default=True)
  keys.require('shared_intermediate_size', 0, default=0)
  keys.no_scaling()
  width = common.head_dim(keys)
  attention = AttentionConfig(
    heads=keys.get('num_attention_heads'),
    kv_heads=keys.get('num_key_value_heads'),
    head_dim=width,
    rotary_dim=keys.rotary_dim(width),
    rope_theta=keys.theta(),
    qk_norm=True,
    joint_norm=True,
    norm_eps=keys.get('rms_norm_eps'),
  )
  ffn = MoEConfig(
    experts=keys.get('num_local_experts'),
    top=keys.get('num_experts_per_tok'),
    hidden=keys.get('intermediate_size'),
    score='sigmoid',
    bias=True,
  )
  layer = Layer(attention, ffn)
  return common.model_config(keys, (layer,) * keys.get('num_hidden_layers'))


def _write(cfg):
  attention = common.of_kind(cfg, AttentionConfig)
  ffn = common.ffn_of_kind(cfg, MoEConfig)
  return common.top_keys(cfg, 'minimax_m2', 'MiniMaxM2ForCausalLM') | {
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
    'rotary_dim': attention.rotary_dim,
    'rope_theta': attention.rope_theta,
    'use_qk_norm': True,
    'qk_norm_type': 'per_layer',
    'num_local_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'intermediate_size': ffn.hidden,
    'scoring_func': 'sigmoid',
    'use_routing_bias': True,
    'shared_intermediate_size': 0,
  }


def _rules(layer):
  return (
    *common.NORMS,
    *common.attention_rules(layer.mixer),
    *common.moe_rules(
      layer.ffn, _MOE, common.NUMBERED, bias='e_score_correction_bias'
    ),
  )


FAMILY = Family(
  'minimax_m2',
  ('minimax_m2',),
  _read,
  _write,
  common.top_rules,
  (_rules,),
  ignored=(r'mtp\..*',),
)
