"""What the families share: a Family, rules of attention and MLP, key groups."""

from collections.abc import Callable
from typing import NamedTuple

from deltanet_jax.config import ConfigError, pattern
from deltanet_jax.config.experiment import MLPConfig, ModelConfig
from deltanet_jax.hf.keys import Keys, agreed
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
  harmless: dict = {}  # reason -> keys that do not change the function
  source: Callable = lambda source: source  # files.Tensors of a folder -> the
  # same with every tensor in its released shape


# of every family
HARMLESS = {
  'says what wrote the folder': (
    'architectures auto_map model_type transformers_version _commit_hash'
    ' _name_or_path name_or_path'
  ),
  'the files say it of every tensor': 'dtype torch_dtype',
  'decided where the tensors are read': (
    'quantization_config quantization compression_config'
  ),
  'read with the tokenizer': 'bos_token_id eos_token_id pad_token_id',
  'of fresh weights': 'initializer_range',
  'of training; no dropout and no router loss of theirs here': (
    'attention_dropout output_router_logits router_aux_loss_coef'
    ' router_jitter_noise'
  ),
  'how it is computed, not what': (
    'use_cache attn_implementation _attn_implementation experts_implementation'
    ' chunk_size_feed_forward pretraining_tp'
  ),
  'what a call returns': 'output_hidden_states output_attentions return_dict',
  'of other heads and of an encoder': (
    'id2label label2id num_labels problem_type is_encoder_decoder'
  ),
  'no context is refused; YaRN alone reads them': (
    'max_position_embeddings original_max_position_embeddings'
  ),
  'of generation, and transformers 5 does not read them here': (
    'max_length min_length do_sample early_stopping num_beams temperature'
    ' top_k top_p typical_p repetition_penalty length_penalty'
    ' no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids'
    ' num_return_sequences output_scores return_dict_in_generate'
    ' forced_bos_token_id forced_eos_token_id remove_invalid_values'
    ' exponential_decay_length_penalty suppress_tokens begin_suppress_tokens'
    ' epsilon_cutoff eta_cutoff encoder_repetition_penalty'
    ' num_assistant_tokens num_assistant_tokens_schedule'
    ' assistant_confidence_threshold assistant_lookbehind target_lookbehind'
    ' num_beam_groups diversity_penalty'
  ),
}


def harmless(family):
  """Every key of a config.json that may say what it likes."""
  return {
    key
    for table in (HARMLESS, family.harmless)
    for keys in table.values()
    for key in keys.split()
  }


def model_config(keys, layers, eps=1e-6, **more):
  """A ModelConfig of the keys that all families have.

  eps: of the norms, where the file has none
  """
  keys.require('hidden_act', 'silu', 'swish', default='silu')
  keys.top.without('per_layer_config')
  keys.without('per_layer_config')
  prefix, period, repeats, suffix = pattern.fold_layers(layers)
  places = {id(place): place for place in (keys, keys.top)}.values()
  return ModelConfig(
    vocab=keys.size('vocab_size'),
    d_model=keys.size('hidden_size'),
    prefix=prefix,
    period=period,
    repeats=repeats,
    suffix=suffix,
    tied=agreed(
      Keys.flag, [(place, 'tie_word_embeddings') for place in places], False
    ),
    norm_eps=keys.number('rms_norm_eps', default=eps),
    **more,
  )


def heads(keys, kv_heads=None, width=None):
  """heads, kv_heads and head_dim of softmax attention.

  kv_heads, width: where the file has none; None: as many as heads, and
  hidden_size / heads
  """
  count = keys.size('num_attention_heads')
  whole = keys.size('hidden_size') // count
  return {
    'heads': count,
    'kv_heads': keys.size(
      'num_key_value_heads', default=kv_heads or count, null=count
    ),
    'head_dim': keys.size('head_dim', default=width, null=whole) or whole,
  }


def mlp(keys):
  return MLPConfig(keys.size('intermediate_size'))


def dense_layers(keys, default):
  """For each layer, whether its feed-forward part is an MLP and not experts.

  default: how many of the first ones are, where the file does not say
  """
  first = keys.size('first_k_dense_replace', default=default, least=0)
  kinds = keys.kinds('mlp_layer_types', {'dense': True, 'sparse': False})
  counted = [i < first for i in range(keys.layers())]
  if kinds is None:
    return counted
  if 'first_k_dense_replace' in keys and kinds != counted:
    raise ConfigError(
      f'{keys.where}: {keys.at}first_k_dense_replace {first} and'
      ' mlp_layer_types name different dense layers; make them the same'
    )
  return kinds


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
