"""Maps released tensors to slices of the weights of a model."""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.hf import common, layout
from deltanet_jax.hf.common import Family, Mtp
from deltanet_jax.hf.layout import Layout, Rules, Shape, TensorRule
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.parallel.sharding import Params

Path = tuple[str, ...]  # of a weight in the parameters


class Slot(NamedTuple):
  """A slice of a weight: its path in the parameters and leading indices."""

  path: Path
  indices: tuple[int, ...]
  weight: Shape  # shape of the whole weight

  @property
  def shape(self) -> Shape:
    """The shape of the slice."""
    return self.weight[len(self.indices) :]


class Entry(NamedTuple):
  """A released tensor: its name, slots and layout."""

  name: str
  slots: tuple[Slot, ...]
  layout: Layout

  @property
  def shape(self) -> Shape:
    """The shape of the released tensor."""
    return self.layout.shape([slot.shape for slot in self.slots])

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """The values of its slots; rows of `tensor` beyond `shape` are ignored."""
    shapes = [slot.shape for slot in self.slots]
    return self.layout.split(tensor[: self.shape[0]], shapes)


def build_plan(
  family: Family,
  cfg: ModelConfig,
  params: Params,
  spelling: Spelling | None = None,
) -> list[Entry]:
  """All Entries of a model in the order of its layers.

  params: nested dict of anything with a shape   spelling: the `Spelling` of a
  folder, whose names and storage formats the entries use; default: those of the
  release

  Raises:
    ValueError: the entries do not hold every element of every weight once.
  """

  def list_entries(ways: Sequence[Rules], *place: Any) -> list[Entry]:
    """Entries by one of several sets of rules; place: as for `_entries`."""
    named = lambda rules: [
      entry
      for rule in rules
      for entry in _entries(rule, params, spelling, *place)
    ]
    rules = ways[0]
    if spelling is not None:
      count = spelling.count
      for other in (*ways, *map(layout.stack_experts, ways)):
        present = lambda rules: count(entry.name for entry in named(rules))
        rules = _closer(rules, other, present)
    return named(rules)

  rules = common.make_top_rules(cfg)
  if cfg.mtp is not None:
    rules += _require_mtp(family).rules(cfg)
  entries = list_entries([rules])
  for i, layer in enumerate(cfg.layers):
    ways = [way(layer) for way in family.layer_rules]
    entries += list_entries(ways, *locate_layer(cfg, i), i)
  _require_cover(entries, params, family.name)
  return entries


def _closer(
  rules: Rules,
  others: Sequence[TensorRule],
  present: Callable[[Sequence[TensorRule]], tuple[bool, int]],
) -> Rules:
  """`rules`, with those of `others` for weights where they find more tensors.

  present: rules -> (whether a folder has all their tensors, how many)
  """
  rest = [rule for rule in others if rule not in rules]
  while rest:
    weights, size = set(rest[0].ours), 0
    while len(weights) > size:  # the closure over rules of both sides
      size = len(weights)
      ours = [rule for rule in rules if weights & set(rule.ours)]
      theirs = [rule for rule in rest if weights & set(rule.ours)]
      weights = weights.union(*(rule.ours for rule in (*ours, *theirs)))
    whole, count = present(ours)
    if not whole and present(theirs) > (whole, count):
      rules = (*(rule for rule in rules if rule not in ours), *theirs)
    rest = [rule for rule in rest if rule not in theirs]
  return rules


def build_copies(
  family: Family, cfg: ModelConfig, params: Params, spelling: Spelling | None
) -> list[Entry]:
  """Entries of tensors that repeat weights of `build_plan`."""
  rules = common.make_copies(cfg)
  if cfg.mtp is not None:
    rules += _require_mtp(family).copies(cfg)
  return [entry for rule in rules for entry in _entries(rule, params, spelling)]


def _require_mtp(family: Family) -> Mtp:
  if family.mtp is None:
    raise ValueError(
      f'model.mtp is set and {family.name} has no multi-token prediction; set'
      ' it to None'
    )
  return family.mtp


def locate_layer(cfg: ModelConfig, i: int) -> tuple[Path, tuple[int, ...]]:
  """Path and leading index of the parameters of layer i."""
  first, size = len(cfg.prefix), len(cfg.period)
  last = first + size * cfg.repeats
  if i < first:
    return ('backbone', 'prefix', f'layer_{i}'), ()
  if i >= last:
    return ('backbone', 'suffix', f'layer_{i - last}'), ()
  repeat, within = divmod(i - first, size)
  return ('backbone', 'period', f'layer_{within}'), (repeat,)


def _entries(
  rule: TensorRule,
  params: Params,
  spelling: Spelling | None,
  path: Path = (),
  indices: tuple[int, ...] = (),
  layer: int | None = None,
) -> Iterator[Entry]:
  paths = [(*path, *name.split('.')) for name in rule.ours]
  shapes = [get_leaf(params, path).shape for path in paths]
  name = rule.name.replace('{layer}', str(layer))
  experts: list[tuple[int, ...]] = [()]
  if '{expert}' in name:
    experts = [(e,) for e in range(shapes[0][len(indices)])]
  for expert in experts:
    at = indices + expert
    slots = tuple(
      Slot(path, at, tuple(shape))
      for path, shape in zip(paths, shapes, strict=True)
    )
    released = name.replace('{expert}', str(expert[0]) if expert else '')
    yield Entry(
      spelling.choose_name(released) if spelling else released,
      slots,
      rule.layout,
    )


def get_leaf(params: Params, path: Path) -> jax.Array:
  """A weight by its path."""
  tree: Any = params
  return functools.reduce(operator.getitem, path, tree)


def list_leaves(tree: Params) -> Iterable[tuple[Path, jax.Array]]:
  """(path, leaf) of a nested dict."""
  return flatten_dict(tree).items()


def _require_cover(
  entries: Sequence[Entry], params: Params, family: str
) -> None:
  sizes: Counter[Path] = Counter()
  for entry in entries:
    for slot in entry.slots:
      sizes[slot.path] += math.prod(slot.shape)
  for path, weight in list_leaves(params):
    if sizes[path] != math.prod(weight.shape):
      raise ValueError(
        f'the rules of {family} hold {sizes[path]} of the'
        f' {math.prod(weight.shape)} elements of {".".join(path)}; this model'
        f' is not a {family}'
      )
