"""Olmo Hybrid.

Names of the norms: of attention layers post_attention_layernorm and
post_feedforward_layernorm, of the others attention_layer_norm and
feedforward_layer_norm, as the script writes them that made the release
(convert_olmo_hybrid_weights_to_hf.py of transformers).
"""

from deltanet_jax.experiment import Layer, MLPConfig, Residual
from deltanet_jax.hf import common
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.hf.layout import Conv, Linear, Same, rule
from deltanet_jax.mixers.config import AttentionConfig, GatedDeltaNetConfig

_DELTA = f'{LAYER}linear_attn.'


def _read(keys):
  keys.require('attention_bias', False, default=False)
  width = common.head_dim(keys)
  theta = keys.found.get('rope_parameters', {}).get('rope_theta')
  attention = AttentionConfig(
    heads=keys.get('num_attention_heads'),
    kv_heads=keys.get('num_key_value_heads'),
    head_dim=width,
    rotary_dim=0 if theta is None else width,
    rope_theta=1e4 if theta is None else theta,
    qk_norm=True,
    joint_norm=True,
    norm_eps=keys.get('rms_norm_eps'),
  )
  delta = GatedDeltaNetConfig(
    key_heads=keys.get('linear_num_key_heads'),
    value_heads=keys.get('linear_num_value_heads'),
    key_dim=keys.get('linear_key_head_dim'),
    value_dim=keys.get('linear_value_head_dim'),
    conv=keys.get('linear_conv_kernel_dim'),
    negative_eigenvalues=keys.get('linear_allow_neg_eigval'),
    norm_eps=1e-5,  # its class's, not the configuration's
  )
  ffn = common.mlp(keys)
  layers = [
    Layer(attention, ffn, Residual('post')) if full else Layer(delta, ffn)
    for full in keys.full_attention()
  ]
  return common.model_config(keys, layers)


def _write(cfg):
  attention = common.of_kind(cfg, AttentionConfig)
  delta = common.of_kind(cfg, GatedDeltaNetConfig)
  theta = attention.rope_theta if attention.rotary_dim else None
  return common.top_keys(cfg, 'olmo_hybrid', 'OlmoHybridForCausalLM') | {
    'intermediate_size': common.ffn_of_kind(cfg, MLPConfig).hidden,
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': theta},
    'attention_bias': False,
    'linear_num_key_heads': delta.key_heads,
    'linear_num_value_heads': delta.value_heads,
    'linear_key_head_dim': delta.key_dim,
    'linear_value_head_dim': delta.value_dim,
    'linear_conv_kernel_dim': delta.conv,
    'linear_allow_neg_eigval': delta.negative_eigenvalues,
    'layer_types': common.layer_types(cfg, AttentionConfig),
  }


def _rules(layer):
  if isinstance(layer.mixer, AttentionConfig):
    return (
      rule(f'{LAYER}post_attention_layernorm.weight', 'mixer_norm.scale'),
      rule(f'{LAYER}post_feedforward_layernorm.weight', 'ffn_norm.scale'),
      *common.attention_rules(layer.mixer),
      *common.mlp_rules(),
    )
  linear = {
    'q': 'q',
    'k': 'k',
    'v': 'v',
    'a': 'a',
    'b': 'b',
    'g': 'gate',
  }
  return (
    rule(f'{LAYER}attention_layer_norm.weight', 'mixer_norm.scale'),
    rule(f'{LAYER}feedforward_layer_norm.weight', 'ffn_norm.scale'),
    *(
      rule(f'{_DELTA}{released}_proj.weight', f'mixer.{ours}.w', Linear())
      for released, ours in linear.items()
    ),
    *(
      rule(f'{_DELTA}{x}_conv1d.weight', f'mixer.{x}_conv.taps', Conv())
      for x in 'qkv'
    ),
    rule(f'{_DELTA}A_log', 'mixer.A_log', Same()),
    rule(f'{_DELTA}dt_bias', 'mixer.dt_bias', Same()),
    rule(f'{_DELTA}o_norm.weight', 'mixer.norm.scale', Same()),
    rule(f'{_DELTA}o_proj.weight', 'mixer.o.w', Linear(inward=2)),
    *common.mlp_rules(),
  )


FAMILY = Family(
  'olmo_hybrid',
  ('olmo_hybrid',),
  _read,
  _write,
  common.top_rules,
  (_rules,),
  # what transformers' save_pretrained makes of the attention layers' norm
  spellings=((r'\.post_attention_layernorm\.', '.feedforward_layer_norm.'),),
)
