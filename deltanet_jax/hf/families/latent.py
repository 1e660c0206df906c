"""Latent attention in the released names: DeepSeek's and Kimi Linear's."""

from deltanet_jax.hf.common import LAYER
from deltanet_jax.hf.layout import Linear, Same, rule

ATTENTION = f'{LAYER}self_attn.'
EPS = 1e-6  # of the latents' norms: their class's, not the configuration's


def read(keys, query_latent):
  """Fields of an MLAConfig that the families spell alike.

  query_latent: its width, where the file has none
  """
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


def write(mixer):
  """The keys of `read`."""
  return {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.heads,
    'kv_lora_rank': mixer.latent,
    'qk_nope_head_dim': mixer.key_dim,
    'qk_rope_head_dim': mixer.shared_dim,
    'v_head_dim': mixer.value_dim,
    'q_lora_rank': mixer.query_latent,
  }


def rules(mixer):
  """Of an MLAConfig."""
  query = (rule(f'{ATTENTION}q_proj.weight', 'mixer.q_b.w', Linear()),)
  if mixer.query_latent is not None:
    query = (
      rule(f'{ATTENTION}q_a_proj.weight', 'mixer.q_a.w', Linear()),
      rule(f'{ATTENTION}q_a_layernorm.weight', 'mixer.q_norm.scale', Same()),
      rule(f'{ATTENTION}q_b_proj.weight', 'mixer.q_b.w', Linear()),
    )
  return (
    *query,
    rule(
      f'{ATTENTION}kv_a_proj_with_mqa.weight',
      'mixer.kv_a.w mixer.k_shared.w',
      Linear(),
    ),
    rule(f'{ATTENTION}kv_a_layernorm.weight', 'mixer.kv_norm.scale', Same()),
    rule(
      f'{ATTENTION}kv_b_proj.weight',
      'mixer.k_b mixer.v_b',
      Linear(groups=mixer.heads),
    ),
    rule(f'{ATTENTION}o_proj.weight', 'mixer.o.w', Linear(inward=2)),
  )
