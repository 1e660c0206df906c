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


def build(family, cfg, params, spelling=None):
  """Every Entry of a model, in the order of its layers.

  params: nested dict of anything with a shape   spelling: `Spelling` of a
  folder, whose names the entries take, and whose ways of storing each layer;
  without it both are the released ones

  The entries hold every element of every weight once; otherwise the family's
  rules are wrong.

  Raises:
    ValueError: they do not.
  """
  rules = family.top_rules(cfg)
  if cfg.mtp is not None:
    _require_mtp(family)
    rules = (*rules, *family.mtp.rules(cfg))
  groups = [((rules,), (), (), None)]
  for i, layer in enumerate(cfg.layers):
    ways = [way(layer) for way in family.layer_rules]
    groups.append((ways, *place(cfg, i), i))
  entries = []
  for ways, path, index, layer in groups:
    named = lambda rules, at=(path, index, layer): [
      entry for rule in rules for entry in _entries(rule, params, *at, spelling)
    ]
    rules = ways[0]
    if spelling is not None:
      found = lambda rules, named=named: spelling.count(
        entry.name for entry in named(rules)
      )
      for other in (*ways, *map(layout.stacked, ways)):
        rules = _closer(rules, other, found)
    entries += named(rules)
  _require_cover(entries, params, family.name)
  return entries


def _closer(rules, others, found):
  """`rules`, but those of `others` for weights of which they find more.

  found: rules -> (whether a folder has all their tensors, how many)
  """
  others = [rule for rule in others if rule not in rules]
  while others:
    weights, size = set(others[0].ours), 0
    while len(weights) > size:  # all that rules on either side tie together
      size = len(weights)
      ours = [rule for rule in rules if weights & set(rule.ours)]
      theirs = [rule for rule in others if weights & set(rule.ours)]
      weights = weights.union(*(rule.ours for rule in (*ours, *theirs)))
    have = found(ours)
    if not have[0] and found(theirs) > have:
      rules = [*(rule for rule in rules if rule not in ours), *theirs]
    others = [rule for rule in others if rule not in theirs]
  return rules


def copies(family, cfg, params, spelling):
  """Entries of tensors that repeat weights which `build` already has."""
  rules = common.copies(cfg)
  if cfg.mtp is not None:
    rules += family.mtp.copies(cfg)
  return [
    entry
    for rule in rules
    for entry in _entries(rule, params, (), (), None, spelling)
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


def _entries(rule, params, path, index, layer, spelling):
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
    one = name.replace('{expert}', str(expert[0]) if expert else '')
    yield Entry(spelling.expected(one) if spelling else one, slots, rule.layout)


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
