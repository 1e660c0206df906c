"""The sizes of a study, its model variants and its tasks.

Standard library only, so that a mistake is answered before jax is imported.
"""

import dataclasses
import re
from typing import Annotated, NamedTuple

from deltanet_jax.config import mixers, ranges
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.config.ranges import Count, NotNegative, Positive, Size, Whole

# a state of fixed size; a cache that grows with the context
RECURRENT = ('linear', 'lightning', 'delta', 'delta-neg', 'gdn', 'kda')
GROWING = ('full', 'full-nope', 'window', 'mla', 'dsa')
RATIOS = ('1:1', '3:1', '7:1')
HYBRIDS = tuple(
  f'{name}-{ratio}'
  for name in ('lightning', 'delta', 'gdn', 'kda')
  for ratio in RATIOS
)
VARIANTS = GROWING + RECURRENT + HYBRIDS

VARIANT_LEGEND = (
  'full: softmax attention; full-nope: without positions; window: of a few'
  ' tokens; mla: multi-head latent attention; dsa: sparse attention. With a'
  ' state of fixed size: linear attention, lightning, delta (DeltaNet),'
  ' delta-neg (beta up to 2), gdn (Gated DeltaNet), kda. gdn-3:1: three'
  ' recurrent layers for every attention layer.'
)
TASKS = {
  'mqar': 'recall: after key-value pairs, keys are queried',
  'deep': 'mqar in models with more layers',
  'rebinding': 'recall where keys get new values; the latest is queried',
  'copy': 'repeat a sequence',
  'selective-copy': 'repeat the symbols that stood among blanks',
  'palindrome': 'repeat a sequence backwards',
  'stack': 'push and pop on several stacks',
  'two-hop': 'recall in two steps: the value found is the next key',
  'parity': 'parity of the bits so far',
  's5': 'products of permutations of five',
  'quote': 'name the topic of a document, quote one of its lines',
  'multi-turn': 'a conversation that sets slots and asks for them',
}
# these compare ratios of recurrent to attention layers, in `deep` layers
DEEP = ('deep', 'copy', 'quote', 'two-hop')


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """Sizes of a study; every variant has as many parameters as `full` (2%)."""

  # model
  d_model: Count = 48
  layers: Count = 2  # after the local layer
  deep: Count = 4  # the same, for the tasks that compare ratios
  heads: Count = 1
  key_dim: Count = 8  # a recurrent state is key_dim x value_dim per head
  value_dim: Count = 16
  # width of the MLP of `full`; that of the others follows from it
  hidden: Annotated[int, Whole(8)] = 48
  local: Size = 2  # window of the first layer, the same in every variant
  conv: Size = 4  # taps of the recurrent mixers' short convolution
  window: Count = 8  # tokens of the window variant
  top: Count = 8  # keys that a query of dsa attends to
  dtype: str = 'float32'
  # tasks
  symbols: Count = 24  # number of keys, and of values
  length: Count = 64  # tokens of a sequence, if the task leaves it open
  pairs: Count = 16  # at most, of recall tasks
  updates: Count = 4  # new values of a key, in rebinding
  stacks: Count = 4
  lines: Count = 12  # of the document in quote
  width: Count = 3  # words per line
  # training
  batch: Count = 16
  steps: Count = 800
  deep_steps: Count = 800
  chunk: Count = 50  # steps per dispatch
  lrs: tuple[Positive, ...] = (2e-3, 4e-3, 8e-3)
  seeds: Count = 3  # scored; another one chooses the learning rate
  warmup: Size = 20
  weight_decay: NotNegative = 0.0
  clip: Positive = 1.0
  items: Count = 256  # sequences per evaluation and seed
  draws: Annotated[int, Whole(100)] = 1000  # bootstrap samples

  def __post_init__(self):
    ranges.check_ranges(self)
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'dtype is {self.dtype!r}; give float32 or bfloat16')
    if not self.lrs:
      raise ValueError('lrs is empty; give rates above 0')
    if self.d_model % (2 * self.heads):
      raise ValueError(
        f'd_model is {self.d_model}; give a multiple of twice the'
        f' {self.heads} heads'
      )
    for name in ('steps', 'deep_steps'):
      if getattr(self, name) % (4 * self.chunk):
        raise ValueError(
          f'{name} is {getattr(self, name)}; give a multiple of'
          f' {4 * self.chunk}, 4 times chunk'
        )


