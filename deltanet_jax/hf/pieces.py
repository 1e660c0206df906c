"""The Orbax pieces of a converted folder.

A piece holds a weight of one layer, or as many of its experts, one after
another, as have PIECE numbers together: memory is bounded by the largest
released tensor and not by a layer's experts.
"""

import collections
import json
import math
import pathlib
import zlib
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from deltanet_jax.config import ConfigError

PIECE = 2**25
SUMS, FOLDER = 'sums.jsonl', 'pieces'


class ConversionError(RuntimeError):
  """What was written does not read back as it was."""


class Place(NamedTuple):
  """Where a slot's values are: a piece, an index in it, the piece's shape."""

  piece: str
  index: tuple[int, ...]
  shape: tuple[int, ...]


def place(slot, weight):
  """The Place of a Slot; weight: the shape of the whole weight."""
  name = '.'.join(slot.path)
  layer, expert = slot.index, ()
  if slot.path[1] != 'period':
    layer, expert = (), slot.index
  elif len(slot.index) > 1:
    layer, expert = slot.index[:1], slot.index[1:]
  if layer:
    name += f'.{layer[0]}'
  if not expert:
    return Place(name, (), slot.shape)
  together = max(1, PIECE // math.prod(slot.shape))
  first = expert[0] // together * together
  count = min(together, weight[len(layer)] - first)
  return Place(f'{name}.{first}', (expert[0] - first,), (count, *slot.shape))


def crc(array):
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def sums(folder):
  """{name: CRC-32} of finished pieces and scales; half a line is none, nor is
  any other that `note` does not write."""
  path, found = pathlib.Path(folder) / SUMS, {}
  for line in path.read_bytes().splitlines() if path.is_file() else ():
    try:
      name, value = json.loads(line)
      found |= {name: value}
    except (ValueError, TypeError, RecursionError):
      continue
  return found


def note(folder, name, value):
  """Adds a finished piece to `sums`."""
  with open(pathlib.Path(folder) / SUMS, 'a') as f:
    f.write('\n' + json.dumps([name, value]))


class Writer:
  """Gathers the slots of pieces; writes each when it is whole.

  places: of every slot that will come
  """

  def __init__(self, folder, places):
    self._folder = pathlib.Path(folder)
    self.done = set(sums(folder))
    self._waiting = collections.Counter(place.piece for place in places)
    self._buffers = {}
    self._orbax = ocp.StandardCheckpointer()

  def add(self, place, values):
    """Raises:
    ConfigError: experts of one layer have several types.
    ConversionError: a piece does not read back as it was written.
    """
    name = place.piece
    if name in self.done:
      return
    if not place.index:
      self._save(name, values)
      return
    if name not in self._buffers:
      self._buffers[name] = np.empty(place.shape, values.dtype)
    if self._buffers[name].dtype != values.dtype:
      raise ConfigError(
        f'{name}: some experts are {values.dtype} and some'
        f' {self._buffers[name].dtype}; store all of a layer in one type'
      )
    self._buffers[name][place.index] = values
    self._waiting[name] -= 1
    if not self._waiting[name]:
      self._save(name, self._buffers.pop(name))

  def _save(self, name, array):
    path = (self._folder / FOLDER / name).resolve()
    array = np.ascontiguousarray(array)
    self._orbax.save(path, {'w': array}, force=True)
    self._orbax.wait_until_finished()
    wanted = crc(array)
    del array
    if crc(_restore(self._orbax, path)) != wanted:
      raise ConversionError(f'{path} does not read back as it was written')
    note(self._folder, name, wanted)
    self.done.add(name)


class Reader:
  """Reads pieces; the last few stay in memory."""

  def __init__(self, folder, keep=3):
    self._folder = pathlib.Path(folder)
    self.sums = sums(folder)
    self._orbax = ocp.StandardCheckpointer()
    self._keep = keep
    self._last = collections.OrderedDict()

  def read(self, name):
    """Raises:
    ConversionError: the piece is damaged.
    """
    if name in self._last:
      self._last.move_to_end(name)
      return self._last[name]
    path = (self._folder / FOLDER / name).resolve()
    try:
      array = _restore(self._orbax, path)
    except (OSError, ValueError, KeyError) as error:
      raise ConversionError(f'{path} cannot be read: {error}') from error
    if crc(array) != self.sums[name]:
      raise ConversionError(f'{path} differs from its checksum')
    self._last[name] = array
    while len(self._last) > self._keep or (
      len(self._last) > 1 and self._held() > 4 * PIECE
    ):
      self._last.popitem(last=False)
    return array

  def _held(self):
    return sum(array.nbytes for array in self._last.values())


def _restore(orbax, path):
  return np.asarray(orbax.restore(path)['w'])
