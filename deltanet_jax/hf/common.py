"""What all families share: Family, rules of attention and MLP, common keys."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from deltanet_jax.config import ConfigError, pattern
from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  GatedDeltaNetConfig,
  MixerConfig,
)
from deltanet_jax.hf import rope
from deltanet_jax.hf.files import FolderTensors
from deltanet_jax.hf.keys import ConfigKeys, get_agreed
from deltanet_jax.hf.layout import (
  Flat,
  Layout,
  Linear,
  Rules,
  TensorRule,
  make_rule,
)
from deltanet_jax.hf.names import Json

Part = TypeVar('Part', bound=MixerConfig | MLPConfig | MoEConfig)


class Mtp(NamedTuple):
  """How a family stores its block of multi-token prediction."""

  # a tensor that only folders with this block have
  marker: Callable[[ModelConfig], str]
  layer: Callable[[ModelConfig], Layer]  # of the block
  rules: Callable[[ModelConfig], Rules]  # our names from the root
  copies: Callable[[ModelConfig], Rules]  # tensors that repeat others


class Family(NamedTuple):
  """Configuration and storage of a family of released models."""

  name: str
  model_types: tuple[str, ...]  # of config.json; the first is written
  architecture: str  # class of transformers
  read_config: Callable[[ConfigKeys], ModelConfig]
  write_keys: Callable[[ModelConfig], Json]  # keys beside the common ones
  # alternative storage formats; the first is that of the release
  layer_rules: tuple[Callable[[Layer], Rules], ...]
  ignored: tuple[str, ...] = ()  # patterns of tensors that are not needed
  spellings: tuple[tuple[str, str], ...] = ()  # pattern, other name
  mtp: Mtp | None = None
  # reason -> keys that do not change the function
  harmless: Mapping[str, str] = {}
  # reads the tensors of a folder in their released shapes
  tensors: type[FolderTensors] = FolderTensors

  def write_config(self, cfg: ModelConfig) -> Json:
    """The released config.json."""
    return {
      'architectures': [self.architecture],
      'model_type': self.model_types[0],
      'vocab_size': cfg.vocab,
      'hidden_size': cfg.d_model,
      'num_hidden_layers': len(cfg.layers),
      'hidden_act': 'silu',
      'rms_norm_eps': cfg.norm_eps,
      'tie_word_embeddings': cfg.tied,
    } | self.write_keys(cfg)


# keys of every family that need not be read, by reason
HARMLESS = {
  'names what wrote the folder': (
    'architectures auto_map model_type transformers_version _commit_hash'
    ' _name_or_path name_or_path'
  ),
  'dtype is read from the files': 'dtype torch_dtype',
  'judged when tensors are read': (
    'quantization_config quantization compression_config'
  ),
  'read with the tokenizer': 'bos_token_id eos_token_id pad_token_id',
  'initialization': 'initializer_range',
  'training: dropout and router losses': (
    'attention_dropout output_router_logits router_aux_loss_coef'
    ' router_jitter_noise'
  ),
  'how the function is computed': (
    'use_cache attn_implementation _attn_implementation experts_implementation'
    ' chunk_size_feed_forward pretraining_tp'
  ),
  'outputs of a call': 'output_hidden_states output_attentions return_dict',
  'other output heads, encoders': (
    'id2label label2id num_labels problem_type is_encoder_decoder'
  ),
  'context limits, not enforced; YaRN reads them': (
    'max_position_embeddings original_max_position_embeddings'
  ),
  'generation; transformers 5 does not read them here': (
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


def collect_harmless_keys(family: Family) -> set[str]:
  """All keys of a config.json whose values do not matter."""
  return {
    key
    for table in (HARMLESS, family.harmless)
    for keys in table.values()
    for key in keys.split()
  }


def make_model_config(
  keys: ConfigKeys,
  layers: Sequence[Layer],
  eps: float = 1e-6,
  zero_centered: bool = False,
) -> ModelConfig:
  """A ModelConfig from the keys that all families have.

  eps: default epsilon of the norms
  """
  keys.require('hidden_act', 'silu', 'swish', default='silu')
  keys.top.without('per_layer_config')
  keys.without('per_layer_config')
  prefix, period, repeats, suffix = pattern.fold_layers(layers)
  tied = 'tie_word_embeddings'
  places = [(place, tied) for place in dict.fromkeys((keys, keys.top))]
  return ModelConfig(
    vocab=keys.size('vocab_size'),
    d_model=keys.size('hidden_size'),
    prefix=prefix,
    period=period,
    repeats=repeats,
    suffix=suffix,
    tied=get_agreed(ConfigKeys.flag, places, False),
    norm_eps=keys.number('rms_norm_eps', default=eps),
    zero_centered=zero_centered,
  )


def read_attention(
  keys: ConfigKeys,
  *,
  kv_heads: int | None = None,
  width: int | None = None,
  eps: float = 1e-6,
  positions: Callable[[ConfigKeys, int], rope.Positions] = rope.read_positions,
  **parts: bool,
) -> AttentionConfig:
  """Reads softmax attention.

  kv_heads, width, eps: defaults; None: as many as heads, hidden_size / heads
  parts: qk_norm and other fields
  """
  heads = keys.size('num_attention_heads')
  whole = keys.size('hidden_size') // heads
  kv_heads = keys.size(
    'num_key_value_heads', default=kv_heads or heads, null=heads
  )
  width = keys.size('head_dim', default=width, null=whole) or whole
  return AttentionConfig(
    heads,
    kv_heads,
    width,
    **positions(keys, width),
    norm_eps=keys.number('rms_norm_eps', default=eps),
    **parts,  # type: ignore[arg-type]
  )


def write_attention(mixer: AttentionConfig) -> Json:
  """The keys that `read_attention` reads."""
  return {
    'num_attention_heads': mixer.heads,
    'num_key_value_heads': mixer.kv_heads,
    'head_dim': mixer.head_dim,
  }


def write_delta(mixer: GatedDeltaNetConfig) -> Json:
  """The keys of a Gated DeltaNet."""
  return {
    'linear_num_key_heads': mixer.key_heads,
    'linear_num_value_heads': mixer.value_heads,
    'linear_key_head_dim': mixer.key_dim,
    'linear_value_head_dim': mixer.value_dim,
    'linear_conv_kernel_dim': mixer.conv,
  }


def read_mlp(keys: ConfigKeys) -> MLPConfig:
  """Reads the dense MLP."""
  return MLPConfig(keys.size('intermediate_size'))


def read_ffns(
  keys: ConfigKeys, moe: MoEConfig, default: int
) -> list[MLPConfig | MoEConfig]:
  """Reads the ffns of all layers: dense MLPs, then experts.

  default: number of dense layers if the file does not say
  """
  first = keys.size('first_k_dense_replace', default=default, least=0)
  kinds = keys.kinds('mlp_layer_types', {'dense': True, 'sparse': False})
  counted = [i < first for i in range(keys.layers())]
  if 'first_k_dense_replace' in keys and kinds not in (None, counted):
    raise ConfigError(
      f'{keys.where}: {keys.at}first_k_dense_replace {first} and'
      ' mlp_layer_types name different dense layers; make them the same'
    )
  mlp = read_mlp(keys)
  return [mlp if dense else moe for dense in kinds or counted]


def find_part(cfg: ModelConfig, kind: type[Part]) -> Part:
  """The first mixer or ffn of a kind in the model."""
  parts = (part for layer in cfg.layers for part in (layer.mixer, layer.ffn))
  return next(part for part in parts if isinstance(part, kind))


def write_layer_types(cfg: ModelConfig) -> list[str]:
  """layer_types as transformers writes them."""
  full = [isinstance(layer.mixer, AttentionConfig) for layer in cfg.layers]
  return ['full_attention' if x else 'linear_attention' for x in full]


def make_top_rules(cfg: ModelConfig) -> Rules:
  """Rules of embedding, last norm and output head."""
  rules = [
    make_rule('model.embed_tokens.weight', 'backbone.embed'),
    make_rule('model.norm.weight', 'backbone.norm.scale'),
  ]
  if not cfg.tied:
    rules.append(make_rule('lm_head.weight', 'head.w', Linear()))
  return tuple(rules)


def make_copies(cfg: ModelConfig) -> Rules:
  """Rules of tensors that may repeat other weights."""
  return (make_rule('lm_head.weight', 'backbone.embed'),) if cfg.tied else ()


def move_rules(rules: Iterable[TensorRule], to: str, ours: str) -> Rules:
  """Rules of a layer as rules of the model: names at `to`, ours at `ours`."""
  return tuple(
    make_rule(
      r.name.replace(LAYER, to),
      ' '.join(f'{ours}{x}' for x in r.ours),
      r.layout,
    )
    for r in rules
  )


LAYER = 'model.layers.{layer}.'
ATTENTION = f'{LAYER}self_attn.'
NORMS = (
  make_rule(f'{LAYER}input_layernorm.weight', 'mixer_norm.scale'),
  make_rule(f'{LAYER}post_attention_layernorm.weight', 'ffn_norm.scale'),
)


def make_mixer_rules(at: str, *rows: tuple[str, str, Layout]) -> Rules:
  """Rules of a mixer; rows: a released name after `at`, our names, layout."""
  return tuple(
    make_rule(at + name, ' '.join(f'mixer.{x}' for x in ours.split()), layout)
    for name, ours, layout in rows
  )


def make_attention_rules(cfg: AttentionConfig) -> Rules:
  """Rules of attention; a gate is interleaved with the query per head."""
  query = ('q_proj.weight', 'q.w', Linear())
  if cfg.gate:
    query = ('q_proj.weight', 'q.w gate.w', Linear(groups=cfg.heads))
  norms = (
    ('q_norm.weight', 'q_norm.scale', Flat()),
    ('k_norm.weight', 'k_norm.scale', Flat()),
  )
  return make_mixer_rules(
    ATTENTION,
    query,
    ('k_proj.weight', 'k.w', Linear()),
    ('v_proj.weight', 'v.w', Linear()),
    ('o_proj.weight', 'o.w', Linear(inward=2)),
    *(norms if cfg.qk_norm else ()),
  )


def make_mlp_rules(at: str = f'{LAYER}mlp.', ours: str = 'ffn.') -> Rules:
  """Rules of an MLP at `at`, our names under `ours`."""
  return tuple(
    make_rule(f'{at}{name}_proj.weight', f'{ours}{name}.w', Linear())
    for name in ('gate', 'up', 'down')
  )


# prefix of experts, and their names of gate, up and down
PROJECTIONS = f'{LAYER}mlp.', ('gate_proj', 'up_proj', 'down_proj')
NUMBERED = f'{LAYER}block_sparse_moe.', ('w1', 'w3', 'w2')  # as in Mixtral


def make_ffn_rules(
  cfg: MLPConfig | MoEConfig,
  experts: tuple[str, tuple[str, str, str]] = PROJECTIONS,
  bias: str = '',
  shared: str = '',
) -> Rules:
  """Rules of an MLP or of single experts.

  experts: PROJECTIONS or NUMBERED   bias: name of the selection bias
  shared: name of the shared expert
  """
  if isinstance(cfg, MLPConfig):
    return make_mlp_rules()
  at, names = experts
  rules = [make_rule(f'{at}gate.weight', 'ffn.router.w', Linear())]
  for released, name in zip(names, ('gate', 'up', 'down'), strict=True):
    tensor = f'{at}experts.{{expert}}.{released}.weight'
    rules.append(make_rule(tensor, f'ffn.{name}', Linear()))
  if cfg.bias:
    rules.append(make_rule(f'{at}{bias}', 'ffn.bias'))
  if cfg.shared:
    rules += make_mlp_rules(f'{at}{shared}.', 'ffn.shared.')
  if cfg.shared_gate:
    tensor = f'{at}{shared}_gate.weight'
    rules.append(make_rule(tensor, 'ffn.shared_gate.w', Flat(before=1)))
  return tuple(rules)
