"""MiniMax-Text-01 and MiniMax-M1."""

import math
from functools import partial
from typing import Any

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import (
  Layer,
  ModelConfig,
  MoEConfig,
  Residual,
)
from deltanet_jax.config.mixers import AttentionConfig, LightningConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import KINDS, ConfigKeys, get_agreed
from deltanet_jax.hf.layout import Linear, Rules, Same
from deltanet_jax.hf.names import Json

_EPS = 1e-5  # default


def _residual(keys: ConfigKeys, kind: str) -> Residual:
  def read(branch: str, factor: str) -> float:
    # the second spelling is that of transformers
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


def _read(keys: ConfigKeys) -> ModelConfig:
  keys.require('postnorm', True)
  keys.require('shared_intermediate_size', 0, default=0)
  keys.without('sliding_window', 'attention_bias')
  attention = common.read_attention(
    keys,
    kv_heads=8,
    eps=_EPS,
    positions=partial(rope.read_positions, theta=1e6, rotary_dim=True),
  )
  # its norm has the fixed epsilon of the class
  lightning = LightningConfig(
    attention.heads, attention.head_dim, norm_eps=1e-6
  )
  ffn = MoEConfig(
    experts=keys.size('num_local_experts', 'num_experts'),
    top=keys.size('num_experts_per_tok', default=2),
    hidden=keys.size('intermediate_size'),
  )
  kinds = {
    False: Layer(lightning, ffn, _residual(keys, 'linear')),
    True: Layer(attention, ffn, _residual(keys, 'full')),
  }
  lists: dict[str, dict[Any, bool]] = {
    'attn_type_list': {0: False, 1: True},
    'layer_types': KINDS,
  }
  full = get_agreed(
    lambda keys, name: keys.kinds(name, lists[name]),
    [(keys, name) for name in lists],
    None,
  )
  if full is None:
    keys.refuse('attn_type_list', None, 'a list of 0 and 1, one per layer')
  return common.make_model_config(keys, [kinds[x] for x in full], eps=_EPS)


def _write(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  ffn = common.find_part(cfg, MoEConfig)
  settings: Json = {
    **common.write_attention(attention),
    'rotary_dim': attention.rotary_dim,
    **rope.write_positions(attention),
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
    settings[f'layernorm_{branch}_alpha'] = residual.alpha
    settings[f'layernorm_{branch}_beta'] = residual.beta
  return settings


def _lightning_rules(cfg: LightningConfig) -> Rules:
  return common.make_mixer_rules(
    common.ATTENTION,
    ('qkv_proj.weight', 'q.w k.w v.w', Linear(groups=cfg.heads)),
    ('norm.weight', 'norm.scale', Same()),
    ('output_gate.weight', 'gate.w', Linear()),
    ('out_proj.weight', 'o.w', Linear(inward=2)),
  )


def _rules(layer):
  is_full = isinstance(layer.mixer, AttentionConfig)
  of_mixer = common.make_attention_rules if is_full else _lightning_rules
  return (
    *common.NORMS,
    *of_mixer(layer.mixer),
    *common.make_ffn_rules(layer.ffn, common.NUMBERED),
  )


FAMILIES = (
  Family(
    'minimax_m1',
    ('minimax_m1', 'minimax_text_01'),
    'MiniMaxM1ForCausalLM',
    _read,
    _write,
    (_rules,),
    harmless={
      'how the function is computed': 'block_size',
      'shared experts, of which there are none': 'shared_moe_mode',
      'context limit, not enforced': 'max_model_len',
    },
  ),
)
