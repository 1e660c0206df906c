"""What a conversion made of released weights, see `hf.convert`."""

import math
import pathlib
import reprlib
from typing import TypedDict, cast

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import families, files, names, pieces, plan, store
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.names import Json
from deltanet_jax.hf.pieces import ConversionError, PiecePlace
from deltanet_jax.hf.plan import Slot
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Params

RECORD, BESIDE = 'converted.json', 'scales.safetensors'
FORMAT = 2


class Record(TypedDict):
  """What converted.json holds; tensors: name -> file, type and shape.

  `tensors` are as a folder without float8 has them, which is what a model
  trained further is written as; `float8` the tensors and scales that differ.
  """

  format: int
  family: str
  source: str
  config: Json
  tensors: Json
  float8: Json


def load_model(
  source: str | pathlib.Path,
  *,
  dtype: DTypeLike = np.float32,
  mesh: Mesh | None = None,
) -> tuple[store.ReleasedLM, Params]:
  """(model, params) of a converted folder, as `store.load_model`."""
  converted = Converted(source)
  model = store.ReleasedLM(converted.cfg, dtype, family=converted.family.name)
  return model, store.fill_params(converted, converted.own, model, mesh)


def is_converted(folder: str | pathlib.Path) -> bool:
  """Whether a conversion has begun there."""
  return (pathlib.Path(folder) / RECORD).is_file()


def read_record(folder: str | pathlib.Path) -> Record:
  """What converted.json holds.

  Raises:
    ConfigError: there is none, or it is of another version.
  """
  path = pathlib.Path(folder) / RECORD
  if not path.is_file():
    raise ConfigError(f'{path}: no such file; give a converted folder')
  record = names.read_json(path)
  if record.get('format') != FORMAT:
    version = reprlib.repr(record.get('format'))
    raise ConfigError(
      f'{path}: format {version}, and this version reads {FORMAT}; convert the'
      ' released folder again'
    )
  for key in ('config', 'tensors', 'float8'):
    if not isinstance(record.get(key), dict):
      raise ConfigError(f'{path}: {key} is no object; convert again')
  try:
    families.get_family(record.get('family'))
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  return cast(Record, record)


class Converted(files.RecordedTensors):
  """The released tensors that a converted folder holds.

  Raises:
    ConfigError: it is none, or the conversion is not finished.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.record = read_record(folder)
    where = pathlib.Path(folder) / RECORD
    tensors = self.record['tensors'] | self.record['float8']
    super().__init__(tensors, self.record['config'], folder, where)
    self.family = families.get_family(self.record['family'])
    cfg = self.family.read_config(ConfigKeys(self.record['config'], str(where)))
    self.cfg = families.add_mtp(self.family, cfg, self.names)
    shapes = sharding.make_abstract_params(HybridLM(self.cfg))
    self.own, copies = store.match_tensors(self, self.family, self.cfg, shapes)
    self._entries = {entry.name: entry for entry in [*self.own, *copies]}
    self._weights = {
      path: leaf.shape for path, leaf in plan.list_leaves(shapes)
    }
    self._pieces = pieces.PieceReader(folder)
    self._require_whole()

  def _require_whole(self):
    wanted = {
      self._place(slot).piece for entry in self.own for slot in entry.slots
    }
    beside = [name for name in self.names if name not in self._entries]
    beside += [
      n for n, e in self._entries.items() if store.count_surplus(self, e)
    ]
    missing = wanted.union(beside) - self._pieces.sums.keys()
    if missing:
      raise ConfigError(
        f'{self.path}: {min(missing)} is not finished; run the conversion again'
      )

  def size(self, name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(self.shape(name)) * self.dtype(name).itemsize

  def read_raw(self, name: str) -> np.ndarray:
    """Raises:
    ConversionError: a piece is damaged.
    """
    if name not in self._entries:
      return self._beside(name)
    entry = self._entries[name]
    parts = [
      self._pieces.read(place.piece)[place.indices]
      for place in map(self._place, entry.slots)
    ]
    # a tensor that only repeats another may be of another type
    tensor = entry.layout.join(parts).astype(self.dtype(name), copy=False)
    if store.count_surplus(self, entry):
      tensor = np.concatenate([tensor, self._beside(name)])
    return tensor

  def _beside(self, name: str) -> np.ndarray:
    path = self.path / BESIDE
    tensor = files.File(path).read(name)
    if pieces.compute_crc(tensor) != self._pieces.sums[name]:
      raise ConversionError(f'{path}: {name} differs from its checksum')
    return tensor

  def _place(self, slot: Slot) -> PiecePlace:
    return pieces.locate_slot(slot, self._weights[slot.path])
