"""Released folders to Orbax and back, one released tensor at a time.

A converted folder holds

  converted.json       the family, the released config.json, and name, file,
                       type and shape of every released tensor
  pieces/NAME/         an Orbax checkpoint for each of `pieces`
  sums.jsonl           the CRC-32 of every finished piece and scale
  scales.safetensors   the scales of float8 weights, which stay float8

Memory holds a few copies of the largest released tensor, whatever the model's
size. What is finished is not done again when a killed conversion is started
again.
"""

import json
import logging
import math
import pathlib
import shutil
import sys
import time

import numpy as np

from deltanet_jax import sharding
from deltanet_jax.config import ConfigError
from deltanet_jax.hf import families, files, keys, pieces, plan, store
from deltanet_jax.hf.pieces import ConversionError
from deltanet_jax.model import HybridLM
from deltanet_jax.workdir import write

RECORD, SCALES = 'converted.json', 'scales.safetensors'
FORMAT = 2


def to_orbax(source, target):
  """Converts a released folder.

  Raises:
    ConfigError: as `store.load`, or `target` holds another conversion.
    ConversionError: a piece does not read back as it was written.
  """
  logging.getLogger('absl').setLevel(logging.ERROR)
  family, cfg = families.read(source)
  folder = family.source(files.Folder(source))
  target = pathlib.Path(target)
  cfg = families.with_mtp(family, cfg, folder.names)
  shapes = sharding.abstract_params(HybridLM(cfg))
  entries, copies = store.matched(folder, family, cfg, shapes)
  _claim(target, _record(family, source, folder, [*entries, *copies]))
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
    parts = entry.layout.split(folder.raw(entry.name), shapes_of)
    while parts:  # given away one by one, so that each is freed when written
      writer.add(found[-len(parts)], parts.pop(0))
    progress.add(size(entry))
  progress.end()
  _keep_scales(folder, [*entries, *copies], target)


def _keep_scales(folder, entries, target):
  scales = [folder.scale_of(entry.name) for entry in entries]
  scales = list(filter(None, scales))
  if not scales or set(scales) <= pieces.sums(target).keys():
    return
  described = {
    name: (folder.dtype(name), folder.shape(name)) for name in scales
  }
  tensors = map(folder.raw, scales)
  for name, crc in _write_checked(target / SCALES, described, tensors):
    pieces.note(target, name, crc)


def to_released(source, target):
  """Converts a converted folder back: the same names, files, types, values.

  Raises:
    ConfigError: no converted folder, or a piece is missing in it.
    ConversionError: a piece or a file is damaged.
  """
  converted, target = Converted(source), pathlib.Path(target)
  groups = {}
  for name, file in converted.names.items():
    groups.setdefault(file, []).append(name)
  target.mkdir(parents=True, exist_ok=True)
  progress = Progress(sum(map(converted.size, converted.names)))
  for file, group in sorted(groups.items()):
    if (target / file).is_file():
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
  text = json.dumps(converted.record['config'], indent=2) + '\n'
  write(target / 'config.json', text)
  _copy_text(source, target)


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
  record = json.loads(path.read_text())
  if record.get('format') != FORMAT:
    raise ConfigError(
      f'{path}: format {record.get("format")}, and this version reads {FORMAT};'
      ' convert the released folder again'
    )
  return record


class Converted(files.Tensors):
  """The released tensors that a converted folder holds.

  Raises:
    ConfigError: it is none.
  """

  def __init__(self, folder):
    self.record = read_record(folder)
    self.path = pathlib.Path(folder)
    self._tensors = self.record['tensors'] | self.record['float8']
    self.names = {name: found[0] for name, found in self._tensors.items()}
    self.family = families.named(self.record['family'])
    cfg = self.family.read(keys.Keys(self.record['config'], RECORD))
    self.cfg = families.with_mtp(self.family, cfg, self.names)
    shapes = sharding.abstract_params(HybridLM(self.cfg))
    self.own, copies = store.matched(self, self.family, self.cfg, shapes)
    self._entries = {entry.name: entry for entry in [*self.own, *copies]}
    self._weights = {path: leaf.shape for path, leaf in plan.leaves(shapes)}
    self._pieces = pieces.Reader(folder)
    self._scales = None

  def shape(self, name):
    return tuple(self._tensors[name][2])

  def dtype(self, name):
    return np.dtype(self._tensors[name][1])

  def size(self, name):
    return math.prod(self.shape(name)) * self.dtype(name).itemsize

  def raw(self, name):
    """Raises:
    ConfigError: the conversion is not finished.
    ConversionError: a piece is damaged.
    """
    if name in self._entries:
      entry = self._entries[name]
      return entry.layout.join([self._part(slot) for slot in entry.slots])
    path = self.path / SCALES
    if not path.is_file():
      raise ConfigError(f'{path} is not there; run the conversion again')
    if self._scales is None:
      self._scales = files.File(path), pieces.sums(self.path)
    file, sums = self._scales
    scale = file.read(name)
    if pieces.crc(scale) != sums.get(name):
      raise ConversionError(f'{path}: {name} differs from its checksum')
    return scale

  def _part(self, slot):
    place = pieces.place(slot, self._weights[slot.path])
    return self._pieces.read(place.piece)[place.index]


def _record(family, source, folder, entries):
  """`tensors` are as a folder without float8 has them, which is what a model
  trained further is written as; `float8` the tensors and scales that differ.
  """
  config = json.loads((pathlib.Path(source) / 'config.json').read_text())
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
    'config': config,
    'tensors': tensors,
    'float8': float8,
  }


def _claim(target, record):
  """Starts a conversion, or goes on with the same one."""
  text = json.dumps(record, indent=1) + '\n'
  if is_converted(target):
    if (target / RECORD).read_text() != text:
      raise ConfigError(
        f'{target} holds the conversion of another folder; give another --to'
      )
    return
  (target / pieces.FOLDER).mkdir(parents=True, exist_ok=True)
  _copy_text(record['source'], target)
  write(target / RECORD, text)


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
  files.write_file(part, described, summed())
  written = files.File(part)
  for name, wanted in sums.items():
    if pieces.crc(written.read(name)) != wanted:
      raise ConversionError(f'{part}: {name} does not read back as written')
  part.replace(path)
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
