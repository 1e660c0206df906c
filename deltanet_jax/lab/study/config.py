"""What a study is: its sizes, its arms and what each is trained on.

Standard library only, so that a mistake is answered before jax is imported.
"""

import dataclasses
import re
from typing import Annotated, NamedTuple

from deltanet_jax.config import mixers, ranges
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.config.ranges import Count, NotNegative, Positive, Size, Whole

# arms without attention, and those that keep something of every token
RECURRENT = ('linear', 'lightning', 'delta', 'delta-neg', 'gdn', 'kda')
GROWING = ('full', 'full-nope', 'window', 'mla', 'dsa')
RATIOS = ('1:1', '3:1', '7:1')
HYBRIDS = tuple(
  f'{name}-{ratio}'
  for name in ('lightning', 'delta', 'gdn', 'kda')
  for ratio in RATIOS
)
ARMS = GROWING + RECURRENT + HYBRIDS

TASKS = (
  'mqar', 'deep', 'rebinding', 'copy', 'selective-copy', 'palindrome', 'stack',
  'two-hop', 'parity', 's5', 'quote', 'multi-turn',
)  # fmt: skip
# these compare ratios and take `deep` layers; 'deep' is mqar so
DEEP = ('deep', 'copy', 'quote', 'two-hop')


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """Sizes of a study; every arm has the parameters of `full` within 2 %."""

  # model
  d_model: Count = 48
  layers: Count = 2  # after the local one
  deep: Count = 4  # the same, of the tasks that compare ratios
  heads: Count = 1
  key_dim: Count = 8  # of a recurrent head: its state holds key_dim x value_dim
  value_dim: Count = 16
  # of the MLP of `full`; the others' follows
  hidden: Annotated[int, Whole(8)] = 48
  local: Size = 2  # tokens of the first layer's window, the same in every arm
  conv: Size = 4  # taps of the recurrent mixers' short convolution
  window: Count = 8  # tokens of the window arm
  top: Count = 8  # keys of a query of the dsa arm
  dtype: str = 'float32'
  # tasks
  symbols: Count = 24  # keys, and as many values
  length: Count = 64  # tokens of a sequence, where the task lets choose
  pairs: Count = 16  # the most that is to be remembered
  updates: Count = 4  # times that a key gets a new value
  stacks: Count = 4
  lines: Count = 12  # of a document that is quoted
  width: Count = 3  # words of a line
  # training
  batch: Count = 16
  steps: Count = 800
  deep_steps: Count = 800
  chunk: Count = 50  # steps of one dispatch
  lrs: tuple[Positive, ...] = (2e-3, 4e-3, 8e-3)
  seeds: Count = 3  # fresh ones, after the learning rate is chosen on another
  warmup: Size = 20
  weight_decay: NotNegative = 0.0
  clip: Positive = 1.0
  items: Count = 256  # sequences of an evaluation, of each seed
  draws: Annotated[int, Whole(100)] = 1000  # of the bootstrap

  def __post_init__(self):
    ranges.check_ranges(self)
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'dtype is {self.dtype!r}; give float32 or bfloat16')
    if not self.lrs:
      raise ValueError('lrs is empty; give rates above 0')
    if self.d_model % (2 * self.heads):
      raise ValueError(
        f'd_model {self.d_model} is no multiple of twice the {self.heads} heads'
      )
    for name in ('steps', 'deep_steps'):
      if getattr(self, name) % (4 * self.chunk):
        raise ValueError(
          f'{name} is {getattr(self, name)}; give a multiple of 4 times chunk'
          f' {self.chunk}, so that a quarter of the budget is logged'
        )


class Cell(NamedTuple):
  """arm: a name of ARMS   task: a name of TASKS"""

  task: str
  arm: str
  layers: int
  steps: int

  @property
  def name(self):
    """Of its files."""
    return f'{self.task}.{self.arm.replace(":", "to")}'


def parse_arm(name):
  """(mixer, r) of an arm: 'gdn-3:1' is ('gdn', 3), 'gdn' ('gdn', 0).

  Raises:
    ValueError: there is no such arm.
  """
  match = re.fullmatch(r'(.+)-(\d+):1', name)
  if name not in ARMS:
    raise ValueError(f'no model {name!r}; there is {", ".join(ARMS)}')
  return (match[1], int(match[2])) if match else (name, 0)


def _list_mixers(cfg):
  """Every mixer by the name of its arm."""
  H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
  width = cfg.d_model // H
  shared = {'conv': cfg.conv, 'form': 'chunked'}
  if cfg.length <= 64:
    shared['form'] = 'recurrent'  # as fast on rows so short, compiled sooner
  attention = {'heads': H, 'kv_heads': H, 'head_dim': width}
  # half the channels without positions: matching keys is learned sooner
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
    # one width for keys and values: that of a state of the same size
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


def make_model(cfg, arm, vocab, layers, hidden):
  """The ModelConfig of an arm: a local layer, then `layers` of its pattern.

  A hybrid r:1 ends every r + 1 layers with attention without positions, as
  Kimi Linear's.

  Raises:
    ValueError: `layers` are no multiple of the pattern.
  """
  name, ratio = parse_arm(arm)
  known, ffn = _list_mixers(cfg), MLPConfig(hidden)
  period = (Layer(known[name], ffn),)
  if ratio:
    period = period * ratio + (Layer(known['full-nope'], ffn),)
  if layers % len(period):
    raise ValueError(
      f'{arm} repeats {len(period)} layers and the model has {layers}; give a'
      ' multiple'
    )
  first = (Layer(known['local'], ffn),) if cfg.local else ()
  return ModelConfig(
    vocab, cfg.d_model, period, layers // len(period), prefix=first
  )
