"""The configuration of a run: model, data, optimizer, training and mesh.

Standard library only: configurations are read, changed and checked before
jax is imported. A file in `configs/` returns an `Experiment`.
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
  """Mixture of experts: every token is routed to `top` of `experts` gated MLPs.

  `ops.routing` has the equations.
  """

  experts: Count
  top: Count
  hidden: Count  # width of an expert
  score: Annotated[str, OneOf(('softmax', 'sigmoid'))] = 'softmax'
  bias: bool = False  # a bias of the scores, for the selection alone
  groups: Count = 1  # of experts, all of one size
  top_groups: Count = 1  # groups that a token's experts are chosen from
  renormalize: bool = True  # divide the weights by their sum
  eps: NotNegative = 0.0  # added to that sum
  scale: Positive = 1.0  # factor of the weights
  shared: Size = 0  # width of an expert that every token goes to; 0: none
  shared_gate: bool = False  # multiply its output by sigmoid(x w)

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
  """How a branch f (mixer or ffn) is added to the residual stream x, N a norm.

  form: 'pre': x + f(N(x)); 'post': x + N(f(x)) (OLMo 2);
  'normed': alpha h + beta f(h) with h = N(x) (DeepNorm of MiniMax-01)
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
  """A layer: a mixer and an ffn, each a branch of the residual stream."""

  mixer: MixerConfig
  ffn: MLPConfig | MoEConfig
  residual: Residual = Residual()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A model's layers: prefix, the block `period` repeated `repeats` times (by
  a scan), suffix; and its embedding and head."""

  vocab: Annotated[int, Whole(2)]  # at least as many as the tokenizer has ids
  d_model: Count
  period: tuple[Layer, ...]
  repeats: Size
  prefix: tuple[Layer, ...] = ()
  suffix: tuple[Layer, ...] = ()
  tied: bool = False  # use the embedding table as the output head
  zero_centered: bool = False  # norm weights are 1 + w
  norm_eps: NotNegative = 1e-6
  # what the backward pass recomputes; 'dots': all but outputs of matmuls
  remat: Annotated[str, OneOf(('none', 'dots', 'full'))] = 'none'
  mtp: Layer | None = None  # layer of the multi-token prediction; None: none

  def __post_init__(self):
    ranges.check_ranges(self, 'model')
    if not self.layers:
      raise ValueError('model has no layer; give a period and repeats >= 1')
    for layer in self.layers:
      if isinstance(layer, MixerConfig):
        raise ValueError(
          f'a layer of the model is {type(layer).__name__}; give'
          ' Layer(mixer, ffn)'
        )

  @property
  def layers(self) -> tuple[Layer, ...]:
    """Every layer in order."""
    return self.prefix + self.period * self.repeats + self.suffix


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, packed into rows of `seq_len` tokens."""

  path: str  # globs separated by commas; one that begins with '!' excludes
  seq_len: Count
  batch: Count  # rows of an optimizer step, over all devices
  tokenizer: str = 'bytes'  # or the path of a tokenizer.json
  field: str = 'text'  # name of the text's field in jsonl and parquet files
  heldout: Fraction = 0.05  # fraction of the documents that are held out
  seed: Annotated[int, Whole(0, None)] = 0

  def __post_init__(self):
    ranges.check_ranges(self, 'data')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, or Muon for hidden matrices with AdamW for everything else."""

  name: Annotated[str, OneOf(('adamw', 'muon'))] = 'adamw'
  lr: Positive = 3e-4
  muon_lr: Positive = 0.02  # step size of the Muon part
  # of the learning rate, after the warm-up
  schedule: Annotated[str, OneOf(('cosine', 'wsd', 'constant'))] = 'cosine'
  warmup: Size = 100  # steps
  decay: NotNegative = (
    0.2  # of 'wsd': fraction of the steps with a falling rate
  )
  final: NotNegative = 0.1  # last rate as a fraction of the peak
  b1: BelowOne = 0.9
  b2: BelowOne = 0.95
  eps: NotNegative = 1e-8
  weight_decay: NotNegative = 0.1  # matrices only
  clip: Positive = 1.0  # largest global norm of the gradient; 1e9: no clipping
  accumulate: Count = 1  # micro-batches of a step (gradient accumulation)

  def __post_init__(self):
    ranges.check_ranges(self, 'optim')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, precision, logging and checkpoints of a training run."""

  steps: Count
  seed: Annotated[int, Whole(0, 2**32 - 1)] = 0  # the range of a jax key
  # of activations and matmuls; parameters are float32
  dtype: Annotated[str, OneOf(('float32', 'bfloat16'))] = 'bfloat16'
  log_every: Count = 10
  eval_every: Count = 500
  eval_rows: Count = 64  # held-out rows of an evaluation during training
  save_every: Count = 500
  keep: Count = 2  # number of checkpoints
  objective: ObjectiveConfig = NextTokenConfig()

  def __post_init__(self):
    ranges.check_ranges(self, 'train')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The size of each mesh axis; their product is the number of devices used.

  `parallel.sharding` documents what each axis splits. One size may be -1: all
  devices that the other axes leave.
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
    """Returns this mesh with -1, if there is one, replaced for `devices`."""
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
  """The whole configuration of a training run."""

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
  """Refuses a size that a mesh axis splits and does not divide.

  Key heads and the vocabulary are not checked: they are replicated then.
  """
  model, data, mesh = experiment.model, experiment.data, experiment.mesh
  if not isinstance(model, ModelConfig):
    return  # `check_types` refuses it with its name

  def require_even(name, size, axes, parts=1):
    # -1 is checked once the number of devices is known
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


# fields of a mixer or ffn, and the mesh axis that splits each
_SPLIT = {
  'heads': 'tensor',
  'value_heads': 'tensor',
  'index_heads': 'tensor',
  'hidden': 'tensor',
  'shared': 'tensor',
  'experts': 'expert',
}
