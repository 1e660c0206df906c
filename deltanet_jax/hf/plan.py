"""Which released tensor holds which slices of which weights, for one model."""

import math
from typing import NamedTuple

from deltanet_jax.hf import common, layout


class Slot(NamedTuple):
  """A slice of a weight: its path in the parameters, leading indices, shape."""

  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]


class Entry(NamedTuple):
  """A released tensor: its name, what it holds, how."""

  name: str
  slots: tuple[Slot, ...]
  layout: layout.Same | layout.Flat | layout.Linear | layout.Conv

  @property
  def shape(self):
    """Of the released tensor."""
    return self.layout.shape([slot.shape for slot in self.slots])


def build(family, cfg, params, way=0):
  """Every Entry of a model, in the order of its layers.

  params: nested dict of anything with a shape   way: of family.layer_rules

  The entries hold every element of every weight once; otherwise the family's
  rules are wrong.

  Raises:
    ValueError: they do not.
  """
  entries = []
  rules = family.top_rules(cfg)
  if cfg.mtp is not None:
    _require_mtp(family)
    rules = (*rules, *family.mtp.rules(cfg))
  for rule in rules:
    entries += _entries(rule, params, (), (), None)
  for i, layer in enumerate(cfg.layers):
    path, index = place(cfg, i)
    for rule in family.layer_rules[way](layer):
      entries += _entries(rule, params, path, index, i)
  _require_cover(entries, params, family.name)
  return entries


def copies(family, cfg, params):
  """Entries of tensors that repeat weights which `build` already has."""
  rules = common.copies(cfg)
  if cfg.mtp is not None:
    rules += family.mtp.copies(cfg)
  return [
    entry for rule in rules for entry in _entries(rule, params, (), (), None)
  ]


def _require_mtp(family):
  if family.mtp is None:
    raise ValueError(
      f'model.mtp is set and {family.name} has no multi-token prediction; set'
      ' it to None'
    )


def place(cfg, i):
  """Path and leading index of layer i's parameters."""
  first, size = len(cfg.prefix), len(cfg.period)
  last = first + size * cfg.repeats
  if i < first:
    return ('backbone', 'prefix', f'layer_{i}'), ()
  if i >= last:
    return ('backbone', 'suffix', f'layer_{i - last}'), ()
  repeat, within = divmod(i - first, size)
  return ('backbone', 'period', f'layer_{within}'), (repeat,)


def _entries(rule, params, path, index, layer):
  paths = [(*path, *name.split('.')) for name in rule.ours]
  shapes = [leaf(params, path).shape for path in paths]
  name = rule.name.replace('{layer}', str(layer))
  experts = [()]
  if '{expert}' in name:
    experts = [(e,) for e in range(shapes[0][len(index)])]
  for expert in experts:
    at = index + expert
    slots = tuple(
      Slot(path, at, tuple(shape[len(at) :]))
      for path, shape in zip(paths, shapes, strict=True)
    )
    number = str(expert[0]) if expert else ''
    yield Entry(name.replace('{expert}', number), slots, rule.layout)


def leaf(params, path):
  for key in path:
    params = params[key]
  return params


def leaves(tree, path=()):
  """(path, leaf) of a nested dict."""
  if not isinstance(tree, dict):
    yield path, tree
    return
  for key in tree:
    yield from leaves(tree[key], (*path, key))


def _require_cover(entries, params, family):
  held = {}
  for entry in entries:
    for slot in entry.slots:
      size = math.prod(slot.shape)
      held[slot.path] = held.get(slot.path, 0) + size
  for path, weight in leaves(params):
    if held.get(path, 0) != math.prod(weight.shape):
      raise ValueError(
        f'the rules of {family} hold {held.get(path, 0)} of the'
        f' {math.prod(weight.shape)} elements of {".".join(path)}; this model'
        f' is no {family}'
      )
