"""What a run is: the configuration of model, data, optimizer, training, mesh.

Standard library only: configurations are read, changed and checked before
jax is imported. A file in `configs/` returns one `Experiment`.
"""

import dataclasses
import math
from typing import Annotated

from deltanet_jax.config import ranges
from deltanet_jax.config.mixers import MixerConfig
from deltanet_jax.config.objectives import NextTokenConfig, ObjectiveConfig
from deltanet_jax.config.ranges import (
  BelowOne,
  Count,
  Finite,
  NotNegative,
  OneOf,
  Positive,
  Real,
  Size,
  Whole,
)

Devices = Annotated[int, Whole(1, other=-1)]
Fraction = Annotated[
  float, Real('a fraction between 0 and 1', 2.0**-64, 1 - 2.0**-53)
]


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Gated MLP: (silu(x gate) * (x up)) down."""

  hidden: Count

  def __post_init__(self):
    ranges.check_ranges(self)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Mixture of experts: every token goes to `top` of `experts` gated MLPs."""

  experts: Count
  top: Count
  hidden: Count  # width of an expert
  # of the router's logits
  score: Annotated[str, OneOf(('softmax', 'sigmoid'))] = 'softmax'
  bias: bool = False  # added to the scores for the choice alone
  groups: Count = 1  # equal groups of experts, of which
  top_groups: Count = 1  # these are open to a token
  renormalize: bool = True  # weights divided by their sum
  eps: NotNegative = 0.0  # added to that sum
  scale: Positive = 1.0  # of the weights
  shared: Size = 0  # width of an expert that takes every token; 0: none
  shared_gate: bool = False  # it is multiplied by sigmoid(x w)

  def __post_init__(self):
    ranges.check_ranges(self)
    if self.experts % self.groups or self.top_groups > self.groups:
      raise ValueError(
        f'MoEConfig.groups {self.groups} must divide the {self.experts} experts'
        f' and be at least top_groups {self.top_groups}; change one of them'
      )
    open_ = self.experts // self.groups * self.top_groups
    if self.top > open_:
      raise ValueError(
        f'MoEConfig.top is {self.top} and a token can reach {open_} experts;'
        ' choose fewer or open more groups'
      )
    if self.shared_gate and not self.shared:
      raise ValueError(
        'MoEConfig.shared_gate without a shared expert; give its width as'
        ' shared'
      )


@dataclasses.dataclass(frozen=True)
class Residual:
  """How a branch f (mixer or ffn) joins the residual stream.

  form: 'pre': x + f(N(x)); 'post': x + N(f(x)) (OLMo 2's);
  'normed': h = N(x); alpha h + beta f(h) (MiniMax-01's DeepNorm)
  """

  form: Annotated[str, OneOf(('pre', 'post', 'normed'))] = 'pre'
  alpha: Finite = 1.0
  beta: Finite = 1.0

  def __post_init__(self):
    ranges.check_ranges(self)
    if self.form != 'normed' and (self.alpha, self.beta) != (1, 1):
      raise ValueError(
        f'Residual.alpha {self.alpha} and beta {self.beta} belong to the form'
        " 'normed'; leave them at 1 or change the form"
      )


