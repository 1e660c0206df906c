"""Latent attention in the released names: DeepSeek's and Kimi Linear's."""

from typing import TypedDict

from deltanet_jax.config.mixers import MLAConfig
from deltanet_jax.hf.common import LAYER
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.layout import Linear, Rules, Same, make_rule
from deltanet_jax.hf.names import Json

ATTENTION = f'{LAYER}self_attn.'
EPS = 1e-6  # of the latents' norms: their class's, not the configuration's


class LatentFields(TypedDict):
  """Fields of an MLAConfig that the families spell alike."""

  heads: int
  latent: int
  key_dim: int
  shared_dim: int
  value_dim: int
  query_latent: int | None
  norm_eps: float


def read_latent(keys: ConfigKeys, query_latent: int | None) -> LatentFields:
  """query_latent: its width, where the file has none."""
  keys.require('attention_bias', False, default=False)
  heads = keys.size('num_attention_heads')
  keys.require('num_key_value_heads', heads, None, default=heads)
  return {
    'heads': heads,
    'latent': keys.size('kv_lora_rank'),
    'key_dim': keys.size('qk_nope_head_dim'),
    'shared_dim': keys.size('qk_rope_head_dim'),
    'value_dim': keys.size('v_head_dim'),
    'query_latent': keys.size('q_lora_rank', default=query_latent, null=None),
    'norm_eps': EPS,
  }


def write_latent(mixer: MLAConfig) -> Json:
  """The keys of `read_latent`."""
  return {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.heads,
    'kv_lora_rank': mixer.latent,
    'qk_nope_head_dim': mixer.key_dim,
    'qk_rope_head_dim': mixer.shared_dim,
    'v_head_dim': mixer.value_dim,
    'q_lora_rank': mixer.query_latent,
  }


def make_latent_rules(mixer: MLAConfig) -> Rules:
  """Of its weights."""
  query: Rules = (
    make_rule(f'{ATTENTION}q_proj.weight', 'mixer.q_b.w', Linear()),
  )
  if mixer.query_latent is not None:
    query = (
      make_rule(f'{ATTENTION}q_a_proj.weight', 'mixer.q_a.w', Linear()),
      make_rule(
        f'{ATTENTION}q_a_layernorm.weight', 'mixer.q_norm.scale', Same()
      ),
      make_rule(f'{ATTENTION}q_b_proj.weight', 'mixer.q_b.w', Linear()),
    )
  return (
    *query,
    make_rule(
      f'{ATTENTION}kv_a_proj_with_mqa.weight',
      'mixer.kv_a.w mixer.k_shared.w',
      Linear(),
    ),
    make_rule(
      f'{ATTENTION}kv_a_layernorm.weight', 'mixer.kv_norm.scale', Same()
    ),
    make_rule(
      f'{ATTENTION}kv_b_proj.weight',
      'mixer.k_b mixer.v_b',
      Linear(groups=mixer.heads),
    ),
    make_rule(f'{ATTENTION}o_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )
