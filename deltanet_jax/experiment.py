"""What a run is: the configuration of model, data, optimiser, training, mesh.

Standard library only: configurations are read, changed and checked before
jax is imported. A file in `configs/` returns one `Experiment`.
"""

import dataclasses
import math

from deltanet_jax.mixers.config import DSAConfig, MixerConfig


def _choice(name, value, options):
  if value not in options:
    raise ValueError(f'{name} is {value!r}; give one of {", ".join(options)}')


def _at_least(name, value, least):
  if value < least:
    raise ValueError(f'{name} is {value}; give {least} or more')


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Gated MLP: (silu(x gate) * (x up)) down."""

  hidden: int

  def __post_init__(self):
    _at_least('MLPConfig.hidden', self.hidden, 1)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Mixture of experts: every token goes to `top` of `experts` gated MLPs."""

  experts: int
  top: int
  hidden: int  # width of an expert
  score: str = 'softmax'  # or 'sigmoid', of the router's logits
  bias: bool = False  # added to the scores for the choice alone
  groups: int = 1  # equal groups of experts, of which
  top_groups: int = 1  # these are open to a token
  renormalise: bool = True  # weights divided by their sum
  eps: float = 0.0  # added to that sum
  scale: float = 1.0  # of the weights
  shared: int = 0  # width of an expert that takes every token; 0: none
  shared_gate: bool = False  # it is multiplied by sigmoid(x w)

  def __post_init__(self):
    _choice('MoEConfig.score', self.score, ('softmax', 'sigmoid'))
    for name in ('experts', 'top', 'hidden', 'groups', 'top_groups'):
      _at_least(f'MoEConfig.{name}', getattr(self, name), 1)
    _at_least('MoEConfig.shared', self.shared, 0)
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

  form: str = 'pre'
  alpha: float = 1.0
  beta: float = 1.0

  def __post_init__(self):
    _choice('Residual.form', self.form, ('pre', 'post', 'normed'))
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

  vocab: int
  d_model: int
  period: tuple[Layer, ...]
  repeats: int
  prefix: tuple[Layer, ...] = ()
  suffix: tuple[Layer, ...] = ()
  tied: bool = False  # the output head is the embedding table
  zero_centred: bool = False  # norm weights are 1 + w
  norm_eps: float = 1e-6
  remat: str = 'none'  # 'none', 'dots' (keep matmul outputs) or 'full'
  mtp: Layer | None = None  # block of the multi-token prediction; None: none

  def __post_init__(self):
    _choice('model.remat', self.remat, ('none', 'dots', 'full'))
    _at_least('model.vocab', self.vocab, 2)
    _at_least('model.d_model', self.d_model, 1)
    _at_least('model.repeats', self.repeats, 0)
    if not self.layers:
      raise ValueError('model has no layer; give a period and repeats >= 1')

  @property
  def layers(self):
    """Every layer in order."""
    return self.prefix + self.period * self.repeats + self.suffix


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, packed into rows of `seq_len` tokens."""

  path: str  # globs separated by commas; one that begins with '!' excludes
  seq_len: int
  batch: int  # rows of one optimiser step, all devices together
  tokenizer: str = 'bytes'  # or the path of a tokenizer.json
  field: str = 'text'  # the text's field in jsonl and parquet files
  heldout: float = 0.05  # fraction of the documents never trained on
  seed: int = 0

  def __post_init__(self):
    _at_least('data.seq_len', self.seq_len, 1)
    _at_least('data.batch', self.batch, 1)
    _at_least('data.seed', self.seed, 0)
    if not 0 < self.heldout < 1:
      raise ValueError(
        f'data.heldout is {self.heldout}; give a fraction between 0 and 1'
      )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, or Muon for hidden matrices with AdamW for everything else."""

  name: str = 'adamw'
  lr: float = 3e-4
  muon_lr: float = 0.02  # step size of the Muon part
  schedule: str = 'cosine'  # 'cosine', 'wsd' or 'constant', after the warm-up
  warmup: int = 100  # steps
  decay: float = 0.2  # wsd: the fraction of the steps that decays
  final: float = 0.1  # last rate as a fraction of the peak
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # matrices only
  clip: float = 1.0  # global norm
  accumulate: int = 1  # micro-batches of one step

  def __post_init__(self):
    _choice('optim.name', self.name, ('adamw', 'muon'))
    _choice('optim.schedule', self.schedule, ('cosine', 'wsd', 'constant'))
    _at_least('optim.accumulate', self.accumulate, 1)
    _at_least('optim.warmup', self.warmup, 0)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What training minimises per token, each with its weight; what it reports
  as the loss is the next token's alone."""

  next: float = 1.0  # nats of the next token; 0 while an indexer warms up
  further: float = 0.0  # nats of the token after it, by model.mtp
  balance: float = 0.0  # balance loss of the experts
  indexer: float = 0.0  # the indexers' divergence, summed over layers
  bias_rate: float = 0.0  # step of the routers' selection biases

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _at_least(f'train.objective.{field.name}', getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int
  seed: int = 0
  dtype: str = 'bfloat16'  # of the computation; parameters are float32
  log_every: int = 10
  eval_every: int = 500
  eval_rows: int = 64  # held-out rows of an evaluation during training
  save_every: int = 500
  keep: int = 2  # checkpoints
  objective: ObjectiveConfig = ObjectiveConfig()

  def __post_init__(self):
    _choice('train.dtype', self.dtype, ('float32', 'bfloat16'))
    for name in (
      'steps',
      'log_every',
      'eval_every',
      'eval_rows',
      'save_every',
      'keep',
    ):
      _at_least(f'train.{name}', getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; their product is the number of devices used.

  `sharding` says what each axis splits. One may be -1: as many as there are
  devices for, the others given.
  """

  replica: int = 1  # slices or pods
  data: int = 1
  fsdp: int = 1
  expert: int = 1
  seq: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
      raise ValueError(
        f'mesh.{" and mesh.".join(open_axes)} are -1; give all but one'
      )
    for axis, size in sizes.items():
      if size != -1:
        _at_least(f'mesh.{axis}', size, 1)

  def filled(self, devices):
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
    _check_objective(self.model, self.train.objective)


def _check_mesh(experiment):
  """Every size that the mesh splits must be a multiple of the devices there.

  Key heads and a vocabulary that are none stay whole on every device.
  """
  model, data, mesh = experiment.model, experiment.data, experiment.mesh
  if not isinstance(model, ModelConfig):
    return  # refused with its name by whoever reads the file

  def check(name, size, axes, parts=1):
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
  check('data.batch', data.batch, rows, experiment.optim.accumulate)
  check('data.seq_len', data.seq_len, ('seq',))
  check('model.d_model', model.d_model, ('fsdp', 'expert', 'seq'))
  mtp = () if model.mtp is None else (model.mtp,)
  for layer in (*model.layers, *mtp):
    for part in (getattr(layer, 'mixer', None), getattr(layer, 'ffn', None)):
      for field, axis in _SPLIT.items():
        size = getattr(part, field, 0)
        check(f'{type(part).__name__}.{field}', size, (axis,))
  check(
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


def _check_objective(model, objective):
  """Every weight needs the part of the model that it is about."""
  some = lambda test: lambda: any(map(test, model.layers))
  needs = {
    'further': (lambda: model.mtp, 'give model.mtp'),
    'balance': (
      some(lambda layer: isinstance(layer.ffn, MoEConfig)),
      'use a MoEConfig',
    ),
    'bias_rate': (
      some(lambda layer: getattr(layer.ffn, 'bias', False)),
      'use a MoEConfig with bias',
    ),
    'indexer': (
      some(lambda layer: isinstance(layer.mixer, DSAConfig)),
      'use a DSAConfig',
    ),
  }
  for name, (found, change) in needs.items():
    if getattr(objective, name) and not found():
      raise ValueError(
        f'train.objective.{name} is {getattr(objective, name)} and the model'
        f' has nothing for it; {change} or leave it at 0'
      )
