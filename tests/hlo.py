"""What a compiled program says to other devices, from its text."""

import math
import re
from typing import NamedTuple

KINDS = (
  'all-gather|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all'
  '|all-to-all|collective-broadcast'
)
_LINE = re.compile(rf'= (\(?\S.*?) ({KINDS})(?:-start)?\(')
_ARRAY = re.compile(r'([a-z]+)(\d+)\w*\[([\d,]*)\]')


class Collective(NamedTuple):
  kind: str
  shapes: tuple  # of its results on one device
  bytes: int


def collectives(text):
  """Every collective of a compiled program; one inside a loop counts once."""
  return [
    Collective(
      kind,
      tuple(
        tuple(map(int, filter(None, sizes.split(','))))
        for _, _, sizes in _ARRAY.findall(result)
      ),
      sum(
        int(bits) // 8 * math.prod(map(int, filter(None, sizes.split(','))))
        for _, bits, sizes in _ARRAY.findall(result)
      ),
    )
    for result, kind in _LINE.findall(text)
  ]
