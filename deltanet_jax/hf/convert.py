"""Converts released folders to Orbax and back, tensor by tensor.

A converted folder holds

  converted.json       family, released config.json, and name, file, dtype and
                       shape of every released tensor
  pieces/NAME/         an Orbax checkpoint for each of `pieces`
  sums.jsonl           CRC-32 of every finished piece and scale
  scales.safetensors   scales of float8 weights, which stay float8, and
                       embedding rows beyond the vocabulary

Memory holds a few copies of the largest released tensor, whatever the size of
the model. A conversion that was stopped continues when it is started again.
"""

import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import write_text
from deltanet_jax.hf import converted, files, names, output, pieces, store
from deltanet_jax.hf.converted import Converted
from deltanet_jax.hf.layout import Shape
from deltanet_jax.hf.names import AnyPath, Json
from deltanet_jax.hf.output import Described
from deltanet_jax.hf.pieces import ConversionError
from deltanet_jax.progress import Progress


def convert_to_orbax(source: AnyPath, target: AnyPath) -> None:
  """Converts a released folder.

  Raises:
    ConfigError: as `store.open_folder`, or `target` holds something else; a
      conversion that this call started is removed.
    ConversionError: a piece does not read back as it was written.
  """
  logging.getLogger('absl').setLevel(logging.ERROR)
  found, target = store.open_folder(source), pathlib.Path(target)
  record = _make_record(source, found)
  existed, resumed = target.exists(), converted.is_converted(target)
  _start(target, record)
  try:
    _write_pieces(found, target)
    _keep_beside(found, target)
  except ConfigError:
    if not resumed:
      _clear(target)
      if not existed:
        target.rmdir()
    raise


