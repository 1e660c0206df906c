"""DeepSeek-V3, V3.1 and V3.2."""

from deltanet_jax.config.experiment import Layer, MLPConfig, MoEConfig
from deltanet_jax.config.mixers import DSAConfig, MLAConfig
from deltanet_jax.hf import common, rope
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.families import latent
from deltanet_jax.hf.layout import Linear, Same, rule

_INDEXER = f'{latent.ATTENTION}indexer.'
_SPARSE = dict.fromkeys(('indexed_attention', 'deepseek_sparse_attention'))


def _moe(keys):
  keys.require('scoring_func', 'sigmoid', default='sigmoid')
  keys.require('topk_method', 'noaux_tc', default='noaux_tc')
  keys.require('moe_layer_freq', 1, default=1)
  width = keys.size('moe_intermediate_size')
  return MoEConfig(
    experts=keys.size('n_routed_experts', 'num_local_experts', 'num_experts'),
    top=keys.size('num_experts_per_tok', default=8),
    hidden=width,
    score='sigmoid',
    bias=True,
    groups=keys.size('n_group', default=8),
    top_groups=keys.size('topk_group', default=4),
    renormalise=keys.flag('norm_topk_prob', default=True, null=False),
    eps=1e-20,
    scale=keys.number('routed_scaling_factor', default=2.5),
    shared=width * keys.size('n_shared_experts', default=1, least=0),
  )


def _read(keys, mixer):
  dense, moe = common.mlp(keys), _moe(keys)
  layers = [
    Layer(mixer, dense if is_dense else moe)
    for is_dense in common.dense_layers(keys, default=3)
  ]
  return common.model_config(keys, layers)


def _latent(keys):
  keys.require('rope_interleave', True, default=True)
  found = latent.read(keys, query_latent=1536)
  turn = rope.read(keys, found['shared_dim'])
  del turn['rotary_dim']
  return found | turn


def _read_v3(keys):
  mixer = MLAConfig(**_latent(keys))
  # the class counts its frequencies from head_dim where a file has one
  width = keys.get('head_dim', default=mixer.shared_dim)
  if width != mixer.shared_dim:
    keys.refuse('head_dim', width, f'qk_rope_head_dim {mixer.shared_dim}')
  return _read(keys, mixer)


def _read_v32(keys):
  keys.require('mlp_bias', False, default=False)
  keys.kinds('layer_types', _SPARSE)
  return _read(
    keys,
    DSAConfig(
      **_latent(keys),
      index_heads=keys.size('index_n_heads'),
      index_dim=keys.size('index_head_dim'),
      top=keys.size('index_topk', default=2048),
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
      **rope.write(mixer),
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


_HARMLESS = {
  'sums of other widths, whatever they say': 'qk_head_dim head_dim',
  'the names of the tensors say it': 'num_nextn_predict_layers num_mtp_layers',
  'of training, and of devices': 'aux_loss_alpha seq_aux ep_size',
}

V3 = Family(
  'deepseek_v3',
  ('deepseek_v3',),
  _read_v3,
  _write_v3,
  common.top_rules,
  (_v3_rules,),
  mtp=_mtp(_v3_rules),
  harmless=_HARMLESS,
)
V32 = Family(
  'deepseek_v32',
  ('deepseek_v32',),
  _read_v32,
  _write_v32,
  common.top_rules,
  (_v32_rules,),
  mtp=_mtp(_v32_rules),
  harmless=_HARMLESS,
)
