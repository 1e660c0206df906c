"""The Orbax pieces of a converted folder.

A piece holds a weight of one layer, or consecutive experts with PIECE numbers
in total, so that memory is bounded by the largest released tensor, not by all
experts of a layer.
"""

import collections
import json
import math
import pathlib
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from deltanet_jax.config import ConfigError
from deltanet_jax.hf.layout import Shape
from deltanet_jax.hf.names import AnyPath
from deltanet_jax.hf.plan import Slot

PIECE = 2**25
SUMS, FOLDER = 'sums.jsonl', 'pieces'


class ConversionError(RuntimeError):
  """Something does not read back as it was written."""


class PiecePlace(NamedTuple):
  """Where the values of a slot are: piece, indices in it, shape of it."""

  piece: str
  indices: tuple[int, ...]
  shape: Shape


def locate_slot(slot: Slot) -> PiecePlace:
  """The PiecePlace of a Slot."""
  scanned = slot.path[1] == 'period'  # the first index of these is a layer
  layer, expert = slot.indices[:scanned], slot.indices[scanned:]
  name = '.'.join([*slot.path, *map(str, layer)])
  if not expert:
    return PiecePlace(name, (), slot.shape)
  together = max(1, PIECE // math.prod(slot.shape))
  first = expert[0] // together * together
  count = min(together, slot.weight[len(layer)] - first)
  return PiecePlace(
    f'{name}.{first}', (expert[0] - first,), (count, *slot.shape)
  )


def compute_crc(array: np.ndarray) -> int:
  """The CRC-32 of the bytes of an array.

  `runs.checkpoint` uses another checksum, which can be summed over processes.
  """
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_sums(folder: AnyPath) -> dict[str, int]:
  """{name: CRC-32} of finished pieces and scales; lines that `add_sum` did not
  complete are ignored."""
  path = pathlib.Path(folder) / SUMS
  sums: dict[str, int] = {}
  for line in path.read_bytes().splitlines() if path.is_file() else ():
    try:
      name, value = json.loads(line)
      sums |= {name: value}
    except (ValueError, TypeError, RecursionError):
      continue
  return sums


def add_sum(folder: AnyPath, name: str, value: int) -> None:
  """Appends a finished piece for `read_sums`."""
  with open(pathlib.Path(folder) / SUMS, 'a') as f:
    f.write('\n' + json.dumps([name, value]))


class PieceWriter:
  """Collects the slots of pieces and writes each piece when it is complete.

  places: of all slots that will be added
  """

  def __init__(self, folder: AnyPath, places: Iterable[PiecePlace]):
    self._folder = pathlib.Path(folder)
    self.done = set(read_sums(folder))
    self._waiting = collections.Counter(place.piece for place in places)
    self._buffers: dict[str, np.ndarray] = {}
    self._orbax = ocp.StandardCheckpointer()

  def add(self, place: PiecePlace, values: np.ndarray) -> None:
    """Raises:
    ConfigError: experts of a layer have several dtypes.
    ConversionError: a piece does not read back as it was written.
    """
    name = place.piece
    if name in self.done:
      return
    if not place.indices:
      self._save(name, values)
      return
    if name not in self._buffers:
      self._buffers[name] = np.empty(place.shape, values.dtype)
    if self._buffers[name].dtype != values.dtype:
      raise ConfigError(
        f'{name}: some experts are {values.dtype} and some'
        f' {self._buffers[name].dtype}; store all of a layer in one dtype'
      )
    self._buffers[name][place.indices] = values
    self._waiting[name] -= 1
    if not self._waiting[name]:
      self._save(name, self._buffers.pop(name))

  def _save(self, name: str, array: np.ndarray) -> None:
    path = (self._folder / FOLDER / name).resolve()
    array = np.ascontiguousarray(array)
    self._orbax.save(path, {'w': array}, force=True)
    self._orbax.wait_until_finished()
    wanted = compute_crc(array)
    del array
    if compute_crc(_restore(self._orbax, path)) != wanted:
      raise ConversionError(f'{path} does not read back as it was written')
    add_sum(self._folder, name, wanted)
    self.done.add(name)


class PieceReader:
  """Reads pieces and caches the last few."""

  def __init__(self, folder: AnyPath):
    self._folder = pathlib.Path(folder)
    self.sums = read_sums(folder)
    self._orbax = ocp.StandardCheckpointer()
    self._last: dict[str, np.ndarray] = {}  # the latest last

  def read(self, name: str) -> np.ndarray:
    """Raises:
    ConversionError: the piece is damaged.
    """
    if name in self._last:
      self._last[name] = self._last.pop(name)
      return self._last[name]
    path = (self._folder / FOLDER / name).resolve()
    try:
      array = _restore(self._orbax, path)
    except (OSError, ValueError, KeyError) as error:
      raise ConversionError(f'{path} cannot be read: {error}') from error
    if compute_crc(array) != self.sums[name]:
      raise ConversionError(f'{path} differs from its checksum')
    self._last[name] = array
    held = lambda: sum(array.nbytes for array in self._last.values())
    while len(self._last) > 3 or (len(self._last) > 1 and held() > 4 * PIECE):
      del self._last[next(iter(self._last))]
    return array


def _restore(orbax, path):
  return np.asarray(orbax.restore(path)['w'])
