"""Kimi Linear.

Expert weights are the sigmoid scores without the selection bias, as in
transformers and arXiv:2408.15664. The modeling_kimi.py beside the released
weights adds the bias to the scores in place before gathering them, so its
weights include the bias: a bug by aliasing, absent from the file of Kimi K3.
Its outputs differ accordingly.
"""

from functools import partial

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, ModelConfig, MoEConfig
from deltanet_jax.config.mixers import KDAConfig, MLAConfig
from deltanet_jax.hf import common, latent
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import KINDS, ConfigKeys, get_agreed
from deltanet_jax.hf.layout import Conv, Flat, Linear, Rules, Same
from deltanet_jax.hf.names import Json

_EPS = 1e-5  # default


def _moe(keys: ConfigKeys) -> MoEConfig:
  keys.require('moe_router_activation_func', 'sigmoid', default='sigmoid')
  keys.require('moe_layer_freq', 1, default=1)
  width = keys.size('moe_intermediate_size')
  groups = keys.size('num_expert_group', 'n_group', default=1)
  if groups > 1:
    keys.require('use_grouped_topk', True, default=True)
  shared = 'num_shared_experts', 'n_shared_experts'
  return MoEConfig(
    experts=keys.size('num_experts', 'num_local_experts'),
    top=keys.size('num_experts_per_token', 'num_experts_per_tok', default=8),
    hidden=width,
    score='sigmoid',
    bias=True,
    groups=groups,
    top_groups=keys.size('topk_group', default=1),
    renormalize=keys.flag('moe_renormalize', 'norm_topk_prob', default=True),
    eps=1e-20,
    scale=keys.number('routed_scaling_factor', default=2.446),
    shared=width * keys.size(*shared, default=1, least=0),
  )


def _read_numbers(linear: ConfigKeys, name: str) -> list[int]:
  numbers = linear.get(name)
  if not (isinstance(numbers, list) and all(type(i) is int for i in numbers)):
    linear.refuse(name, numbers, 'a list of layers, counted from 1')
  return numbers


def _full(keys: ConfigKeys, linear: ConfigKeys) -> list[bool]:
  """Whether each layer is latent attention.

  The released lists count layers from one; in transformers layer_types takes
  precedence.
  """
  kinds, count = keys.kinds('layer_types', KINDS), keys.layers()
  names = ('full_attn_layers', 'kda_layers')
  if not any(name in linear for name in names):
    return kinds or [i > 0 and i % 4 == 0 for i in range(count)]
  full, delta = (_read_numbers(linear, name) for name in names)
  if sorted(full + delta) != list(range(1, count + 1)):
    raise ConfigError(
      f'{keys.where}: full_attn_layers and kda_layers do not name each layer'
      f' from 1 to num_hidden_layers {count} once'
    )
  listed = [i + 1 in full for i in range(count)]
  if kinds not in (None, listed):
    raise ConfigError(
      f'{keys.where}: layer_types and full_attn_layers, kda_layers of'
      ' linear_attn_config name different layers; make them the same'
    )
  return listed


def _read(keys: ConfigKeys) -> ModelConfig:
  keys.require('mla_use_nope', True, default=True)
  # of Kimi K3, whose files have the same model_type
  keys.without('mla_use_output_gate', 'attn_res_block_size')
  keys.without('routed_expert_hidden_size')
  linear = keys.table('linear_attn_config')
  linear.without('gate_lower_bound', 'use_full_rank_gate')

  def size(name: str, ours: str, default: int) -> int:
    places = (linear, name), (keys, ours)
    return get_agreed(ConfigKeys.size, places, default)

  width = size('head_dim', 'linear_head_dim', 128)
  kda = KDAConfig(
    heads=size('num_heads', 'linear_num_heads', 32),
    key_dim=width,
    value_dim=width,
    conv=size('short_conv_kernel_size', 'linear_conv_kernel_dim', 4),
    norm_eps=keys.number('rms_norm_eps', default=_EPS),
  )
  make = partial(MLAConfig, rotary=False)
  mla = latent.read_latent(keys, make, query_latent=None)
  full, ffns = _full(keys, linear), common.read_ffns(keys, _moe(keys), 1)
  layers = [
    Layer(mla if is_full else kda, ffn)
    for is_full, ffn in zip(full, ffns, strict=True)
  ]
  return common.make_model_config(keys, layers, eps=_EPS)


def _write(cfg: ModelConfig) -> Json:
  kda = common.find_part(cfg, KDAConfig)
  moe = common.find_part(cfg, MoEConfig)
  numbers = lambda kind: [
    i for i, layer in enumerate(cfg.layers, 1) if isinstance(layer.mixer, kind)
  ]
  return {
    **latent.write_latent(cfg),
    'mla_use_nope': not common.find_part(cfg, MLAConfig).rotary,
    'linear_attn_config': {
      'full_attn_layers': numbers(MLAConfig),
      'kda_layers': numbers(KDAConfig),
      'head_dim': kda.key_dim,
      'num_heads': kda.heads,
      'short_conv_kernel_size': kda.conv,
    },
    'num_experts': moe.experts,
    'num_experts_per_token': moe.top,
    'num_shared_experts': moe.shared // moe.hidden,
    'num_expert_group': moe.groups,
    'moe_renormalize': moe.renormalize,
    'moe_router_activation_func': 'sigmoid',
  }


def _delta_rules() -> Rules:
  return common.make_mixer_rules(
    common.ATTENTION,
    *((f'{x}_proj.weight', f'{x}.w', Linear()) for x in 'qkvb'),
    ('f_a_proj.weight', 'f_a.w', Linear()),
    ('f_b_proj.weight', 'f_b.w', Linear()),
    ('g_a_proj.weight', 'gate_a.w', Linear()),
    ('g_b_proj.weight', 'gate_b.w', Linear()),
    *((f'{x}_conv1d.weight', f'{x}_conv.taps', Conv()) for x in 'qkv'),
    ('A_log', 'A_log', Flat(before=2, after=1)),
    ('dt_bias', 'dt_bias', Flat()),
    ('o_norm.weight', 'norm.scale', Same()),
    ('o_proj.weight', 'o.w', Linear(inward=2)),
  )


def _rules(layer):
  is_latent = isinstance(layer.mixer, MLAConfig)
  return (
    *common.NORMS,
    *(latent.make_latent_rules(layer.mixer) if is_latent else _delta_rules()),
    *common.make_ffn_rules(
      layer.ffn,
      common.NUMBERED,
      bias='gate.e_score_correction_bias',
      shared='shared_experts',
    ),
  )


FAMILIES = (
  Family(
    'kimi_linear',
    ('kimi_linear',),
    'KimiLinearForCausalLM',
    _read,
    _write,
    (_rules,),
    # as written by save_pretrained of transformers
    spellings=((r'\.mlp\.', '.block_sparse_moe.'),),
    harmless={
      'this model has no positions': (
        'rope_theta rope_scaling rope_parameters partial_rotary_factor'
        ' rope_interleave'
      ),
      'context limit, not enforced': 'model_max_length',
      'sums of other widths': 'qk_head_dim head_dim',
      'not in the class': 'num_nextn_predict_layers',
      'the only kind of router here': 'topk_method',
      'grouped routing': 'use_grouped_topk',
    },
  ),
)
