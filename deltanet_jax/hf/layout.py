"""Layouts of released tensors: transposed, fused, flattened.

Released matrices are [out, in]; ours are [in..., out...] with separate axes for
heads. A layout computes the shape of the released tensor from the shapes of our
weights, and converts values both ways:

  shape(shapes) -> tuple   split(tensor, shapes) -> weights   join(weights)

`weights` are the parts of a released tensor, in the order of its rule.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


class Same(NamedTuple):
  """A weight, unchanged."""

  def shape(self, shapes: Shapes) -> Shape:
    return tuple(shapes[0])

  def split(self, tensor: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    del shapes
    return [tensor]

  def join(self, weights: Sequence[np.ndarray]) -> np.ndarray:
    return weights[0]


class Flat(NamedTuple):
  """A weight as a vector, with axes of size one around it."""

  before: int = 0
  after: int = 0

  def shape(self, shapes: Shapes) -> Shape:
    return (1,) * self.before + (math.prod(shapes[0]),) + (1,) * self.after

  def split(self, tensor: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    return [tensor.reshape(shapes[0])]

  def join(self, weights: Sequence[np.ndarray]) -> np.ndarray:
    return weights[0].reshape(self.shape([weights[0].shape]))


class Linear(NamedTuple):
  """Matrices [out, in], possibly several fused along `out`.

  With G groups the fused rows are G times [share of part 0, share of part 1,
  ...]: heads of qkvz in Qwen3-Next, of queries with gates, of keys with values.
  """

  inward: int = 1  # input axes of ours, after the leading ones
  groups: int = 1
  lead: int = 0  # leading axes of both: fused experts

  def shape(self, shapes: Shapes) -> Shape:
    first = shapes[0]
    n = self.lead + self.inward
    out = sum(math.prod(shape[n:]) for shape in shapes)
    return (*first[: self.lead], out, math.prod(first[self.lead : n]))

  def split(self, tensor: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    lead = tensor.shape[: self.lead]
    n, (out, width) = self.lead + self.inward, tensor.shape[self.lead :]
    groups = np.swapaxes(tensor, -1, -2).reshape(
      *lead, width, self.groups, out // self.groups
    )
    widths = [math.prod(shape[n:]) // self.groups for shape in shapes]
    parts = np.split(groups, np.cumsum(widths)[:-1], axis=-1)
    return [
      part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
    ]

  def join(self, weights: Sequence[np.ndarray]) -> np.ndarray:
    n = self.lead + self.inward
    first = weights[0].shape
    rows = (*first[: self.lead], math.prod(first[self.lead : n]))
    parts = [w.reshape(*rows, self.groups, -1) for w in weights]
    fused = np.concatenate(parts, axis=-1).reshape(*rows, -1)
    return np.swapaxes(fused, -1, -2)


class Conv(NamedTuple):
  """Taps of depthwise convolutions [channels, 1, W], concatenated."""

  def shape(self, shapes: Shapes) -> Shape:
    channels, taps = Linear().shape(shapes)
    return channels, 1, taps

  def split(self, tensor: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    return Linear().split(tensor[:, 0], shapes)

  def join(self, weights: Sequence[np.ndarray]) -> np.ndarray:
    return Linear().join(weights)[:, None]


Layout = Same | Flat | Linear | Conv


class TensorRule(NamedTuple):
  """A released name, our weights in it, and their layout.

  '{layer}' and '{expert}' in the name stand for numbers; a tensor of an expert
  is a slice of the first axis of our weights. Our names are paths in the layer,
  or in the model if the name has no layer.
  """

  name: str
  ours: tuple[str, ...]
  layout: Layout


Rules = tuple[TensorRule, ...]
SAME = Same()


def make_rule(name: str, ours: str, layout: Layout = SAME) -> TensorRule:
  """A TensorRule.   ours: our names, separated by spaces"""
  return TensorRule(name, tuple(ours.split()), layout)


def stack_experts(rules: Rules) -> Rules:
  """Rules with all experts of a layer in two tensors, as in transformers 5:
  gate_up_proj [E,2F,D] and down_proj [E,D,F]."""
  single = [r for r in rules if '{expert}' in r.name]
  if not single:
    return rules
  gate, up, down = (r.ours[0] for r in single)
  at = single[0].name.split('{expert}')[0]
  return (
    *(r for r in rules if r not in single),
    make_rule(f'{at}gate_up_proj', f'{gate} {up}', Linear(lead=1)),
    make_rule(f'{at}down_proj', down, Linear(lead=1)),
  )
