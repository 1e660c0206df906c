"""Latent attention and layers, which DeepSeek and Kimi Linear share."""

from collections.abc import Callable
from typing import TypeVar

from deltanet_jax.config.experiment import MLPConfig, ModelConfig, MoEConfig
from deltanet_jax.config.mixers import MLAConfig
from deltanet_jax.hf import common
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import Layout, Linear, Rules, Same
from deltanet_jax.hf.names import Json

Latent = TypeVar('Latent', bound=MLAConfig)


def read_latent(
  keys: ConfigKeys, make: Callable[..., Latent], query_latent: int | None
) -> Latent:
  """The mixer that `make` makes of the fields that both share.

  query_latent: default width
  """
  keys.require('attention_bias', False, default=False)
  heads = keys.size('num_attention_heads')
  keys.require('num_key_value_heads', heads, None, default=heads)
  return make(
    heads=heads,
    latent=keys.size('kv_lora_rank'),
    key_dim=keys.size('qk_nope_head_dim'),
    shared_dim=keys.size('qk_rope_head_dim'),
    value_dim=keys.size('v_head_dim'),
    query_latent=keys.size('q_lora_rank', default=query_latent, null=None),
    norm_eps=1e-6,  # fixed in their classes
  )


def write_latent(cfg: ModelConfig) -> Json:
  """The keys of `read_latent` and of the ffns."""
  mixer = common.find_part(cfg, MLAConfig)
  moe = common.find_part(cfg, MoEConfig)
  return {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.heads,
    'kv_lora_rank': mixer.latent,
    'qk_nope_head_dim': mixer.key_dim,
    'qk_rope_head_dim': mixer.shared_dim,
    'v_head_dim': mixer.value_dim,
    'q_lora_rank': mixer.query_latent,
    'intermediate_size': common.find_part(cfg, MLPConfig).hidden,
    'first_k_dense_replace': sum(
      isinstance(layer.ffn, MLPConfig) for layer in cfg.layers
    ),
    'moe_intermediate_size': moe.hidden,
    'topk_group': moe.top_groups,
    'routed_scaling_factor': moe.scale,
    'moe_layer_freq': 1,
  }


def make_latent_rules(mixer: MLAConfig) -> Rules:
  """Rules of latent attention."""
  query: tuple[tuple[str, str, Layout], ...] = (
    ('q_proj.weight', 'q_b.w', Linear()),
  )
  if mixer.query_latent is not None:
    query = (
      ('q_a_proj.weight', 'q_a.w', Linear()),
      ('q_a_layernorm.weight', 'q_norm.scale', Same()),
      ('q_b_proj.weight', 'q_b.w', Linear()),
    )
  return common.make_mixer_rules(
    common.ATTENTION,
    *query,
    ('kv_a_proj_with_mqa.weight', 'kv_a.w k_shared.w', Linear()),
    ('kv_a_layernorm.weight', 'kv_norm.scale', Same()),
    ('kv_b_proj.weight', 'k_b v_b', Linear(groups=mixer.heads)),
    ('o_proj.weight', 'o.w', Linear(inward=2)),
  )
