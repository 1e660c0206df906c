"""Kimi Linear.

The experts' weights are the sigmoid scores without the bias that chooses them,
as in transformers and in arXiv:2408.15664. The modeling_kimi.py beside the
released weights adds the bias to the scores in place before it gathers them, so
that its weights contain the bias: an alias rather than a method, absent from
Kimi K3's file. Its outputs differ from these by that.
"""

from deltanet_jax.config import ConfigError
from deltanet_jax.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.hf import common, latent
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.hf.layout import Conv, Flat, Linear, Same, rule
from deltanet_jax.mixers.config import KDAConfig, MLAConfig

_AT = latent.ATTENTION


def _moe(keys):
  keys.require('moe_router_activation_func', 'sigmoid', default='sigmoid')
  keys.require('moe_layer_freq', 1, default=1)
  width = keys.get('moe_intermediate_size')
  return MoEConfig(
    experts=keys.get('num_experts', 'num_local_experts'),
    top=keys.get('num_experts_per_token', 'num_experts_per_tok'),
    hidden=width,
    score='sigmoid',
    bias=True,
    groups=keys.get('num_expert_group', 'n_group'),
    top_groups=keys.get('topk_group'),
    renormalise=keys.get('moe_renormalize', 'norm_topk_prob'),
    eps=1e-20,
    scale=keys.get('routed_scaling_factor'),
    shared=width * keys.get('num_shared_experts', 'n_shared_experts'),
  )


def _read(keys):
  keys.require('mla_use_nope', True, default=True)
  linear = keys.get('linear_attn_config')
  count = keys.get('num_hidden_layers')
  # the lists count layers from one
  full, delta = (set(linear[k]) for k in ('full_attn_layers', 'kda_layers'))
  if full | delta != set(range(1, count + 1)) or full & delta:
    raise ConfigError(
      f'{keys.where}: full_attn_layers and kda_layers do not name each of'
      f' layers 1 to {count} once'
    )
  mla = MLAConfig(**latent.read(keys), rotary=False)
  kda = KDAConfig(
    heads=linear['num_heads'],
    key_dim=linear['head_dim'],
    value_dim=linear['head_dim'],
    conv=linear['short_conv_kernel_size'],
    norm_eps=keys.get('rms_norm_eps'),
  )
  dense, moe = common.mlp(keys), _moe(keys)
  first = keys.get('first_k_dense_replace')
  layers = [
    Layer(mla if i + 1 in full else kda, dense if i < first else moe)
    for i in range(count)
  ]
  return common.model_config(keys, layers)


def _write(cfg):
  mla = common.of_kind(cfg, MLAConfig)
  kda = common.of_kind(cfg, KDAConfig)
  dense = common.ffn_of_kind(cfg, MLPConfig)
  moe = common.ffn_of_kind(cfg, MoEConfig)
  at = lambda kind: [
    i + 1 for i, layer in enumerate(cfg.layers) if isinstance(layer.mixer, kind)
  ]
  found = common.top_keys(cfg, 'kimi_linear', 'KimiLinearForCausalLM')
  return (
    found
    | latent.write(mla)
    | {
      'mla_use_nope': not mla.rotary,
      'linear_attn_config': {
        'full_attn_layers': at(MLAConfig),
        'kda_layers': at(KDAConfig),
        'head_dim': kda.key_dim,
        'num_heads': kda.heads,
        'short_conv_kernel_size': kda.conv,
      },
      'intermediate_size': dense.hidden,
      'first_k_dense_replace': sum(
        isinstance(layer.ffn, MLPConfig) for layer in cfg.layers
      ),
      'num_experts': moe.experts,
      'num_experts_per_token': moe.top,
      'moe_intermediate_size': moe.hidden,
      'num_shared_experts': moe.shared // moe.hidden,
      'num_expert_group': moe.groups,
      'topk_group': moe.top_groups,
      'moe_renormalize': moe.renormalise,
      'routed_scaling_factor': moe.scale,
      'moe_router_activation_func': 'sigmoid',
      'moe_layer_freq': 1,
    }
  )


def _delta_rules():
  linear = {
    'q_proj': 'q',
    'k_proj': 'k',
    'v_proj': 'v',
    'b_proj': 'b',
    'f_a_proj': 'f_a',
    'f_b_proj': 'f_b',
    'g_a_proj': 'gate_a',
    'g_b_proj': 'gate_b',
  }
  return (
    *(
      rule(f'{_AT}{released}.weight', f'mixer.{ours}.w', Linear())
      for released, ours in linear.items()
    ),
    *(
      rule(f'{_AT}{x}_conv1d.weight', f'mixer.{x}_conv.taps', Conv())
      for x in 'qkv'
    ),
    rule(f'{_AT}A_log', 'mixer.A_log', Flat(before=2, after=1)),
    rule(f'{_AT}dt_bias', 'mixer.dt_bias', Flat()),
    rule(f'{_AT}o_norm.weight', 'mixer.norm.scale', Same()),
    rule(f'{_AT}o_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )


def _rules(layer):
  mixer, ffn = layer.mixer, layer.ffn
  if isinstance(ffn, MoEConfig):
    of_ffn = common.moe_rules(
      ffn,
      f'{LAYER}block_sparse_moe.',
      common.NUMBERED,
      bias='gate.e_score_correction_bias',
      shared='shared_experts',
    )
  else:
    of_ffn = common.mlp_rules()
  of_mixer = (
    latent.rules(mixer) if isinstance(mixer, MLAConfig) else _delta_rules()
  )
  return *common.NORMS, *of_mixer, *of_ffn


FAMILY = Family(
  'kimi_linear', ('kimi_linear',), _read, _write, common.top_rules, (_rules,)
)
