"""Released folders to Orbax and back, one released tensor at a time.

A converted folder holds

  converted.json       the family, the released config.json, and name, file,
                       type and shape of every released tensor
  pieces/NAME/         an Orbax checkpoint for each of `pieces`
  sums.jsonl           the CRC-32 of every finished piece and scale
  scales.safetensors   the scales of float8 weights, which stay float8, and
                       rows of embeddings beyond the vocabulary

Memory holds a few copies of the largest released tensor, whatever the model's
size. What is finished is not done again when a killed conversion is started
again.
"""

import json
import logging
import math
import pathlib
import reprlib
import shutil
import sys
import time

import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import write_text
from deltanet_jax.hf import families, files, keys, names, pieces, plan, store
from deltanet_jax.hf.pieces import ConversionError
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding

RECORD, BESIDE = 'converted.json', 'scales.safetensors'
FORMAT = 2


def to_orbax(source, target):
  """Converts a released folder.

  Raises:
    ConfigError: as `store.load`, or `target` holds something else. Nothing is
      left of a conversion that began with this call.
    ConversionError: a piece does not read back as it was written.
  """
  logging.getLogger('absl').setLevel(logging.ERROR)
  family, cfg = families.read(source)
  folder = family.source(files.Folder(source))
  target = pathlib.Path(target)
  cfg = families.with_mtp(family, cfg, folder.names)
  shapes = sharding.abstract_params(HybridLM(cfg))
  entries, copies = store.matched(folder, family, cfg, shapes)
  store.require_copies(folder, entries, copies)
  record = _record(family, source, folder, [*entries, *copies])
  was_there, begun = target.exists(), is_converted(target)
  _claim(target, record)
  try:
    _write_pieces(folder, entries, shapes, target)
    _keep_beside(folder, [*entries, *copies], target)
  except ConfigError:
    if not begun:
      _clear(target)
      if not was_there:
        target.rmdir()
    raise


def _clear(folder):
  for path in folder.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def _write_pieces(folder, entries, shapes, target):
  weights = {path: leaf.shape for path, leaf in plan.leaves(shapes)}
  places = {
    entry.name: [pieces.place(slot, weights[slot.path]) for slot in entry.slots]
    for entry in entries
  }
  writer = pieces.Writer(target, sum(places.values(), []))
  size = lambda entry: (
    math.prod(entry.shape) * folder.dtype(entry.name).itemsize
  )
  progress = Progress(sum(map(size, entries)))
  for entry in entries:
    found = places[entry.name]
    if all(place.piece in writer.done for place in found):
      progress.skip(size(entry))
      continue
    shapes_of = [slot.shape for slot in entry.slots]
    tensor = folder.checked(entry.name)[: entry.shape[0]]
    parts = entry.layout.split(tensor, shapes_of)
    del tensor
    while parts:  # given away one by one, so that each is freed when written
      writer.add(found[-len(parts)], parts.pop(0))
    progress.add(size(entry))
  progress.end()


def _keep_beside(folder, entries, target):
  """Writes what has no place in the pieces: scales, and the rows of embeddings
  that are beyond the vocabulary, as a tensor of the same name."""
  kept = {}
  for entry in entries:
    if scale := folder.scale_of(entry.name):
      kept[scale] = folder.dtype(scale), folder.shape(scale)
    if more := store.surplus(folder, entry):
      kept[entry.name] = folder.dtype(entry.name), (more, *entry.shape[1:])
  if not kept or kept.keys() <= pieces.sums(target).keys():
    return
  # of a scale these are all rows
  tensors = (folder.raw(name)[-shape[0] :] for name, (_, shape) in kept.items())
  for name, crc in _write_checked(target / BESIDE, kept, tensors):
    pieces.note(target, name, crc)


