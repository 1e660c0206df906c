"""What the families share: a Family, rules of attention and MLP, key groups."""

from collections.abc import Callable
from typing import NamedTuple

from deltanet_jax.experiment import MLPConfig, ModelConfig
from deltanet_jax.hf import pattern
from deltanet_jax.hf.layout import Flat, Linear, Same, rule


class Mtp(NamedTuple):
  """How a family stores the block of its multi-token prediction."""

  marker: Callable  # ModelConfig -> a tensor that only folders with it have
  layer: Callable  # ModelConfig -> the block's Layer
  rules: Callable  # ModelConfig -> rules, our names from the top
  copies: Callable  # ModelConfig -> rules of tensors that repeat others


class Family(NamedTuple):
  """How one family of released models is configured and stored."""

  name: str
  model_types: tuple[str, ...]  # of config.json
  read: Callable  # Keys -> ModelConfig
  write: Callable  # ModelConfig -> dict, the released config.json
  top_rules: Callable  # ModelConfig -> rules outside the layers
  layer_rules: tuple[Callable, ...]  # Layer -> its rules, one for each way
  # in which folders are found; the first is the released one
  ignored: tuple[str, ...] = ()  # patterns of tensors that we do not need
  spellings: tuple[tuple[str, str], ...] = ()  # pattern, other names of it
  mtp: Mtp | None = None


def model_config(keys, layers, **more):
  """A ModelConfig of the keys that all families have."""
  prefix, period, repeats, suffix = pattern.fold(layers)
  return ModelConfig(
    vocab=keys.get('vocab_size'),
    d_model=keys.get('hidden_size'),
    prefix=prefix,
    period=period,
    repeats=repeats,
    suffix=suffix,
    tied=keys.get('tie_word_embeddings', default=False),
    norm_eps=keys.get('rms_norm_eps'),
    **more,
  )


def head_dim(keys):
  """Of softmax attention; some files leave it to be hidden_size / heads."""
  heads = keys.get('num_attention_heads')
  found = keys.get('head_dim', default=None)
  return found or keys.get('hidden_size') // heads


def mlp(keys):
  keys.require('hidden_act', 'silu', default='silu')
  return MLPConfig(keys.get('intermediate_size'))


def top_keys(cfg, model_type, architecture):
  """What every released config.json begins with."""
  return {
    'architectures': [architecture],
    'model_type': model_type,
    'vocab_size': cfg.vocab,
    'hidden_size': cfg.d_model,
    'num_hidden_layers': len(cfg.layers),
    'hidden_act': 'silu',
    'rms_norm_eps': cfg.norm_eps,
    'tie_word_embeddings': cfg.tied,
  }


def of_kind(cfg, kind):
  """The first mixer of a kind in the model."""
  return next(
    layer.mixer for layer in cfg.layers if isinstance(layer.mixer, kind)
  )


def ffn_of_kind(cfg, kind):
  """The first feed-forward layer of a kind in the model, or None."""
  ffns = (layer.ffn for layer in cfg.layers if isinstance(layer.ffn, kind))
  return next(ffns, None)


def layer_types(cfg, attention):
  """transformers' names of the layers' kinds."""
  return [
    'full_attention'
    if isinstance(layer.mixer, attention)
    else 'linear_attention'
    for layer in cfg.layers
  ]


def top_rules(cfg, prefix='model.'):
  """Embedding, last norm and head."""
  rules = [
    rule(f'{prefix}embed_tokens.weight', 'backbone.embed'),
    rule(f'{prefix}norm.weight', 'backbone.norm.scale'),
  ]
  if not cfg.tied:
    rules.append(rule('lm_head.weight', 'head.w', Linear()))
  return rules


def copies(cfg):
  """Tensors that a folder may have though the model has no such weight."""
  return (rule('lm_head.weight', 'backbone.embed'),) if cfg.tied else ()


def moved(rules, to, ours):
  """Rules of a layer as rules of the model: at `to`, our names under `ours`."""
  return tuple(
    rule(
      r.name.replace(LAYER, to),
      ' '.join(f'{ours}{x}' for x in r.ours),
      r.layout,
    )
    for r in rules
  )


LAYER = 'model.layers.{layer}.'
NORMS = (
  rule(f'{LAYER}input_layernorm.weight', 'mixer_norm.scale'),
  rule(f'{LAYER}post_attention_layernorm.weight', 'ffn_norm.scale'),
)


def attention_rules(cfg, at=f'{LAYER}self_attn.'):
  """Of an AttentionConfig; a gate is interleaved with the query, per head."""
  query = rule(f'{at}q_proj.weight', 'mixer.q.w', Linear())
  if cfg.gate:
    query = rule(
      f'{at}q_proj.weight', 'mixer.q.w mixer.gate.w', Linear(groups=cfg.heads)
    )
  norms = (
    rule(f'{at}q_norm.weight', 'mixer.q_norm.scale', Flat()),
    rule(f'{at}k_norm.weight', 'mixer.k_norm.scale', Flat()),
  )
  return (
    query,
    rule(f'{at}k_proj.weight', 'mixer.k.w', Linear()),
    rule(f'{at}v_proj.weight', 'mixer.v.w', Linear()),
    rule(f'{at}o_proj.weight', 'mixer.o.w', Linear(inward=2)),
    *(norms if cfg.qk_norm else ()),
  )


def mlp_rules(at=f'{LAYER}mlp.', ours='ffn.'):
  return tuple(
    rule(f'{at}{name}_proj.weight', f'{ours}{name}.w', Linear())
    for name in ('gate', 'up', 'down')
  )


def moe_rules(cfg, at, names, bias=None, shared=None):
  """Of a MoEConfig, the experts one by one.

  at: where the layer's experts are    names: of gate, up and down
  bias: of the correction              shared: of the shared expert
  """
  rules = [rule(f'{at}gate.weight', 'ffn.router.w', Linear())]
  for released, name in zip(names, ('gate', 'up', 'down'), strict=True):
    rules.append(
      rule(f'{at}experts.{{expert}}.{released}.weight', f'ffn.{name}', Linear())
    )
  if cfg.bias:
    rules.append(rule(f'{at}{bias}', 'ffn.bias', Same()))
  if cfg.shared:
    rules += mlp_rules(f'{at}{shared}.', 'ffn.shared.')
  if cfg.shared_gate:
    rules.append(
      rule(f'{at}{shared}_gate.weight', 'ffn.shared_gate.w', Flat(before=1))
    )
  return tuple(rules)


PROJECTIONS = ('gate_proj', 'up_proj', 'down_proj')
NUMBERED = ('w1', 'w3', 'w2')  # gate, up, down of Mixtral's naming
