"""Latent attention in the released names: DeepSeek's and Kimi Linear's."""

from deltanet_jax.hf.common import LAYER
from deltanet_jax.hf.layout import Linear, Same, rule
from deltanet_jax.mixers.config import YarnConfig

ATTENTION = f'{LAYER}self_attn.'
EPS = 1e-6  # of the latents' norms: their class's, not the configuration's


def read(keys):
  """Fields of an MLAConfig that the families spell alike."""
  return {
    'heads': keys.get('num_attention_heads'),
    'latent': keys.get('kv_lora_rank'),
    'key_dim': keys.get('qk_nope_head_dim'),
    'shared_dim': keys.get('qk_rope_head_dim'),
    'value_dim': keys.get('v_head_dim'),
    'query_latent': keys.get('q_lora_rank', default=None),
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


def read_yarn(scaling):
  """YarnConfig of a rope scaling, None of None."""
  if scaling is None:
    return None
  if scaling['rope_type'] != 'yarn':
    raise ValueError(
      f'rope scaling {scaling["rope_type"]!r}; only yarn is supported'
    )
  return YarnConfig(
    factor=float(scaling['factor']),
    original=scaling['original_max_position_embeddings'],
    fast=float(scaling.get('beta_fast', 32)),
    slow=float(scaling.get('beta_slow', 1)),
    mscale=float(scaling.get('mscale', 0)),
    mscale_all_dim=float(scaling.get('mscale_all_dim', 0)),
  )


def write_yarn(yarn):
  """The released rope_scaling."""
  if yarn is None:
    return None
  return {
    'type': 'yarn',
    'factor': yarn.factor,
    'original_max_position_embeddings': yarn.original,
    'beta_fast': yarn.fast,
    'beta_slow': yarn.slow,
    'mscale': yarn.mscale,
    'mscale_all_dim': yarn.mscale_all_dim,
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