def to_released(source, target):
  """Converts a converted folder back: the same names, files, types, values; of
  an Olmo Hybrid that transformers saved, the shapes are those of the release.

  A file of the target that holds what it should stays; config.json is written
  last, so that an unfinished folder has none.

  Raises:
    ConfigError: no converted folder, or one that is not finished, or `target`
      holds other weights; nothing is written then.
    ConversionError: a piece or a file is damaged.
  """
  converted, target = Converted(source), pathlib.Path(target)
  groups = {}
  for name, file in converted.names.items():
    groups.setdefault(file, []).append(name)
  settings = converted.record['config']
  held = files.held(target, groups, settings)
  for file in held:
    if not _holds(target / file, converted, groups[file]):
      raise ConfigError(
        f'{target / file} holds other weights; give another --to'
      )
  target.mkdir(parents=True, exist_ok=True)
  progress = Progress(sum(map(converted.size, converted.names)))
  for file, group in sorted(groups.items()):
    if file in held:
      progress.skip(sum(map(converted.size, group)))
      continue
    described = {
      name: (converted.dtype(name), converted.shape(name)) for name in group
    }
    _write_checked(
      target / file, described, _counted(converted, group, progress)
    )
  progress.end()
  total = sum(map(converted.size, converted.names))
  files.write_index(
    target, [groups[file] for file in sorted(groups)], sorted(groups), total
  )
  _copy_text(source, target)
  text = json.dumps(settings, indent=2) + '\n'
  write_text(target / 'config.json', text)


def _holds(path, converted, group):
  """Whether a file holds these tensors with the values of a conversion."""
  found = files.File(path)
  if found.header.keys() != set(group):
    return False
  same = lambda name: (
    found.header[name]['dtype'] == files.NAMES[converted.dtype(name)]
    and tuple(found.header[name]['shape']) == converted.shape(name)
    and pieces.crc(found.read(name)) == pieces.crc(converted.raw(name))
  )
  return all(map(same, group))


def _counted(converted, group, progress):
  for name in group:
    yield converted.raw(name)
    progress.add(converted.size(name))


def load(source, *, dtype=np.float32, mesh=None):
  """(model, params) of a converted folder, as `store.load`."""
  converted = Converted(source)
  model = store.ReleasedLM(converted.cfg, dtype, family=converted.family.name)
  return model, store.fill(converted, converted.own, model, mesh)


def is_converted(folder):
  return (pathlib.Path(folder) / RECORD).is_file()


def read_record(folder):
  """What converted.json holds.

  Raises:
    ConfigError: there is none, or it is of another version.
  """
  path = pathlib.Path(folder) / RECORD
  if not path.is_file():
    raise ConfigError(f'{path}: no such file; give a converted folder')
  record = names.read_json(path)
  if record.get('format') != FORMAT:
    found = reprlib.repr(record.get('format'))
    raise ConfigError(
      f'{path}: format {found}, and this version reads {FORMAT}; convert the'
      ' released folder again'
    )
  for key in ('config', 'tensors', 'float8'):
    if not isinstance(record.get(key), dict):
      raise ConfigError(f'{path}: {key} is no object; convert again')
  try:
    families.named(record.get('family'))
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  return record


class Converted(files.Recorded):
  """The released tensors that a converted folder holds.

  Raises:
    ConfigError: it is none, or the conversion is not finished.
  """

  def __init__(self, folder):
    self.record = read_record(folder)
    where = pathlib.Path(folder) / RECORD
    tensors = self.record['tensors'] | self.record['float8']
    super().__init__(tensors, self.record['config'], folder, where)
    self.family = families.named(self.record['family'])
    cfg = self.family.read(keys.Keys(self.record['config'], str(where)))
    self.cfg = families.with_mtp(self.family, cfg, self.names)
    shapes = sharding.abstract_params(HybridLM(self.cfg))
    self.own, copies = store.matched(self, self.family, self.cfg, shapes)
    self._entries = {entry.name: entry for entry in [*self.own, *copies]}
    self._weights = {path: leaf.shape for path, leaf in plan.leaves(shapes)}
    self._pieces = pieces.Reader(folder)
    self._require_whole()

  def _require_whole(self):
    wanted = {
      self._place(slot).piece for entry in self.own for slot in entry.slots
    }
    beside = [name for name in self.names if name not in self._entries]
    beside += [n for n, e in self._entries.items() if store.surplus(self, e)]
    missing = wanted.union(beside) - self._pieces.sums.keys()
    if missing:
      raise ConfigError(
        f'{self.path}: {min(missing)} is not finished; run the conversion again'
      )

  def size(self, name):
    return math.prod(self.shape(name)) * self.dtype(name).itemsize

  def raw(self, name):
    """Raises:
    ConversionError: a piece is damaged.
    """
    if name not in self._entries:
      return self._beside(name)
    entry = self._entries[name]
    parts = [
      self._pieces.read(place.piece)[place.index]
      for place in map(self._place, entry.slots)
    ]
    # a tensor that only repeats another may be of another type
    found = entry.layout.join(parts).astype(self.dtype(name), copy=False)
    if store.surplus(self, entry):
      found = np.concatenate([found, self._beside(name)])
    return found

  def _beside(self, name):
    path = self.path / BESIDE
    found = files.File(path).read(name)
    if pieces.crc(found) != self._pieces.sums[name]:
      raise ConversionError(f'{path}: {name} differs from its checksum')
    return found

  def _place(self, slot):
    return pieces.place(slot, self._weights[slot.path])


