"""MiniMax-Text-01 and MiniMax-M1."""

from deltanet_jax.config import ConfigError
from deltanet_jax.experiment import Layer, MoEConfig, Residual
from deltanet_jax.hf import common
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.hf.layout import Linear, Same, rule
from deltanet_jax.mixers.config import AttentionConfig, LightningConfig

_ATTENTION = f'{LAYER}self_attn.'


def _residual(keys, kind):
  read = lambda branch, factor: keys.get(f'layernorm_{branch}_{factor}')
  mixer, ffn = (
    (read(branch, 'alpha'), read(branch, 'beta'))
    for branch in (f'{kind}_attention', 'mlp')
  )
  if mixer != ffn:
    raise ConfigError(
      f'{keys.where}: layernorm_{kind}_attention alpha and beta {mixer} differ'
      f" from the mlp's {ffn}; only equal ones are supported"
    )
  return Residual('normed', *mixer)


def _read(keys):
  keys.require('postnorm', True)
  keys.require('shared_intermediate_size', 0, default=0)
  keys.no_scaling()
  heads, width = keys.get('num_attention_heads'), common.head_dim(keys)
  attention = AttentionConfig(
    heads=heads,
    kv_heads=keys.get('num_key_value_heads'),
    head_dim=width,
    rotary_dim=keys.rotary_dim(width),
    rope_theta=keys.theta(),
    norm_eps=keys.get('rms_norm_eps'),
  )
  # its norm takes its class's epsilon and not the configuration's
  lightning = LightningConfig(heads=heads, head_dim=width, norm_eps=1e-6)
  ffn = MoEConfig(
    experts=keys.get('num_local_experts'),
    top=keys.get('num_experts_per_tok'),
    hidden=keys.get('intermediate_size'),
  )
  kinds = {
    0: Layer(lightning, ffn, _residual(keys, 'linear')),
    1: Layer(attention, ffn, _residual(keys, 'full')),
  }
  layers = [kinds[kind] for kind in keys.get('attn_type_list')]
  if len(layers) != keys.get('num_hidden_layers'):
    raise ConfigError(
      f'{keys.where}: {len(layers)} attn_type_list for num_hidden_layers'
      f' {keys.get("num_hidden_layers")}'
    )
  return common.model_config(keys, layers)


def _write(cfg):
  attention = common.of_kind(cfg, AttentionConfig)
  ffn = common.ffn_of_kind(cfg, MoEConfig)
  found = common.top_keys(cfg, 'minimax_m1', 'MiniMaxM1ForCausalLM') | {
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': attention.head_dim,
    'rotary_dim': attention.rotary_dim,
    'rope_theta': attention.rope_theta,
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
)
