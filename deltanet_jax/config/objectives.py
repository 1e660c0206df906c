"""The configurations of training objectives. Standard library only: each class
names the module that implements it, as a mixer's configuration does.
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, ClassVar

from deltanet_jax.config import ranges
from deltanet_jax.config.mixers import DSAConfig
from deltanet_jax.config.ranges import NotNegative

if TYPE_CHECKING:
  from jax.typing import DTypeLike

  from deltanet_jax.config.experiment import ModelConfig


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """Base class: an objective's configuration makes it and checks the model."""

  module: ClassVar[str]  # 'package.module:Class' of an `Objective`

  def make(self, model: 'ModelConfig', dtype: 'DTypeLike') -> object:
    """Returns the `objectives.base.Objective` of a model, run in `dtype`."""
    path, name = self.module.split(':')
    return getattr(importlib.import_module(path), name)(self, model, dtype)

  def check_model(self, model: 'ModelConfig') -> None:
    """Raises ValueError for a model that lacks what the objective needs."""


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
  """The weights, per token, of the next-token loss and the auxiliary losses.
  The loss that is reported is that of the next token alone."""

  module = 'deltanet_jax.objectives.next_token:NextToken'

  next: NotNegative = 1.0  # next-token loss; 0: to warm up an indexer alone
  further: NotNegative = 0.0  # multi-token prediction, needs model.mtp
  balance: NotNegative = 0.0  # load balance of the experts
  indexer: NotNegative = 0.0  # divergence of DSA's indexers, summed over layers
  bias_rate: NotNegative = 0.0  # update rate of the experts' selection biases

  def __post_init__(self):
    ranges.check_ranges(self, 'train.objective')
    if not (self.next or self.further or self.balance or self.indexer):
      raise ValueError(
        'train.objective has next, further, balance and indexer at 0, and'
        ' nothing to learn; give one of them a weight'
      )

  def check_model(self, model: 'ModelConfig') -> None:
    # `check_types` refuses what is no Layer, with its name
    layers = [x for x in model.layers if dataclasses.is_dataclass(x)]
    needs = {
      'further': (model.mtp, 'give model.mtp'),
      'balance': (
        any(hasattr(layer.ffn, 'experts') for layer in layers),
        'use a MoEConfig',
      ),
      'bias_rate': (
        any(getattr(layer.ffn, 'bias', False) for layer in layers),
        'use a MoEConfig with bias',
      ),
      'indexer': (
        any(isinstance(layer.mixer, DSAConfig) for layer in layers),
        'use a DSAConfig',
      ),
    }
    for name, (there, change) in needs.items():
      if getattr(self, name) and not there:
        raise ValueError(
          f'train.objective.{name} is {getattr(self, name)} and the model has'
          f' nothing for it; {change} or leave it at 0'
        )
