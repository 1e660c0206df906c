"""MiniMax-Text-01 and MiniMax-M1."""

import math

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, MoEConfig, Residual
from deltanet_jax.config.mixers import AttentionConfig, LightningConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.hf.keys import KINDS, agreed
from deltanet_jax.hf.layout import Linear, Same, rule

_ATTENTION = f'{LAYER}self_attn.'
_EPS = 1e-5  # where the file has none


def _residual(keys, kind):
  def read(branch, factor):
    # the second as transformers' class, and what it was made from, spell it
    other = branch.replace('attention', 'attn')
    return keys.number(
      f'layernorm_{branch}_{factor}',
      f'{other}_{factor}_factor',
      default=1.0,
      above=-math.inf,
    )

  mixer, ffn = (
    (read(branch, 'alpha'), read(branch, 'beta'))
    for branch in (f'{kind}_attention', 'mlp')
  )
  if mixer != ffn:
    raise ConfigError(
      f'{keys.where}: layernorm_{kind}_attention_alpha,'
      f' layernorm_{kind}_attention_beta are {mixer} and layernorm_mlp_alpha,'
      f' layernorm_mlp_beta {ffn}; only equal ones are supported'
    )
  return Residual('normed', *mixer)


def _read(keys):
  keys.require('postnorm', True)
  keys.require('shared_intermediate_size', 0, default=0)
  keys.without('sliding_window', 'attention_bias')
  heads = common.heads(keys, kv_heads=8)
  width = heads['head_dim']
  attention = AttentionConfig(
    **heads,
    **rope.read(keys, width, theta=1e6, rotary_dim=True),
    norm_eps=keys.number('rms_norm_eps', default=_EPS),
  )
  # its norm takes its class's epsilon and not the configuration's
  lightning = LightningConfig(heads['heads'], width, norm_eps=1e-6)
  ffn = MoEConfig(
    experts=keys.size('num_local_experts', 'num_experts'),
    top=keys.size('num_experts_per_tok', default=2),
    hidden=keys.size('intermediate_size'),
  )
  kinds = {
    False: Layer(lightning, ffn, _residual(keys, 'linear')),
    True: Layer(attention, ffn, _residual(keys, 'full')),
  }
  names = {'attn_type_list': {0: False, 1: True}, 'layer_types': KINDS}
  full = agreed(
    lambda keys, name: keys.kinds(name, names[name]),
    [(keys, name) for name in names],
    None,
  )
  if full is None:
    keys.refuse('attn_type_list', None, 'a list of 0 and 1, one for each layer')
  return common.model_config(keys, [kinds[x] for x in full], eps=_EPS)


def _write(cfg):
  attention = common.of_kind(cfg, AttentionConfig)
  ffn = common.ffn_of_kind(cfg, MoEConfig)
  found = common.top_keys(cfg, 'minimax_m1', 'MiniMaxM1ForCausalLM') | {
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
    'rotary_dim': attention.rotary_dim,
    **rope.write(attention),
    'num_local_experts': ffn.experts,
    'num_experts_per_tok': ffn.top,
    'intermediate_size': ffn.hidden,
    'shared_intermediate_size': 0,
    'postnorm': True,
    'attn_type_list': [
      int(isinstance(layer.mixer, AttentionConfig)) for layer in cfg.layers
    ],
  }
  residual = cfg.layers[0].residual
  for branch in ('linear_attention', 'full_attention', 'mlp'):
    found[f'layernorm_{branch}_alpha'] = residual.alpha
    found[f'layernorm_{branch}_beta'] = residual.beta
  return found


def _lightning_rules(cfg):
  return (
    rule(
      f'{_ATTENTION}qkv_proj.weight',
      'mixer.q.w mixer.k.w mixer.v.w',
      Linear(groups=cfg.heads),
    ),
    rule(f'{_ATTENTION}norm.weight', 'mixer.norm.scale', Same()),
    rule(f'{_ATTENTION}output_gate.weight', 'mixer.gate.w', Linear()),
    rule(f'{_ATTENTION}out_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )


def _rules(layer):
  of_mixer = (
    common.attention_rules
    if isinstance(layer.mixer, AttentionConfig)
    else _lightning_rules
  )
  return (
    *common.NORMS,
    *of_mixer(layer.mixer),
    *common.moe_rules(layer.ffn, f'{LAYER}block_sparse_moe.', common.NUMBERED),
  )


FAMILY = Family(
  'minimax_m1',
  ('minimax_m1', 'minimax_text_01'),
  _read,
  _write,
  common.top_rules,
  (_rules,),
  harmless={
    'how it is computed, not what': 'block_size',
    'of shared experts, and there are none': 'shared_moe_mode',
    'no context is refused': 'max_model_len',
  },
)
