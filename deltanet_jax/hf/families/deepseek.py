"""DeepSeek-V3, V3.1 and V3.2."""

from collections.abc import Callable
from functools import partial

from deltanet_jax.config.experiment import Layer, ModelConfig, MoEConfig
from deltanet_jax.config.mixers import DSAConfig, MLAConfig
from deltanet_jax.hf import common, latent, rope
from deltanet_jax.hf.common import Family, Mtp
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import Linear, Rules, Same, make_rule
from deltanet_jax.hf.names import Json

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
  ffns = common.read_ffns(keys, _moe(keys), default=3)
  layers = [Layer(mixer, ffn) for ffn in ffns]
  return common.make_model_config(keys, layers)


def _read_mixer(
  keys: ConfigKeys, make: Callable[..., latent.Latent]
) -> latent.Latent:
  keys.require('rope_interleave', True, default=True)
  positions = rope.read_positions(keys, keys.size('qk_rope_head_dim'))
  theta, yarn = positions['rope_theta'], positions['yarn']
  make = partial(make, rope_theta=theta, yarn=yarn)
  return latent.read_latent(keys, make, query_latent=1536)


def _read_v3(keys: ConfigKeys) -> ModelConfig:
  mixer = _read_mixer(keys, MLAConfig)
  # the class derives frequencies from head_dim if the file has one
  width = keys.get('head_dim', default=mixer.shared_dim)
  if width != mixer.shared_dim:
    keys.refuse('head_dim', width, f'qk_rope_head_dim {mixer.shared_dim}')
  return _read(keys, mixer)


def _read_v32(keys: ConfigKeys) -> ModelConfig:
  keys.require('mlp_bias', False, default=False)
  keys.kinds('layer_types', _SPARSE)
  make = partial(
    DSAConfig,
    index_heads=keys.size('index_n_heads'),
    index_dim=keys.size('index_head_dim'),
    top=keys.size('index_topk', default=2048),
  )
  return _read(keys, _read_mixer(keys, make))


def _write(cfg: ModelConfig) -> Json:
  moe = common.find_part(cfg, MoEConfig)
  return {
    **latent.write_latent(cfg),
    **rope.write_positions(common.find_part(cfg, MLAConfig)),
    'attention_bias': False,
    'n_routed_experts': moe.experts,
    'num_experts_per_tok': moe.top,
    'n_shared_experts': moe.shared // moe.hidden,
    'n_group': moe.groups,
    'norm_topk_prob': moe.renormalize,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'num_nextn_predict_layers': int(cfg.mtp is not None),
  }


def _write_v32(cfg: ModelConfig) -> Json:
  mixer = common.find_part(cfg, DSAConfig)
  return _write(cfg) | {
    'index_n_heads': mixer.index_heads,
    'index_head_dim': mixer.index_dim,
    'index_topk': mixer.top,
  }


def _v3_rules(layer):
  experts = {
    'bias': 'gate.e_score_correction_bias',
    'shared': 'shared_experts',
  }
  return (
    *common.NORMS,
    *latent.make_latent_rules(layer.mixer),
    *common.make_ffn_rules(layer.ffn, **experts),
  )


def _v32_rules(layer):
  return (
    *_v3_rules(layer),
    *common.make_mixer_rules(
      f'{common.ATTENTION}indexer.',
      ('wq_b.weight', 'index_q.w', Linear()),
      ('wk.weight', 'index_k.w', Linear()),
      ('k_norm.weight', 'index_norm.scale', Same()),
      ('k_norm.bias', 'index_norm.bias', Same()),
      ('weights_proj.weight', 'index_w.w', Linear()),
    ),
  )


def _mtp(layer_rules: Callable[[Layer], Rules]) -> Mtp:
  """Stored as one more layer, with copies of embedding and head."""
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
  'sums of other widths': 'qk_head_dim head_dim',
  'known from the names of tensors': 'num_nextn_predict_layers num_mtp_layers',
  'training and devices': 'aux_loss_alpha seq_aux ep_size',
}

FAMILIES = (
  Family(
    'deepseek_v3',
    ('deepseek_v3',),
    'DeepseekV3ForCausalLM',
    _read_v3,
    _write,
    (_v3_rules,),
    mtp=_mtp(_v3_rules),
    harmless=_HARMLESS,
  ),
  Family(
    'deepseek_v32',
    ('deepseek_v32',),
    'DeepseekV32ForCausalLM',
    _read_v32,
    _write_v32,
    (_v32_rules,),
    mtp=_mtp(_v32_rules),
    harmless=_HARMLESS,
  ),
)
