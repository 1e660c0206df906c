"""Qwen3-Next, and Qwen3.5 dense and mixture of experts (text)."""

from functools import partial

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  GatedDeltaNetConfig,
)
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import (
  Conv,
  Linear,
  Rules,
  Same,
  TensorRule,
  make_rule,
  stack_experts,
)
from deltanet_jax.hf.names import Json

_DELTA = f'{LAYER}linear_attn.'
_MLP = f'{LAYER}mlp.'


def _read(
  keys: ConfigKeys, ffn: MLPConfig | MoEConfig, kv_heads: int = 2
) -> ModelConfig:
  keys.require('attention_bias', False, default=False)
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  # released files say these, and the classes compute nothing else
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
    # Qwen3.5 has no such key: it always renormalizes
    renormalize=keys.flag('norm_topk_prob', default=True),
    shared=keys.size('shared_expert_intermediate_size'),
    shared_gate=True,
  )


def _read_next(keys: ConfigKeys) -> ModelConfig:
  return _read(keys, _moe(keys, top=10))


def _read_dense(keys: ConfigKeys) -> ModelConfig:
  return _read(keys, common.read_mlp(keys), kv_heads=4)


def _read_moe(keys: ConfigKeys) -> ModelConfig:
  return _read(keys, _moe(keys, top=8))


def _write(cfg: ModelConfig, model_type: str, architecture: str) -> Json:
  attention = common.find_mixer(cfg, AttentionConfig)
  delta = common.find_mixer(cfg, GatedDeltaNetConfig)
  settings = common.write_top_keys(cfg, model_type, architecture) | {
    **common.write_attention(attention),
    'attention_bias': False,
    **common.write_delta(delta),
    'layer_types': common.write_layer_types(cfg, AttentionConfig),
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
  attention = common.find_mixer(cfg, AttentionConfig)
  settings = _write(cfg, 'qwen3_next', 'Qwen3NextForCausalLM') | {
    **rope.write_positions(attention),
    'partial_rotary_factor': attention.rotary_dim / attention.head_dim,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }
  kinds = common.write_layer_types(cfg, AttentionConfig)
  every = kinds.index('full_attention') + 1
  if kinds == [kinds[i % every] for i in range(len(kinds))]:
    del settings['layer_types']
    settings['full_attention_interval'] = every
  return settings


def _write_3_5(cfg: ModelConfig, model_type: str, architecture: str) -> Json:
  attention = common.find_mixer(cfg, AttentionConfig)
  return _write(cfg, model_type, architecture) | {
    'rope_parameters': rope.write_parameters(
      attention,
      partial_rotary_factor=attention.rotary_dim / attention.head_dim,
    )
  }


def _write_dense(cfg: ModelConfig) -> Json:
  return _write_3_5(cfg, 'qwen3_5_text', 'Qwen3_5ForCausalLM')


def _write_moe(cfg: ModelConfig) -> Json:
  return _write_3_5(cfg, 'qwen3_5_moe_text', 'Qwen3_5MoeForCausalLM')


def _delta_rules(*projections: TensorRule) -> Rules:
  return (
    *projections,
    make_rule(
      f'{_DELTA}conv1d.weight',
      'mixer.q_conv.taps mixer.k_conv.taps mixer.v_conv.taps',
      Conv(),
    ),
    make_rule(f'{_DELTA}A_log', 'mixer.A_log', Same()),
    make_rule(f'{_DELTA}dt_bias', 'mixer.dt_bias', Same()),
    make_rule(f'{_DELTA}norm.weight', 'mixer.norm.scale', Same()),
    make_rule(f'{_DELTA}out_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )


def _next_mixer(mixer):
  if isinstance(mixer, AttentionConfig):
    return common.make_attention_rules(mixer)
  fused = Linear(groups=mixer.key_heads)
  return _delta_rules(
    make_rule(
      f'{_DELTA}in_proj_qkvz.weight',
      'mixer.q.w mixer.k.w mixer.v.w mixer.gate.w',
      fused,
    ),
    make_rule(f'{_DELTA}in_proj_ba.weight', 'mixer.b.w mixer.a.w', fused),
  )


def _mixer(mixer):
  if isinstance(mixer, AttentionConfig):
    return common.make_attention_rules(mixer)
  return _delta_rules(
    make_rule(
      f'{_DELTA}in_proj_qkv.weight', 'mixer.q.w mixer.k.w mixer.v.w', Linear()
    ),
    make_rule(f'{_DELTA}in_proj_z.weight', 'mixer.gate.w', Linear()),
    make_rule(f'{_DELTA}in_proj_b.weight', 'mixer.b.w', Linear()),
    make_rule(f'{_DELTA}in_proj_a.weight', 'mixer.a.w', Linear()),
  )


def _single_experts(ffn: MoEConfig) -> Rules:
  return common.make_moe_rules(
    ffn, _MLP, common.PROJECTIONS, shared='shared_expert'
  )


def _next_rules(layer):
  return (*common.NORMS, *_next_mixer(layer.mixer), *_single_experts(layer.ffn))


def _dense_rules(layer):
  return *common.NORMS, *_mixer(layer.mixer), *common.make_mlp_rules()


def _moe_rules(layer):
  return stack_experts(_moe_rules_single(layer))


def _moe_rules_single(layer):
  return *common.NORMS, *_mixer(layer.mixer), *_single_experts(layer.ffn)


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

_KINDS = {'layer_types says it, where there is one': 'full_attention_interval'}
_EXPERTS = {'of dense layers, and every layer has experts': 'intermediate_size'}
_AROUND = {
  'of images and videos, beside the text': (
    'vision_config image_token_id video_token_id vision_start_token_id'
    ' vision_end_token_id language_model_only'
  ),
  'text has one position for all three': (
    'rope_parameters.mrope_section rope_parameters.mrope_interleaved'
  ),
  'this prediction is ignored': (
    'mtp_num_hidden_layers mtp_use_dedicated_embeddings'
  ),
  'states are float32 here': 'mamba_ssm_dtype',
}

NEXT = Family(
  'qwen3_next',
  ('qwen3_next',),
  _read_next,
  _write_next,
  common.make_top_rules,
  (_next_rules,),
  mtp=_MTP,
  harmless=_KINDS | _EXPERTS,
)
DENSE = Family(
  'qwen3_5',
  ('qwen3_5', 'qwen3_5_text'),
  _read_dense,
  _write_dense,
  common.make_top_rules,
  (_dense_rules,),
  ignored=_OTHERS,
  harmless=_KINDS | _AROUND,
)
MOE = Family(
  'qwen3_5_moe',
  ('qwen3_5_moe', 'qwen3_5_moe_text'),
  _read_moe,
  _write_moe,
  common.make_top_rules,
  (_moe_rules, _moe_rules_single),
  ignored=_OTHERS,
  harmless=_KINDS | _EXPERTS | _AROUND,
)
FAMILIES = (NEXT, DENSE, MOE)
