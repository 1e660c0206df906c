"""Qwen3-Next, and Qwen3.5 dense and mixture of experts (text)."""

from deltanet_jax.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.hf import common
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.layout import Conv, Linear, Same, rule, stacked
from deltanet_jax.mixers.config import AttentionConfig, GatedDeltaNetConfig

_DELTA = f'{LAYER}linear_attn.'
_MLP = f'{LAYER}mlp.'


def _read(keys, ffn):
  keys.require('attention_bias', False, default=False)
  keys.no_scaling()
  width, eps = common.head_dim(keys), keys.get('rms_norm_eps')
  attention = AttentionConfig(
    heads=keys.get('num_attention_heads'),
    kv_heads=keys.get('num_key_value_heads'),
    head_dim=width,
    rotary_dim=keys.rotary_dim(width),
    rope_theta=keys.theta(),
    qk_norm=True,
    gate=True,
    norm_eps=eps,
  )
  delta = GatedDeltaNetConfig(
    key_heads=keys.get('linear_num_key_heads'),
    value_heads=keys.get('linear_num_value_heads'),
    key_dim=keys.get('linear_key_head_dim'),
    value_dim=keys.get('linear_value_head_dim'),
    conv=keys.get('linear_conv_kernel_dim'),
    norm_eps=eps,
  )
  layers = [
    Layer(attention if full else delta, ffn) for full in keys.full_attention()
  ]
  return common.model_config(keys, layers, zero_centred=True)


def _moe(keys):
  # Qwen3.5 has no such key: it always renormalises
  renormalise = keys.get('norm_topk_prob', default=True)
  return MoEConfig(
    experts=keys.get('num_experts', 'num_local_experts'),
    top=keys.get('num_experts_per_tok'),
    hidden=keys.get('moe_intermediate_size'),
    renormalise=renormalise,
    shared=keys.get('shared_expert_intermediate_size'),
    shared_gate=True,
  )


def _read_next(keys):
  keys.require('decoder_sparse_step', 1, default=1)
  keys.require('mlp_only_layers', [], None, default=[])
  return _read(keys, _moe(keys))


def _read_dense(keys):
  return _read(keys, common.mlp(keys))


def _read_moe(keys):
  return _read(keys, _moe(keys))


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
    'rope_theta': attention.rope_theta,
    'partial_rotary_factor': attention.rotary_dim / attention.head_dim,
    'rope_scaling': None,
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
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': attention.rope_theta,
      'partial_rotary_factor': attention.rotary_dim / attention.head_dim,
    }
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

NEXT = Family(
  'qwen3_next',
  ('qwen3_next',),
  _read_next,
  _write_next,
  common.top_rules,
  (_next_rules,),
  mtp=_MTP,
)
DENSE = Family(
  'qwen3_5',
  ('qwen3_5', 'qwen3_5_text'),
  _read_dense,
  _write_dense,
  common.top_rules,
  (_dense_rules,),
  ignored=_OTHERS,
)
MOE = Family(
  'qwen3_5_moe',
  ('qwen3_5_moe', 'qwen3_5_moe_text'),
  _read_moe,
  _write_moe,
  common.top_rules,
  (_moe_rules, _moe_rules_single),
  ignored=_OTHERS,
)
