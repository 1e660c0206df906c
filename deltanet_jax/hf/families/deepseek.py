"""DeepSeek-V3, V3.1 and V3.2."""

from collections.abc import Callable

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import DSAConfig, MLAConfig
from deltanet_jax.hf import common, latent, rope
from deltanet_jax.hf.common import LAYER, Family, Mtp
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import Linear, Rules, Same, make_rule
from deltanet_jax.hf.names import Json

_INDEXER = f'{latent.ATTENTION}indexer.'
_SPARSE: dict[str | int, bool]
_SPARSE = {'indexed_attention': True, 'deepseek_sparse_attention': True}


def _moe(keys: ConfigKeys) -> MoEConfig:
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
    renormalize=keys.flag('norm_topk_prob', default=True, null=False),
    eps=1e-20,
    scale=keys.number('routed_scaling_factor', default=2.5),
    shared=width * keys.size('n_shared_experts', default=1, least=0),
  )


def _read(keys: ConfigKeys, mixer: MLAConfig) -> ModelConfig:
  dense, moe = common.read_mlp(keys), _moe(keys)
  layers = [
    Layer(mixer, dense if is_dense else moe)
    for is_dense in common.read_dense_layers(keys, default=3)
  ]
  return common.make_model_config(keys, layers)


def _latent(
  keys: ConfigKeys,
) -> tuple[latent.LatentFields, rope.Frequencies]:
  keys.require('rope_interleave', True, default=True)
  fields = latent.read_latent(keys, query_latent=1536)
  positions = rope.read_positions(keys, fields['shared_dim'])
  theta, yarn = positions['rope_theta'], positions['yarn']
  return fields, {'rope_theta': theta, 'yarn': yarn}


def _read_v3(keys: ConfigKeys) -> ModelConfig:
  fields, frequencies = _latent(keys)
  mixer = MLAConfig(**fields, **frequencies)
  # the class counts its frequencies from head_dim where a file has one
  width = keys.get('head_dim', default=mixer.shared_dim)
  if width != mixer.shared_dim:
    keys.refuse('head_dim', width, f'qk_rope_head_dim {mixer.shared_dim}')
  return _read(keys, mixer)


def _read_v32(keys: ConfigKeys) -> ModelConfig:
  keys.require('mlp_bias', False, default=False)
  keys.kinds('layer_types', _SPARSE)
  fields, frequencies = _latent(keys)
  return _read(
    keys,
    DSAConfig(
      **fields,
      **frequencies,
      index_heads=keys.size('index_n_heads'),
      index_dim=keys.size('index_head_dim'),
      top=keys.size('index_topk', default=2048),
    ),
  )


def _write(
  cfg: ModelConfig, mixer: MLAConfig, model_type: str, architecture: str
) -> Json:
  dense = common.find_ffn(cfg, MLPConfig)
  moe = common.find_ffn(cfg, MoEConfig)
  return (
    common.write_top_keys(cfg, model_type, architecture)
    | latent.write_latent(mixer)
    | {
      **rope.write_positions(mixer),
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
      'norm_topk_prob': moe.renormalize,
      'routed_scaling_factor': moe.scale,
      'scoring_func': 'sigmoid',
      'topk_method': 'noaux_tc',
      'moe_layer_freq': 1,
      'num_nextn_predict_layers': int(cfg.mtp is not None),
    }
  )


def _write_v3(cfg: ModelConfig) -> Json:
  mixer = common.find_mixer(cfg, MLAConfig)
  return _write(cfg, mixer, 'deepseek_v3', 'DeepseekV3ForCausalLM')


def _write_v32(cfg: ModelConfig) -> Json:
  mixer = common.find_mixer(cfg, DSAConfig)
  settings = _write(cfg, mixer, 'deepseek_v32', 'DeepseekV32ForCausalLM')
  return settings | {
    'index_n_heads': mixer.index_heads,
    'index_head_dim': mixer.index_dim,
    'index_topk': mixer.top,
  }


def _ffn_rules(ffn: MLPConfig | MoEConfig) -> Rules:
  at = f'{LAYER}mlp.'
  if isinstance(ffn, MLPConfig):
    return common.make_mlp_rules(at)
  return common.make_moe_rules(
    ffn,
    at,
    common.PROJECTIONS,
    bias='gate.e_score_correction_bias',
    shared='shared_experts',
  )


def _v3_rules(layer):
  return (
    *common.NORMS,
    *latent.make_latent_rules(layer.mixer),
    *_ffn_rules(layer.ffn),
  )


def _v32_rules(layer):
  return (
    *_v3_rules(layer),
    make_rule(f'{_INDEXER}wq_b.weight', 'mixer.index_q.w', Linear()),
    make_rule(f'{_INDEXER}wk.weight', 'mixer.index_k.w', Linear()),
    make_rule(f'{_INDEXER}k_norm.weight', 'mixer.index_norm.scale', Same()),
    make_rule(f'{_INDEXER}k_norm.bias', 'mixer.index_norm.bias', Same()),
    make_rule(f'{_INDEXER}weights_proj.weight', 'mixer.index_w.w', Linear()),
  )


def _mtp(layer_rules: Callable[[Layer], Rules]) -> Mtp:
  """Stored as one more layer, with copies of the embedding and the head."""
  at = lambda cfg: f'model.layers.{len(cfg.layers)}.'

  def rules(cfg):
    return (
      make_rule(f'{at(cfg)}eh_proj.weight', 'mtp.proj.w', Linear()),
      make_rule(f'{at(cfg)}enorm.weight', 'mtp.embed_norm.scale'),
      make_rule(f'{at(cfg)}hnorm.weight', 'mtp.hidden_norm.scale'),
      make_rule(f'{at(cfg)}shared_head.norm.weight', 'mtp.norm.scale'),
      *common.move_rules(layer_rules(cfg.mtp), at(cfg), 'mtp.layer.'),
    )

  def copies(cfg):
    head = ('backbone.embed',) if cfg.tied else ('head.w', Linear())
    return (
      make_rule(f'{at(cfg)}embed_tokens.weight', 'backbone.embed'),
      make_rule(f'{at(cfg)}shared_head.head.weight', *head),
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
  common.make_top_rules,
  (_v3_rules,),
  mtp=_mtp(_v3_rules),
  harmless=_HARMLESS,
)
V32 = Family(
  'deepseek_v32',
  ('deepseek_v32',),
  _read_v32,
  _write_v32,
  common.make_top_rules,
  (_v32_rules,),
  mtp=_mtp(_v32_rules),
  harmless=_HARMLESS,
)
FAMILIES = (V3, V32)
