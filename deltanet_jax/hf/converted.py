"""Loads released weights, or converted ones (`hf.convert`)."""

import pathlib
import reprlib
from typing import TypedDict, cast

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import families, files, names, pieces, store
from deltanet_jax.hf.keys import ConfigKeys
from deltanet_jax.hf.names import AnyPath, Json
from deltanet_jax.hf.pieces import ConversionError
from deltanet_jax.parallel.sharding import Params

RECORD, BESIDE = 'converted.json', 'scales.safetensors'
FORMAT = 2


class Record(TypedDict):
  """The contents of converted.json.

  tensors: {name: [file, dtype, shape]} of the release without float8, as a
  fine-tuned model is written   float8: tensors and scales that differ
  """

  format: int
  family: str
  source: str
  config: Json
  tensors: Json
  float8: Json


def load_model(
  folder: AnyPath,
  *,
  dtype: DTypeLike = np.float32,
  mesh: Mesh | None = None,
) -> tuple[store.ReleasedLM, Params]:
  """(model, params) of a released or converted folder.

  The model computes in `dtype`; matrices have it too, vectors are float32. With
  a mesh the parameters are sharded by `parallel.sharding`.

  Raises:
    ConfigError: as `store.open_folder`; a tensor holds NaN; or a conversion is
      not finished.
    ConversionError: a piece of a conversion is damaged.
  """
  converted = is_converted(folder)
  found = Converted(folder).found if converted else store.open_folder(folder)
  model = store.ReleasedLM(found.cfg, dtype, family=found.family.name)
  return model, store.fill_params(found, model, mesh)


def is_converted(folder: AnyPath) -> bool:
  """Whether a conversion was started in the folder."""
  return (pathlib.Path(folder) / RECORD).is_file()


def read_record(folder: AnyPath) -> Record:
  """Reads converted.json.

  Raises:
    ConfigError: there is none, or it has another format version.
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
      raise ConfigError(f'{path}: {key} is not an object; convert again')
  try:
    families.get_family(record.get('family'))
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  return cast(Record, record)


class Converted(files.RecordedTensors):
  """The released tensors in a converted folder.

  Raises:
    ConfigError: it is no converted folder, or not finished.
  """

  def __init__(self, folder: AnyPath):
    self.record = read_record(folder)
    where = pathlib.Path(folder) / RECORD
    tensors = self.record['tensors'] | self.record['float8']
    super().__init__(tensors, self.record['config'], folder, where)
    family = families.get_family(self.record['family'])
    cfg = family.read_config(ConfigKeys(self.record['config'], str(where)))
    cfg = families.add_mtp(family, cfg, self.names)
    self.found = store.match_tensors(self, family, cfg)
    self._by_name = {entry.name: entry for entry in self.found.all}
    self._pieces = pieces.PieceReader(folder)
    self._require_whole()

  def _require_whole(self):
    wanted = {
      pieces.locate_slot(slot).piece
      for entry in self.found.entries
      for slot in entry.slots
    }
    beside = [name for name in self.names if name not in self._by_name]
    surplus = lambda name: store.count_surplus(self, self._by_name[name])
    beside += filter(surplus, self._by_name)
    missing = wanted.union(beside) - self._pieces.sums.keys()
    if missing:
      raise ConfigError(
        f'{self.path}: {min(missing)} is not finished; run the conversion again'
      )

  def read_raw(self, name: str) -> np.ndarray:
    """Raises:
    ConversionError: a piece is damaged.
    """
    if name not in self._by_name:
      return self._beside(name)
    entry = self._by_name[name]
    parts = [
      self._pieces.read(place.piece)[place.indices]
      for place in map(pieces.locate_slot, entry.slots)
    ]
    # a tensor that repeats another may have another dtype
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