def _record(family, source, folder, entries):
  """`tensors` are as a folder without float8 has them, which is what a model
  trained further is written as; `float8` the tensors and scales that differ.
  """
  found = lambda name: [
    folder.names[name],
    folder.dtype(name).name,
    folder.shape(name),
  ]
  tensors, float8 = {}, {}
  for name in (entry.name for entry in entries):
    tensors[name] = found(name)
    if scale := folder.scale_of(name):
      float8 |= {name: found(name), scale: found(scale)}
      tensors[name][1] = 'bfloat16'
  return {
    'format': FORMAT,
    'family': family.name,
    'source': str(source),
    'config': names.read_json(pathlib.Path(source) / 'config.json'),
    'tensors': tensors,
    'float8': float8,
  }


def _claim(target, record):
  """Starts a conversion, or goes on with the same one."""
  text = json.dumps(record, indent=1) + '\n'
  if not is_converted(target):
    if target.exists() and not (target.is_dir() and _is_empty(target)):
      raise ConfigError(f'{target} holds something else; give another --to')
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / RECORD, text)
  elif (target / RECORD).read_bytes() != text.encode():
    raise ConfigError(
      f'{target} holds the conversion of another folder; give another --to'
    )
  (target / pieces.FOLDER).mkdir(exist_ok=True)
  _copy_text(record['source'], target)


def _is_empty(folder):
  """But for what a killed `write` leaves."""
  return all(path.suffix == '.tmp' for path in folder.iterdir())


def _copy_text(source, target):
  for name in store.TEXT_FILES:
    if (pathlib.Path(source) / name).is_file():
      shutil.copyfile(pathlib.Path(source) / name, target / name)


def _write_checked(path, described, tensors):
  """Writes a safetensors file, reads it back, and gives it its name. Returns
  (tensor, CRC-32) of each.

  Raises:
    ConversionError: it does not read back as it was written.
  """
  sums = {}

  def summed():
    for name, tensor in zip(described, tensors, strict=True):
      sums[name] = pieces.crc(tensor)
      yield tensor

  part = path.with_name(path.name + '.part')
  try:
    files.write_file(part, described, summed())
    written = files.File(part)
    for name, wanted in sums.items():
      if pieces.crc(written.read(name)) != wanted:
        raise ConversionError(f'{part}: {name} does not read back as written')
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
  return sums.items()


class Progress:
  """A line on stderr: the share that is done, the rate, the time left.

  total: in bytes; skipped ones were done before and count for no rate
  """

  def __init__(self, total):
    self._total, self._done, self._skipped = total, 0, 0
    self._start = self._shown = time.monotonic()

  def skip(self, count):
    self._skipped += count
    self._done += count

  def add(self, count):
    self._done += count
    now = time.monotonic()
    if now > self._shown + 1:
      self._shown = now
      self._show(now)

  def end(self):
    self._show(time.monotonic())
    print(file=sys.stderr)

  def _show(self, now):
    rate = (self._done - self._skipped) / max(now - self._start, 1e-9)
    left = (self._total - self._done) / rate if rate else 0
    print(
      f'\rconverted {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB,'
      f' {rate / 1e6:.0f} MB/s, {left / 60:.1f} minutes left  ',
      end='',
      file=sys.stderr,
      flush=True,
    )
