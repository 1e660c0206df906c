"""MiniMax-M2."""

from functools import partial

from deltanet_jax.config.experiment import Layer, ModelConfig, MoEConfig
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import ATTENTION, ConfigKeys
from deltanet_jax.hf.names import Json


def _read(keys: ConfigKeys) -> ModelConfig:
  keys.require('use_qk_norm', True, default=True)
  keys.require('qk_norm_type', 'per_layer', default='per_layer')
  keys.require('scoring_func', 'sigmoid', default='sigmoid')
  keys.require('use_routing_bias', True, default=True)
  keys.require('shared_intermediate_size', 0, default=0)
  keys.without('sliding_window', 'attn_window_size', 'attention_bias')
  keys.kinds('attn_type_list', {1: True})
  keys.kinds('layer_types', ATTENTION)
  attention = common.read_attention(
    keys,
    kv_heads=8,
    width=128,
    positions=partial(
      rope.read_positions, theta=5e6, share=1.0, rotary_dim=True
    ),
    qk_norm=True,
    joint_norm=True,
  )
  ffn = MoEConfig(
    experts=keys.size('num_local_experts', 'num_experts'),
    top=keys.size('num_experts_per_tok', default=8),
    hidden=keys.size('intermediate_size'),
    score='sigmoid',
    bias=True,
  )
  layers = (Layer(attention, ffn),) * keys.layers()
  return common.make_model_config(keys, layers)


def _write(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  ffn = common.find_part(cfg, MoEConfig)
  return {
    **common.write_attention(attention),
    'rotary_dim': attention.rotary_dim,
    **rope.write_positions(attention),
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
  bias = 'e_score_correction_bias'
  return (
    *common.NORMS,
    *common.make_attention_rules(layer.mixer),
    *common.make_ffn_rules(layer.ffn, common.NUMBERED, bias=bias),
  )


FAMILIES = (
  Family(
    'minimax_m2',
    ('minimax_m2',),
    'MiniMaxM2ForCausalLM',
    _read,
    _write,
    (_rules,),
    ignored=(r'mtp\..*',),
    harmless={
      'multi-token prediction, ignored': (
        'use_mtp num_mtp_modules mtp_transformer_layers'
      ),
      'dense layers and shared experts, of which there are none': (
        'mlp_intermediate_size shared_moe_mode'
      ),
      'keys of MiniMax-M1, which the class does not read': (
        'layernorm_full_attention_beta layernorm_linear_attention_beta'
        ' layernorm_mlp_beta'
      ),
      'windows, of which there are none': 'swa_rope_theta',
      'context limit, not enforced': 'max_model_len',
    },
  ),
)