class Job(NamedTuple):
  """One variant on one task, names of VARIANTS and TASKS."""

  task: str
  variant: str
  layers: int
  steps: int

  @property
  def name(self):
    """The name of its files."""
    return f'{self.task}.{self.variant.replace(":", "to")}'


def parse_variant(name):
  """(mixer, r) of a variant: ('gdn', 3) of 'gdn-3:1', ('gdn', 0) of 'gdn'.

  Raises:
    ValueError: there is no such variant.
  """
  match = re.fullmatch(r'(.+)-(\d+):1', name)
  if name not in VARIANTS:
    raise ValueError(f'no model {name!r}; there is {", ".join(VARIANTS)}')
  return (match[1], int(match[2])) if match else (name, 0)


def _list_mixers(cfg):
  """{name: mixer configuration}."""
  H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
  width = cfg.d_model // H
  shared = {'conv': cfg.conv, 'form': 'chunked'}
  if cfg.length <= 64:
    shared['form'] = 'recurrent'  # as fast on short rows, and compiles sooner
  attention = {'heads': H, 'kv_heads': H, 'head_dim': width}
  # half the channels have no positions: matching keys is learned sooner
  turned = attention | {'rotary_dim': width // 4 * 2}
  latent = {
    'heads': H, 'latent': cfg.d_model // 2, 'key_dim': width,
    'shared_dim': width // 4 * 2, 'value_dim': width,
  }  # fmt: skip
  rule = {'heads': H, 'key_dim': K, 'value_dim': V} | shared
  return {
    'local': mixers.AttentionConfig(**turned, window=max(1, cfg.local)),
    'full': mixers.AttentionConfig(**turned),
    'full-nope': mixers.AttentionConfig(**attention),
    'window': mixers.AttentionConfig(**turned, window=cfg.window),
    'mla': mixers.MLAConfig(**latent),
    'dsa': mixers.DSAConfig(
      **latent, query_latent=cfg.d_model // 2, index_heads=H,
      index_dim=width, top=cfg.top,
    ),
    'linear': mixers.LinearAttentionConfig(**rule),
    # keys and values of one width, so that the state has the same size
    'lightning': mixers.LightningConfig(
      heads=H, head_dim=round((K * V) ** 0.5), **shared
    ),
    'delta': mixers.DeltaNetConfig(**rule),
    'delta-neg': mixers.DeltaNetConfig(**rule, negative_eigenvalues=True),
    'gdn': mixers.GatedDeltaNetConfig(
      key_heads=H, value_heads=H, key_dim=K, value_dim=V, **shared
    ),
    'kda': mixers.KDAConfig(**rule, gate_rank=K),
  }  # fmt: skip


def make_model(cfg, variant, vocab, layers, hidden):
  """The ModelConfig of a variant: a layer of windowed attention, then `layers`.

  A hybrid r:1 repeats r recurrent layers and one of attention without
  positions, as Kimi Linear does.

  Raises:
    ValueError: `layers` is no multiple of the repeating block.
  """
  name, ratio = parse_variant(variant)
  known, ffn = _list_mixers(cfg), MLPConfig(hidden)
  period = (Layer(known[name], ffn),)
  if ratio:
    period = period * ratio + (Layer(known['full-nope'], ffn),)
  if layers % len(period):
    raise ValueError(
      f'{variant} repeats {len(period)} layers and the model has {layers}; give'
      ' a multiple'
    )
  first = (Layer(known['local'], ffn),) if cfg.local else ()
  return ModelConfig(
    vocab, cfg.d_model, period, layers // len(period), prefix=first
  )
