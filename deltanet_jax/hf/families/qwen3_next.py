"""Qwen3-Next, and Qwen3.5 dense and mixture of experts (text)."""

from functools import partial

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import (
  Conv,
  Linear,
  Rules,
  Same,
  make_rule,
  stack_experts,
)
from deltanet_jax.hf.names import Json


def _read(
  keys: ConfigKeys, ffn: MLPConfig | MoEConfig, kv_heads: int = 2
) -> ModelConfig:
  keys.require('attention_bias', False, default=False)
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  # values of the release; the classes support no others
  keys.require('attn_output_gate', True, default=True)
  keys.require('output_gate_type', 'swish', 'silu', default='swish')
  attention = common.read_attention(
    keys,
    kv_heads=kv_heads,
    width=256,
    positions=partial(rope.read_positions, share=0.25),
    qk_norm=True,
    gate=True,
  )
  delta = GatedDeltaNetConfig(
    key_heads=keys.size('linear_num_key_heads'),
    value_heads=keys.size('linear_num_value_heads'),
    key_dim=keys.size('linear_key_head_dim'),
    value_dim=keys.size('linear_value_head_dim'),
    conv=keys.size('linear_conv_kernel_dim', default=4),
    norm_eps=attention.norm_eps,
  )
  layers = [
    Layer(attention if full else delta, ffn) for full in keys.full_attention()
  ]
  return common.make_model_config(keys, layers, zero_centered=True)


def _moe(keys: ConfigKeys, top: int) -> MoEConfig:
  return MoEConfig(
    experts=keys.size('num_experts', 'num_local_experts'),
    top=keys.size('num_experts_per_tok', default=top),
    hidden=keys.size('moe_intermediate_size'),
    # Qwen3.5 has no such key and always renormalizes
    renormalize=keys.flag('norm_topk_prob', default=True),
    shared=keys.size('shared_expert_intermediate_size'),
    shared_gate=True,
  )


def _write(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  delta = common.find_part(cfg, GatedDeltaNetConfig)
  settings: Json = {
    **common.write_attention(attention),
    'attention_bias': False,
    **common.write_delta(delta),
    'layer_types': common.write_layer_types(cfg),
  }
  ffn = cfg.layers[0].ffn
  if isinstance(ffn, MLPConfig):
    return settings | {'intermediate_size': ffn.hidden}
  return settings | {
    'num_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'moe_intermediate_size': ffn.hidden,
    'shared_expert_intermediate_size': ffn.shared,
    'norm_topk_prob': ffn.renormalize,
  }


def _write_next(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  settings = _write(cfg) | {
    **rope.write_positions(attention),
    'partial_rotary_factor': attention.rotary_dim / attention.head_dim,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }
  kinds = common.write_layer_types(cfg)
  every = kinds.index('full_attention') + 1
  if kinds == [kinds[i % every] for i in range(len(kinds))]:
    del settings['layer_types']
    settings['full_attention_interval'] = every
  return settings


def _write_3_5(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  share = attention.rotary_dim / attention.head_dim
  positions = rope.write_parameters(attention, partial_rotary_factor=share)
  return _write(cfg) | {'rope_parameters': positions}


def _delta_rules(mixer: GatedDeltaNetConfig, fused: bool) -> Rules:
  apart = (
    ('in_proj_qkv.weight', 'q.w k.w v.w', Linear()),
    ('in_proj_z.weight', 'gate.w', Linear()),
    ('in_proj_b.weight', 'b.w', Linear()),
    ('in_proj_a.weight', 'a.w', Linear()),
  )
  by_head = Linear(groups=mixer.key_heads)
  together = (
    ('in_proj_qkvz.weight', 'q.w k.w v.w gate.w', by_head),
    ('in_proj_ba.weight', 'b.w a.w', by_head),
  )
  return common.make_mixer_rules(
    f'{LAYER}linear_attn.',
    *(together if fused else apart),
    ('conv1d.weight', 'q_conv.taps k_conv.taps v_conv.taps', Conv()),
    ('A_log', 'A_log', Same()),
    ('dt_bias', 'dt_bias', Same()),
    ('norm.weight', 'norm.scale', Same()),
    ('out_proj.weight', 'o.w', Linear(inward=2)),
  )


def _rules(layer, fused=False):
  of_mixer = (
    common.make_attention_rules(layer.mixer)
    if isinstance(layer.mixer, AttentionConfig)
    else _delta_rules(layer.mixer, fused)
  )
  of_ffn = common.make_ffn_rules(layer.ffn, shared='shared_expert')
  return *common.NORMS, *of_mixer, *of_ffn


_next_rules = partial(_rules, fused=True)


def _mtp_layer(cfg: ModelConfig) -> Layer:
  return next(
    layer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)
  )


def _mtp_rules(cfg: ModelConfig) -> Rules:
  return (
    make_rule('mtp.fc.weight', 'mtp.proj.w', Linear()),
    make_rule('mtp.pre_fc_norm_embedding.weight', 'mtp.embed_norm.scale'),
    make_rule('mtp.pre_fc_norm_hidden.weight', 'mtp.hidden_norm.scale'),
    make_rule('mtp.norm.weight', 'mtp.norm.scale'),
    *common.move_rules(_next_rules(cfg.mtp), 'mtp.layers.0.', 'mtp.layer.'),
  )


_MTP = Mtp(lambda cfg: 'mtp.fc.weight', _mtp_layer, _mtp_rules, lambda cfg: ())

_OTHERS = (r'mtp\..*', r'model\.visual\..*')

_KINDS = {'layer_types takes precedence': 'full_attention_interval'}
_EXPERTS = {'dense layers, of which there are none': 'intermediate_size'}
_AROUND = {
  'images and videos': (
    'vision_config image_token_id video_token_id vision_start_token_id'
    ' vision_end_token_id language_model_only'
  ),
  'text has one position on all three axes': (
    'rope_parameters.mrope_section rope_parameters.mrope_interleaved'
  ),
  'multi-token prediction, ignored': (
    'mtp_num_hidden_layers mtp_use_dedicated_embeddings'
  ),
  'dtype of states, float32 here': 'mamba_ssm_dtype',
}

FAMILIES = (
  Family(
    'qwen3_next',
    ('qwen3_next',),
    'Qwen3NextForCausalLM',
    lambda keys: _read(keys, _moe(keys, top=10)),
    _write_next,
    (_next_rules,),
    mtp=_MTP,
    harmless=_KINDS | _EXPERTS,
  ),
  Family(
    'qwen3_5',
    ('qwen3_5_text', 'qwen3_5'),
    'Qwen3_5ForCausalLM',
    lambda keys: _read(keys, common.read_mlp(keys), kv_heads=4),
    _write_3_5,
    (_rules,),
    ignored=_OTHERS,
    harmless=_KINDS | _AROUND,
  ),
  Family(
    'qwen3_5_moe',
    ('qwen3_5_moe_text', 'qwen3_5_moe'),
    'Qwen3_5MoeForCausalLM',
    lambda keys: _read(keys, _moe(keys, top=8)),
    _write_3_5,
    (lambda layer: stack_experts(_rules(layer)), _rules),
    ignored=_OTHERS,
    harmless=_KINDS | _EXPERTS | _AROUND,
  ),
)
