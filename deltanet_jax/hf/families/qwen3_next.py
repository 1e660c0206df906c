"""Qwen3-Next, and Qwen3.5 dense and mixture of experts (text)."""

from deltanet_jax.config.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.layout import Conv, Linear, Same, rule, stacked

_DELTA = f'{LAYER}linear_attn.'
_MLP = f'{LAYER}mlp.'


def _read(keys, ffn, kv_heads=2):
  keys.require('attention_bias', False, default=False)
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  # released files say these, and the classes compute nothing else
  keys.require('attn_output_gate', True, default=True)
  keys.require('output_gate_type', 'swish', 'silu', default='swish')
  heads = common.heads(keys, kv_heads, width=256)
  eps = keys.number('rms_norm_eps', default=1e-6)
  attention = AttentionConfig(
    **heads,
    **rope.read(keys, heads['head_dim'], share=0.25),
    qk_norm=True,
    gate=True,
    norm_eps=eps,
  )
  delta = GatedDeltaNetConfig(
    key_heads=keys.size('linear_num_key_heads'),
    value_heads=keys.size('linear_num_value_heads'),
    key_dim=keys.size('linear_key_head_dim'),
    value_dim=keys.size('linear_value_head_dim'),
    conv=keys.size('linear_conv_kernel_dim', default=4),
    norm_eps=eps,
  )
  layers = [
    Layer(attention if full else delta, ffn) for full in keys.full_attention()
  ]
  return common.model_config(keys, layers, zero_centred=True)


def _moe(keys, top):
  return MoEConfig(
    experts=keys.size('num_experts', 'num_local_experts'),
    top=keys.size('num_experts_per_tok', default=top),
    hidden=keys.size('moe_intermediate_size'),
    # Qwen3.5 has no such key: it always renormalises
    renormalise=keys.flag('norm_topk_prob', default=True),
    shared=keys.size('shared_expert_intermediate_size'),
    shared_gate=True,
  )


def _read_next(keys):
  return _read(keys, _moe(keys, top=10))


def _read_dense(keys):
  return _read(keys, common.mlp(keys), kv_heads=4)


def _read_moe(keys):
  return _read(keys, _moe(keys, top=8))


def _write(cfg, model_type, architecture):
  attention = common.of_kind(cfg, AttentionConfig)
  delta = common.of_kind(cfg, GatedDeltaNetConfig)
  found = common.top_keys(cfg, model_type, architecture) | {
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
    'attention_bias': False,
    'linear_num_key_heads': delta.key_heads,
    'linear_num_value_heads': delta.value_heads,
    'linear_key_head_dim': delta.key_dim,
    'linear_value_head_dim': delta.value_dim,
    'linear_conv_kernel_dim': delta.conv,
    'layer_types': common.layer_types(cfg, AttentionConfig),
  }
  ffn = common.ffn_of_kind(cfg, MoEConfig)
  if ffn is None:
    dense = common.ffn_of_kind(cfg, MLPConfig)
    return found | {'intermediate_size': dense.hidden}
  return found | {
    'num_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'moe_intermediate_size': ffn.hidden,
    'shared_expert_intermediate_size': ffn.shared,
    'norm_topk_prob': ffn.renormalise,
  }


def _write_next(cfg):
  attention = common.of_kind(cfg, AttentionConfig)
  found = _write(cfg, 'qwen3_next', 'Qwen3NextForCausalLM') | {
    **rope.write(attention),
    'partial_rotary_factor': attention.rotary_dim / attention.head_dim,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }
  kinds = found['layer_types']
  every = kinds.index('full_attention') + 1
  if kinds == [kinds[i % every] for i in range(len(kinds))]:
    del found['layer_types']
    found['full_attention_interval'] = every
  return found


def _write_3_5(cfg, model_type, architecture):
  attention = common.of_kind(cfg, AttentionConfig)
  return _write(cfg, model_type, architecture) | {
    'rope_parameters': rope.write_parameters(
      attention,
      partial_rotary_factor=attention.rotary_dim / attention.head_dim,
    )
  }


