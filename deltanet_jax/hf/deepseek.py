"""DeepSeek-V3 and V3.1."""

from deltanet_jax.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.hf import common, latent
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.mixers.config import MLAConfig


def _moe(keys):
  keys.require('scoring_func', 'sigmoid', default='sigmoid')
  keys.require('topk_method', 'noaux_tc', default='noaux_tc')
  keys.require('moe_layer_freq', 1, default=1)
  width = keys.get('moe_intermediate_size')
  return MoEConfig(
    experts=keys.get('n_routed_experts'),
    top=keys.get('num_experts_per_tok'), hidden=width, score='sigmoid',
    bias=True, groups=keys.get('n_group'), top_groups=keys.get('topk_group'),
    renormalise=keys.get('norm_topk_prob'), eps=1e-20,
    scale=keys.get('routed_scaling_factor'),
    shared=width * keys.get('n_shared_experts'),
  )


def _read(keys, mixer):
  keys.require('attention_bias', False, default=False)
  dense, moe = common.mlp(keys), _moe(keys)
  first = keys.get('first_k_dense_replace')
  layers = [
    Layer(mixer, dense if i < first else moe)
    for i in range(keys.get('num_hidden_layers'))
  ]
  return common.model_config(keys, layers)


def _latent(keys):
  keys.require('rope_interleave', True, default=True)
  return latent.read(keys) | {
    'rope_theta': keys.theta(), 'yarn': latent.read_yarn(keys.scaling()),
  }


def _read_v3(keys):
  return _read(keys, MLAConfig(**_latent(keys)))


def _write(cfg, mixer, model_type, architecture):
  dense = common.ffn_of_kind(cfg, MLPConfig)
  moe = common.ffn_of_kind(cfg, MoEConfig)
  found = common.top_keys(cfg, model_type, architecture)
  return found | latent.write(mixer) | {
    'rope_theta': mixer.rope_theta,
    'rope_scaling': latent.write_yarn(mixer.yarn),
    'attention_bias': False,
    'intermediate_size': dense.hidden,
    'first_k_dense_replace': sum(
      isinstance(layer.ffn, MLPConfig) for layer in cfg.layers
    ),
    'n_routed_experts': moe.experts,
    'num_experts_per_tok': moe.top,
    'moe_intermediate_size': moe.hidden,
    'n_shared_experts': moe.shared // moe.hidden,
    'n_group': moe.groups,
    'topk_group': moe.top_groups,
    'norm_topk_prob': moe.renormalise,
    'routed_scaling_factor': moe.scale,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'moe_layer_freq': 1,
    'num_nextn_predict_layers': 0,
  }


def _write_v3(cfg):
  mixer = common.of_kind(cfg, MLAConfig)
  return _write(cfg, mixer, 'deepseek_v3', 'DeepseekV3ForCausalLM')


def _ffn_rules(ffn):
  at = f'{LAYER}mlp.'
  if isinstance(ffn, MLPConfig):
    return common.mlp_rules(at)
  return common.moe_rules(
    ffn, at, common.PROJECTIONS, bias='gate.e_score_correction_bias',
    shared='shared_experts',
  )


def _v3_rules(layer):
  return *common.NORMS, *latent.rules(layer.mixer), *_ffn_rules(layer.ffn)


V3 = Family(
  'deepseek_v3', ('deepseek_v3',), _read_v3, _write_v3, common.top_rules,
  (_v3_rules,),
)
