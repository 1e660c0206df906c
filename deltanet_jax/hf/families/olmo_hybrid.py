"""Olmo Hybrid.

Norms are called post_attention_layernorm and post_feedforward_layernorm in
attention layers, attention_layer_norm and feedforward_layer_norm in others, as
the script of the release writes them (convert_olmo_hybrid_weights_to_hf.py of
transformers).
"""

import re
from functools import partial

import numpy as np

from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  Residual,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.hf import common, files, rope
from deltanet_jax.hf.common import LAYER, Family
from deltanet_jax.hf.keys import KINDS, ConfigKeys
from deltanet_jax.hf.layout import Conv, Linear, Same, Shape, make_rule
from deltanet_jax.hf.names import Json


def _read(keys: ConfigKeys) -> ModelConfig:
  keys.require('attention_bias', False, default=False)
  attention = common.read_attention(
    keys,
    positions=partial(rope.read_positions, nope=True),
    qk_norm=True,
    joint_norm=True,
  )

  def size(name: str, default: int) -> int:
    return keys.size(f'linear_{name}', default=default, null=default)

  key_heads = size('num_key_heads', attention.heads)
  key_dim = size(
    'key_head_dim', int(0.75 * keys.size('hidden_size') / key_heads)
  )
  delta = GatedDeltaNetConfig(
    key_heads=key_heads,
    value_heads=size('num_value_heads', attention.heads),
    key_dim=key_dim,
    value_dim=size('value_head_dim', 2 * key_dim),
    conv=keys.size('linear_conv_kernel_dim', default=4),
    negative_eigenvalues=keys.flag('linear_allow_neg_eigval', default=True),
    norm_eps=1e-5,  # fixed in the class
  )
  ffn = common.read_mlp(keys)
  full = keys.kinds('layer_types', KINDS)
  if full is None:
    full = [i % 4 == 3 for i in range(keys.layers())]
    full[-1] |= not any(full)
  layers = [
    Layer(attention, ffn, Residual('post')) if is_full else Layer(delta, ffn)
    for is_full in full
  ]
  return common.make_model_config(keys, layers)


def _write(cfg: ModelConfig) -> Json:
  attention = common.find_part(cfg, AttentionConfig)
  delta = common.find_part(cfg, GatedDeltaNetConfig)
  positions = rope.write_parameters(attention)
  if not attention.rotary_dim:
    positions['rope_theta'] = None
  return {
    'intermediate_size': common.find_part(cfg, MLPConfig).hidden,
    **common.write_attention(attention),
    'rope_parameters': positions,
    'attention_bias': False,
    **common.write_delta(delta),
    'linear_allow_neg_eigval': delta.negative_eigenvalues,
    'layer_types': common.write_layer_types(cfg),
  }


def _rules(layer):
  if isinstance(layer.mixer, AttentionConfig):
    norms = 'post_attention_layernorm', 'post_feedforward_layernorm'
    of_mixer = common.make_attention_rules(layer.mixer)
  else:
    norms = 'attention_layer_norm', 'feedforward_layer_norm'
    of_mixer = _DELTA
  return (
    make_rule(f'{LAYER}{norms[0]}.weight', 'mixer_norm.scale'),
    make_rule(f'{LAYER}{norms[1]}.weight', 'ffn_norm.scale'),
    *of_mixer,
    *common.make_mlp_rules(),
  )


_DELTA = common.make_mixer_rules(
  f'{LAYER}linear_attn.',
  *((f'{x}_proj.weight', f'{x}.w', Linear()) for x in 'qkvab'),
  ('g_proj.weight', 'gate.w', Linear()),
  *((f'{x}_conv1d.weight', f'{x}_conv.taps', Conv()) for x in 'qkv'),
  ('A_log', 'A_log', Same()),
  ('dt_bias', 'dt_bias', Same()),
  ('o_norm.weight', 'norm.scale', Same()),
  ('o_proj.weight', 'o.w', Linear(inward=2)),
)
_CONV = re.compile(r'(.*\.linear_attn\.)([qkv])(_conv1d\.weight)')


class _Recut(files.FolderTensors):
  """A folder with separate convolutions of q, k and v.

  save_pretrained of transformers splits the concatenated taps with torch.chunk
  into three parts of equal size (rounded up, the last one smaller), although v
  is wider than q and k.
  """

  def _cuts(self, name: str) -> tuple[list[str], int, int] | None:
    """(the three names, start and end of the tensor in their concatenation), or
    None if the tensor is as released."""
    if not (match := _CONV.fullmatch(name)):
      return None
    at, own, rest = match.groups()
    parts = [f'{at}{x}{rest}' for x in 'qkv']
    weights = [f'{at}{x}_proj.weight' for x in 'qkv']
    if not all(x in self.names for x in parts + weights):
      return None
    stored = super().shape
    rows = [stored(x)[0] for x in weights]
    third = -(-sum(rows) // 3)
    cut = [third, third, sum(rows) - 2 * third]
    if [stored(x)[0] for x in parts] != cut:
      return None
    ends = [sum(rows[: i + 1]) for i in range(3)]
    which = 'qkv'.index(own)
    return parts, ends[which] - rows[which], ends[which]

  def shape(self, name: str) -> Shape:
    shape = super().shape(name)
    if cuts := self._cuts(name):
      _, first, last = cuts
      shape = (last - first, *shape[1:])
    return shape

  def read_raw(self, name: str) -> np.ndarray:
    if cuts := self._cuts(name):
      parts, first, last = cuts
      return np.concatenate(list(map(super().read_raw, parts)))[first:last]
    return super().read_raw(name)


FAMILIES = (
  Family(
    'olmo_hybrid',
    ('olmo_hybrid',),
    'OlmoHybridForCausalLM',
    _read,
    _write,
    (_rules,),
    # the norm of attention layers as written by save_pretrained
    spellings=((r'\.post_attention_layernorm\.', '.feedforward_layer_norm.'),),
    harmless={
      'initialization': (
        'linear_a_log_min linear_a_log_max linear_dt_min linear_dt_max'
        ' linear_dt_init_floor'
      ),
    },
    tensors=_Recut,
  ),
)
