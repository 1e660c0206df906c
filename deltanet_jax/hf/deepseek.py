"""DeepSeek-V3, V3.1 and V3.2."""

from deltanet_jax.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.hf import common, latent
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.layout import Linear, Same, rule
from deltanet_jax.mixers.config import DSAConfig, MLAConfig

_INDEXER = f'{latent.ATTENTION}indexer.'


def _moe(keys):
  keys.require('scoring_func', 'sigmoid', default='sigmoid')
  keys.require('topk_method', 'noaux_tc', default='noaux_tc')
  keys.require('moe_layer_freq', 1, default=1)
  width = keys.get('moe_intermediate_size')
  return MoEConfig(
    experts=keys.get('n_routed_experts'),
    top=keys.get('num_experts_per_tok'),
    hidden=width,
    score='sigmoid',
    bias=True,
    groups=keys.get('n_group'),
    top_groups=keys.get('topk_group'),
    renormalise=keys.get('norm_topk_prob'),
    eps=1e-20,
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
    'rope_theta': keys.theta(),
    'yarn': latent.read_yarn(keys.scaling()),
  }


def _read_v3(keys):
  return _read(keys, MLAConfig(**_latent(keys)))


def _read_v32(keys):
  return _read(
    keys,
    DSAConfig(
      **_latent(keys),
      index_heads=keys.get('index_n_heads'),
      index_dim=keys.get('index_head_dim'),
      top=keys.get('index_topk'),
    ),
  )


def _write(cfg, mixer, model_type, architecture):
  dense = common.ffn_of_kind(cfg, MLPConfig)
  moe = common.ffn_of_kind(cfg, MoEConfig)
  found = common.top_keys(cfg, model_type, architecture)
  return (
    found
    | latent.write(mixer)
    | {
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
      'num_nextn_predict_layers': int(cfg.mtp is not None),
    }
  )


def _write_v3(cfg):
  mixer = common.of_kind(cfg, MLAConfig)
  return _write(cfg, mixer, 'deepseek_v3', 'DeepseekV3ForCausalLM')


def _write_v32(cfg):
  mixer = common.of_kind(cfg, DSAConfig)
  found = _write(cfg, mixer, 'deepseek_v32', 'DeepseekV32ForCausalLM')
  return found | {
    'index_n_heads': mixer.index_heads,
    'index_head_dim': mixer.index_dim,
    'index_topk': mixer.top,
  }


def _ffn_rules(ffn):
  at = f'{LAYER}mlp.'
  if isinstance(ffn, MLPConfig):
    return common.mlp_rules(at)
  return common.moe_rules(
    ffn,
    at,
    common.PROJECTIONS,
    bias='gate.e_score_correction_bias',
    shared='shared_experts',
  )


def _v3_rules(layer):
  return *common.NORMS, *latent.rules(layer.mixer), *_ffn_rules(layer.ffn)


def _v32_rules(layer):
  return (
    *_v3_rules(layer),
    rule(f'{_INDEXER}wq_b.weight', 'mixer.index_q.w', Linear()),
    rule(f'{_INDEXER}wk.weight', 'mixer.index_k.w', Linear()),
    rule(f'{_INDEXER}k_norm.weight', 'mixer.index_norm.scale', Same()),
    rule(f'{_INDEXER}k_norm.bias', 'mixer.index_norm.bias', Same()),
    rule(f'{_INDEXER}weights_proj.weight', 'mixer.index_w.w', Linear()),
  )


def _mtp(layer_rules):
  """Stored as one more layer, with copies of the embedding and the head."""
  at = lambda cfg: f'model.layers.{len(cfg.layers)}.'

  def rules(cfg):
    return (
      rule(f'{at(cfg)}eh_proj.weight', 'mtp.proj.w', Linear()),
      rule(f'{at(cfg)}enorm.weight', 'mtp.embed_norm.scale'),
      rule(f'{at(cfg)}hnorm.weight', 'mtp.hidden_norm.scale'),
      rule(f'{at(cfg)}shared_head.norm.weight', 'mtp.norm.scale'),
      *common.moved(layer_rules(cfg.mtp), at(cfg), 'mtp.layer.'),
    )

  def copies(cfg):
    head = ('backbone.embed',) if cfg.tied else ('head.w', Linear())
    return (
      rule(f'{at(cfg)}embed_tokens.weight', 'backbone.embed'),
      rule(f'{at(cfg)}shared_head.head.weight', *head),
    )

  return Mtp(
    lambda cfg: f'{at(cfg)}eh_proj.weight',
    lambda cfg: cfg.layers[-1],
    rules,
    copies,
  )


V3 = Family(
  'deepseek_v3',
  ('deepseek_v3',),
  _read_v3,
  _write_v3,
  common.top_rules,
  (_v3_rules,),
  mtp=_mtp(_v3_rules),
)
V32 = Family(
  'deepseek_v32',
  ('deepseek_v32',),
  _read_v32,
  _write_v32,
  common.top_rules,
  (_v32_rules,),
  mtp=_mtp(_v32_rules),
)