def _clear(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def _write_pieces(found: store.MatchedTensors, target: pathlib.Path) -> None:
  folder, entries = found.tensors, found.entries
  places = {
    entry.name: [pieces.locate_slot(slot) for slot in entry.slots]
    for entry in entries
  }
  writer = pieces.PieceWriter(target, sum(places.values(), []))
  total = sum(map(folder.size, places))
  progress = Progress('converted', total, 'MB', 10**6)
  for entry in entries:
    own = places[entry.name]
    if all(place.piece in writer.done for place in own):
      progress.skip(folder.size(entry.name))
      continue
    parts = entry.split(folder.read_checked(entry.name))
    while parts:  # removed one by one, so that each is freed when written
      writer.add(own[-len(parts)], parts.pop(0))
    progress.add(folder.size(entry.name))
  progress.end()


def _keep_beside(found: store.MatchedTensors, target: pathlib.Path) -> None:
  """Writes what the pieces lack: scales, and embedding rows beyond the
  vocabulary as a tensor of the same name."""
  folder = found.tensors
  described: dict[str, tuple[np.dtype, Shape]] = {}
  for entry in found.all:
    if scale := folder.find_scale(entry.name):
      described[scale] = folder.dtype(scale), folder.shape(scale)
    if more := store.count_surplus(folder, entry):
      described[entry.name] = folder.dtype(entry.name), (more, *entry.shape[1:])
  if not described or described.keys() <= pieces.read_sums(target).keys():
    return
  # all rows of a scale
  tensors = (
    folder.read_raw(name)[-shape[0] :] for name, (_, shape) in described.items()
  )
  sums = _write_checked(target / converted.BESIDE, described, tensors)
  for name, crc in sums.items():
    pieces.add_sum(target, name, crc)


def convert_to_released(source: AnyPath, target: AnyPath) -> None:
  """Converts a converted folder back, with the same names, files, dtypes and
  values; an Olmo Hybrid saved by transformers gets the shapes of the release.

  Correct files of the target are kept; config.json is written last, so an
  unfinished folder has none.

  Raises:
    ConfigError: no finished conversion, or `target` holds other weights;
      nothing is written.
    ConversionError: a piece or a file is damaged.
  """
  stored, target = Converted(source), pathlib.Path(target)
  groups: dict[str, list[str]] = {}
  for name, file in sorted(stored.names.items(), key=lambda item: item[1]):
    groups.setdefault(file, []).append(name)
  settings = stored.record['config']
  written = output.find_written(target, groups, settings)
  for file in written:
    if not _holds(target / file, stored, groups[file]):
      raise ConfigError(
        f'{target / file} holds other weights; give another --to'
      )
  target.mkdir(parents=True, exist_ok=True)
  total = sum(map(stored.size, stored.names))
  progress = Progress('converted', total, 'MB', 10**6)
  for file, group in groups.items():
    if file in written:
      progress.skip(sum(map(stored.size, group)))
      continue
    described = {
      name: (stored.dtype(name), stored.shape(name)) for name in group
    }
    _write_checked(target / file, described, _counted(stored, group, progress))
  progress.end()
  output.write_index(target, groups, total)
  store.copy_text(pathlib.Path(source), target)
  text = json.dumps(settings, indent=2) + '\n'
  write_text(target / 'config.json', text)


def _holds(path: pathlib.Path, stored: Converted, group: list[str]) -> bool:
  """Whether a file holds these tensors with the values of the conversion."""
  file = files.File(path)
  if file.header.keys() != set(group):
    return False
  same = lambda name: (
    file.header[name]['dtype'] == files.NAMES[stored.dtype(name)]
    and tuple(file.header[name]['shape']) == stored.shape(name)
    and pieces.compute_crc(file.read(name))
    == pieces.compute_crc(stored.read_raw(name))
  )
  return all(map(same, group))


def _counted(
  stored: Converted, group: Iterable[str], progress: Progress
) -> Iterator[np.ndarray]:
  for name in group:
    yield stored.read_raw(name)
    progress.add(stored.size(name))


def _make_record(
  source: AnyPath, found: store.MatchedTensors
) -> converted.Record:
  folder = found.tensors

  def describe(name: str, kind: str = '') -> list[object]:
    kind = kind or folder.dtype(name).name
    return [folder.names[name], kind, folder.shape(name)]

  tensors: Json = {}
  float8: Json = {}
  for name in (entry.name for entry in found.all):
    scale = folder.find_scale(name)
    tensors[name] = describe(name, 'bfloat16' if scale else '')
    if scale:
      float8 |= {name: describe(name), scale: describe(scale)}
  return {
    'format': converted.FORMAT,
    'family': found.family.name,
    'source': str(source),
    'config': names.read_json(pathlib.Path(source) / 'config.json'),
    'tensors': tensors,
    'float8': float8,
  }


def _start(target: pathlib.Path, record: converted.Record) -> None:
  """Starts a conversion, or continues the same one."""
  text = json.dumps(record, indent=1) + '\n'
  if not converted.is_converted(target):
    # may hold a temporary file of a killed `write_text`
    empty = lambda: all(path.suffix == '.tmp' for path in target.iterdir())
    if target.exists() and not (target.is_dir() and empty()):
      raise ConfigError(f'{target} holds something else; give another --to')
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / converted.RECORD, text)
  elif (target / converted.RECORD).read_bytes() != text.encode():
    raise ConfigError(
      f'{target} holds the conversion of another folder; give another --to'
    )
  (target / pieces.FOLDER).mkdir(exist_ok=True)
  store.copy_text(pathlib.Path(record['source']), target)


def _write_checked(
  path: pathlib.Path, described: Described, tensors: Iterable[np.ndarray]
) -> dict[str, int]:
  """Writes a safetensors file, reads it back, then renames it. Returns the
  CRC-32 of every tensor.

  Raises:
    ConversionError: it does not read back as it was written.
  """
  sums: dict[str, int] = {}

  def summed() -> Iterator[np.ndarray]:
    for name, tensor in zip(described, tensors, strict=True):
      sums[name] = pieces.compute_crc(tensor)
      yield tensor

  part = path.with_name(path.name + '.part')
  try:
    output.write_file(part, described, summed())
    written = files.File(part)
    for name, wanted in sums.items():
      if pieces.compute_crc(written.read(name)) != wanted:
        raise ConversionError(f'{part}: {name} does not read back as written')
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
  return sums