@dataclasses.dataclass(frozen=True)
class Layer:
  """One residual block: x += mixer(norm(x)); x += ffn(norm(x))."""

  mixer: MixerConfig
  ffn: MLPConfig | MoEConfig
  residual: Residual = Residual()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """prefix, then `period` repeated `repeats` times (scanned), then suffix."""

  vocab: Annotated[int, Whole(2)]
  d_model: Count
  period: tuple[Layer, ...]
  repeats: Size
  prefix: tuple[Layer, ...] = ()
  suffix: tuple[Layer, ...] = ()
  tied: bool = False  # the output head is the embedding table
  zero_centered: bool = False  # norm weights are 1 + w
  norm_eps: NotNegative = 1e-6
  # what the backward pass computes again; 'dots': all but products' outputs
  remat: Annotated[str, OneOf(('none', 'dots', 'full'))] = 'none'
  mtp: Layer | None = None  # block of the multi-token prediction; None: none

  def __post_init__(self):
    ranges.check_ranges(self, 'model')
    if not self.layers:
      raise ValueError('model has no layer; give a period and repeats >= 1')

  @property
  def layers(self) -> tuple[Layer, ...]:
    """Every layer in order."""
    return self.prefix + self.period * self.repeats + self.suffix


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, packed into rows of `seq_len` tokens."""

  path: str  # globs separated by commas; one that begins with '!' excludes
  seq_len: Count
  batch: Count  # rows of one optimizer step, all devices together
  tokenizer: str = 'bytes'  # or the path of a tokenizer.json
  field: str = 'text'  # the text's field in jsonl and parquet files
  heldout: Fraction = 0.05  # of the documents, never trained on
  seed: Annotated[int, Whole(0, None)] = 0

  def __post_init__(self):
    ranges.check_ranges(self, 'data')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, or Muon for hidden matrices with AdamW for everything else."""

  name: Annotated[str, OneOf(('adamw', 'muon'))] = 'adamw'
  lr: Positive = 3e-4
  muon_lr: Positive = 0.02  # step size of the Muon part
  # after the warm-up
  schedule: Annotated[str, OneOf(('cosine', 'wsd', 'constant'))] = 'cosine'
  warmup: Size = 100  # steps
  decay: NotNegative = 0.2  # wsd: the fraction of the steps that decays
  final: NotNegative = 0.1  # last rate as a fraction of the peak
  b1: BelowOne = 0.9
  b2: BelowOne = 0.95
  eps: NotNegative = 1e-8
  weight_decay: NotNegative = 0.1  # matrices only
  clip: Positive = 1.0  # global norm; a large one, as 1e9, clips nothing
  accumulate: Count = 1  # micro-batches of one step

  def __post_init__(self):
    ranges.check_ranges(self, 'optim')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: Count
  seed: Annotated[int, Whole(0, 2**32 - 1)] = 0  # all that a jax key takes
  # of the computation; parameters are float32
  dtype: Annotated[str, OneOf(('float32', 'bfloat16'))] = 'bfloat16'
  log_every: Count = 10
  eval_every: Count = 500
  eval_rows: Count = 64  # held-out rows of an evaluation during training
  save_every: Count = 500
  keep: Count = 2  # checkpoints
  objective: ObjectiveConfig = NextTokenConfig()

  def __post_init__(self):
    ranges.check_ranges(self, 'train')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; their product is the number of devices used.

  `sharding` says what each axis splits. One may be -1: as many as there are
  devices for, the others given.
  """

  replica: Devices = 1  # slices or pods
  data: Devices = 1
  fsdp: Devices = 1
  expert: Devices = 1
  seq: Devices = 1
  tensor: Devices = 1

  def __post_init__(self):
    ranges.check_ranges(self, 'mesh')
    sizes = dataclasses.asdict(self)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
      raise ValueError(
        f'mesh.{" and mesh.".join(open_axes)} are -1; give all but one'
      )

  def fill(self, devices: int) -> 'MeshConfig':
    """This mesh on so many devices: its -1, if there is one, as a number."""
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      if size == -1:
        others = -math.prod(sizes.values())
        if devices % others:
          raise ValueError(
            f'mesh.{axis} is -1 and the other axes take {others} devices, which'
            f' does not divide the {devices} that there are; change them'
          )
        return dataclasses.replace(self, **{axis: devices // others})
    return self


@dataclasses.dataclass(frozen=True)
class Experiment:
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    _check_mesh(self)
    if isinstance(self.model, ModelConfig):
      self.train.objective.check_model(self.model)


def _check_mesh(experiment):
  """Every size that the mesh splits must be a multiple of the devices there.

  Key heads and a vocabulary that are none stay whole on every device.
  """
  model, data, mesh = experiment.model, experiment.data, experiment.mesh
  if not isinstance(model, ModelConfig):
    return  # refused with its name by whoever reads the file

  def require_even(name, size, axes, parts=1):
    # what is -1 is checked once the devices are known
    split = {axis: abs(getattr(mesh, axis)) for axis in axes}
    devices = [f'mesh.{axis} {n}' for axis, n in split.items() if n > 1]
    if parts > 1:
      devices.insert(0, f'optim.accumulate {parts}')
    least = parts * math.prod(split.values())
    if size % least:
      raise ValueError(
        f'{name} {size} does not divide over {" x ".join(devices)}; make it a'
        f' multiple of {least} or change the mesh'
      )

  rows = ('replica', 'data', 'fsdp', 'expert')
  require_even('data.batch', data.batch, rows, experiment.optim.accumulate)
  require_even('data.seq_len', data.seq_len, ('seq',))
  require_even('model.d_model', model.d_model, ('fsdp', 'expert', 'seq'))
  mtp = () if model.mtp is None else (model.mtp,)
  for layer in (*model.layers, *mtp):
    for part in (getattr(layer, 'mixer', None), getattr(layer, 'ffn', None)):
      for field, axis in _SPLIT.items():
        size = getattr(part, field, 0)
        require_even(f'{type(part).__name__}.{field}', size, (axis,))
  require_even(
    '2 x model.d_model of the MTP', 2 * len(mtp) * model.d_model, ('tensor',)
  )


# of a mixer or ffn: which axis of the mesh splits what
_SPLIT = {
  'heads': 'tensor',
  'value_heads': 'tensor',
  'index_heads': 'tensor',
  'hidden': 'tensor',
  'shared': 'tensor',
  'experts': 'expert',
}