def _write_dense(cfg):
  return _write_3_5(cfg, 'qwen3_5_text', 'Qwen3_5ForCausalLM')


def _write_moe(cfg):
  return _write_3_5(cfg, 'qwen3_5_moe_text', 'Qwen3_5MoeForCausalLM')


def _delta_rules(*projections):
  return (
    *projections,
    rule(
      f'{_DELTA}conv1d.weight',
      'mixer.q_conv.taps mixer.k_conv.taps mixer.v_conv.taps',
      Conv(),
    ),
    rule(f'{_DELTA}A_log', 'mixer.A_log', Same()),
    rule(f'{_DELTA}dt_bias', 'mixer.dt_bias', Same()),
    rule(f'{_DELTA}norm.weight', 'mixer.norm.scale', Same()),
    rule(f'{_DELTA}out_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )


def _next_mixer(mixer):
  if isinstance(mixer, AttentionConfig):
    return common.attention_rules(mixer)
  fused = Linear(groups=mixer.key_heads)
  return _delta_rules(
    rule(
      f'{_DELTA}in_proj_qkvz.weight',
      'mixer.q.w mixer.k.w mixer.v.w mixer.gate.w',
      fused,
    ),
    rule(f'{_DELTA}in_proj_ba.weight', 'mixer.b.w mixer.a.w', fused),
  )


def _mixer(mixer):
  if isinstance(mixer, AttentionConfig):
    return common.attention_rules(mixer)
  return _delta_rules(
    rule(
      f'{_DELTA}in_proj_qkv.weight', 'mixer.q.w mixer.k.w mixer.v.w', Linear()
    ),
    rule(f'{_DELTA}in_proj_z.weight', 'mixer.gate.w', Linear()),
    rule(f'{_DELTA}in_proj_b.weight', 'mixer.b.w', Linear()),
    rule(f'{_DELTA}in_proj_a.weight', 'mixer.a.w', Linear()),
  )


def _single_experts(ffn):
  return common.moe_rules(ffn, _MLP, common.PROJECTIONS, shared='shared_expert')


def _next_rules(layer):
  return (*common.NORMS, *_next_mixer(layer.mixer), *_single_experts(layer.ffn))


def _dense_rules(layer):
  return *common.NORMS, *_mixer(layer.mixer), *common.mlp_rules()


def _moe_rules(layer):
  return stacked(_moe_rules_single(layer))


def _moe_rules_single(layer):
  return *common.NORMS, *_mixer(layer.mixer), *_single_experts(layer.ffn)


def _mtp_layer(cfg):
  return next(
    layer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)
  )


def _mtp_rules(cfg):
  return (
    rule('mtp.fc.weight', 'mtp.proj.w', Linear()),
    rule('mtp.pre_fc_norm_embedding.weight', 'mtp.embed_norm.scale'),
    rule('mtp.pre_fc_norm_hidden.weight', 'mtp.hidden_norm.scale'),
    rule('mtp.norm.weight', 'mtp.norm.scale'),
    *common.moved(_next_rules(cfg.mtp), 'mtp.layers.0.', 'mtp.layer.'),
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
  common.top_rules,
  (_next_rules,),
  mtp=_MTP,
  harmless=_KINDS | _EXPERTS,
)
DENSE = Family(
  'qwen3_5',
  ('qwen3_5', 'qwen3_5_text'),
  _read_dense,
  _write_dense,
  common.top_rules,
  (_dense_rules,),
  ignored=_OTHERS,
  harmless=_KINDS | _AROUND,
)
MOE = Family(
  'qwen3_5_moe',
  ('qwen3_5_moe', 'qwen3_5_moe_text'),
  _read_moe,
  _write_moe,
  common.top_rules,
  (_moe_rules, _moe_rules_single),
  ignored=_OTHERS,
  harmless=_KINDS | _EXPERTS | _AROUND,
)
