"""Finds prefix, repeated period and suffix in a list of layers."""

import typing
from collections.abc import Sequence

L = typing.TypeVar('L')


def fold_layers(
  layers: Sequence[L],
) -> tuple[tuple[L, ...], tuple[L, ...], int, tuple[L, ...]]:
  """Splits layers into (prefix, period, repeats, suffix).

  Of all splits that with the fewest layers to compile, then the shortest prefix
  and period. Layers without a repetition are one period.
  """
  layers, n = tuple(layers), len(layers)
  best = (n, 0, n, 1)
  for first in range(n):
    for size in range(1, (n - first) // 2 + 1):
      period = layers[first : first + size]
      repeats = 1
      while layers[first + repeats * size : first + (repeats + 1) * size] == (
        period
      ):
        repeats += 1
      if repeats > 1:
        distinct = n - (repeats - 1) * size
        best = min(best, (distinct, first, size, repeats))
  _, first, size, repeats = best
  last = first + size * repeats
  return layers[:first], layers[first : first + size], repeats, layers[last:]
