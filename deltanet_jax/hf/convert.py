"""Released folders to Orbax and back, one weight of one layer at a time.

A converted folder holds

  converted.json     the family, the released config.json, and name, file, type
                     and shape of every released tensor
  pieces/PATH[.N]/   an Orbax checkpoint of a weight, of layer N of its stack
  sums.jsonl         the CRC-32 of every finished piece

Memory holds a few pieces, whatever the model's size. What is finished is not
done again when a killed conversion is started again.
"""

import collections
import json
import logging
import math
import pathlib
import shutil
import sys
import zlib

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from deltanet_jax import sharding
from deltanet_jax.config import ConfigError
from deltanet_jax.hf import families, files, keys, plan, store
from deltanet_jax.model import HybridLM
from deltanet_jax.workdir import write

RECORD, SUMS, PIECES = 'converted.json', 'sums.jsonl', 'pieces'


class ConversionError(RuntimeError):
  """What was written does not read back as it was."""


def to_orbax(source, target):
  """Converts a released folder.

  Raises:
    ConfigError: as `store.load`, or `target` holds another conversion.
    ConversionError: a piece does not read back as it was written.
  """
  logging.getLogger('absl').setLevel(logging.ERROR)
  family, cfg = families.read(source)
  folder, target = files.Folder(source), pathlib.Path(target)
  cfg = families.with_mtp(family, cfg, folder.names)
  shapes = sharding.abstract_params(HybridLM(cfg))
  entries, copies = store.matched(folder, family, cfg, shapes)
  _claim(target, _record(family, source, folder, [*entries, *copies]))
  done = _sums(target)
  by_path = dict(plan.leaves(shapes))
  waiting = collections.Counter(
    _piece(slot)[0] for entry in entries for slot in entry.slots
  )
  progress = _Progress(sum(map(_size, entries)))
  buffers = {}
  with ocp.StandardCheckpointer() as orbax:
    for entry in entries:
      pieces = [_piece(slot) for slot in entry.slots]
      progress.add(_size(entry))
      if all(name in done for name, _ in pieces):
        continue
      tensor = folder.read(entry.name).astype(_kept(folder, entry.name))
      parts = entry.layout.split(tensor, [slot.shape for slot in entry.slots])
      for slot, part, (name, rest) in zip(
        entry.slots, parts, pieces, strict=True
      ):
        if name not in buffers:
          cut = len(slot.index) - len(rest)
          shape = by_path[slot.path].shape[cut:]
          buffers[name] = np.empty(shape, part.dtype)
        buffers[name][rest] = part
        waiting[name] -= 1
        if not waiting[name]:
          array = buffers.pop(name)
          if name not in done:
            _save_piece(orbax, target, name, array)
  progress.end()


def to_released(source, target):
  """Converts a converted folder back: the same names, files and types.

  Raises:
    ConfigError: no converted folder, or a piece is missing in it.
    ConversionError: a piece or a file is damaged.
  """
  record, target = read_record(source), pathlib.Path(target)
  family, cfg, entries = _plan(record)
  groups = {}
  for entry in entries:
    file = record['tensors'][entry.name][0]
    groups.setdefault(file, []).append(entry)
  target.mkdir(parents=True, exist_ok=True)
  progress = _Progress(sum(map(_size, entries)))
  pieces = _Pieces(source)
  for file, group in sorted(groups.items()):
    if not (target / file).is_file():
      _write_file(target, file, group, record, pieces)
    progress.add(sum(map(_size, group)))
  progress.end()
  names = [[entry.name for entry in groups[file]] for file in sorted(groups)]
  total = sum(
    _size(entry) * np.dtype(record['tensors'][entry.name][1]).itemsize
    for entry in entries
  )
  files.write_index(target, names, sorted(groups), total)
  settings = {
    k: v for k, v in record['config'].items() if k != 'quantization_config'
  }
  write(target / 'config.json', json.dumps(settings, indent=2) + '\n')
  _copy_text(source, target)


def load(source, *, dtype=np.float32, mesh=None):
  """(model, params) of a converted folder, as `store.load`."""
  _, cfg, entries = _plan(read_record(source))
  model = HybridLM(cfg, dtype)
  shapes, pieces = sharding.abstract_params(model), _Pieces(source)
  place = {}
  if mesh is not None:
    place = dict(plan.leaves(sharding.param_shardings(model, mesh)))
  slots = {}
  for entry in entries:
    for slot in entry.slots:
      slots.setdefault(slot.path, {})[_piece(slot)[0]] = slot
  arrays = {}
  for path, shape in plan.leaves(shapes):
    stacked = path[1] == 'period'
    kind = store.weight_dtype(shape.shape, (0,) * stacked, dtype)
    array = np.empty(shape.shape, kind)
    for name, slot in slots[path].items():
      array[slot.index[:1] if stacked else ()] = pieces.read(name)
    arrays[path] = jax.device_put(array, place.get(path))
  return model, store.nested(arrays)


def is_converted(folder):
  return (pathlib.Path(folder) / RECORD).is_file()


def read_record(folder):
  """What converted.json holds.

  Raises:
    ConfigError: there is none.
  """
  path = pathlib.Path(folder) / RECORD
  if not path.is_file():
    raise ConfigError(f'{path}: no such file; give a converted folder')
  return json.loads(path.read_text())


class _Recorded:
  """The tensors of the released folder that a conversion came from."""

  def __init__(self, record):
    self.path = pathlib.Path(record['source'])
    self._tensors = record['tensors']
    self.names = {name: found[0] for name, found in self._tensors.items()}

  def shape(self, name):
    return tuple(self._tensors[name][2])

  def dtype(self, name):
    return np.dtype(self._tensors[name][1])

  def is_scale(self, name):
    del name
    return False


def _plan(record):
  """(family, ModelConfig, entries) of a record."""
  family = families.named(record['family'])
  source = _Recorded(record)
  cfg = family.read(keys.Keys(record['config'], f'{RECORD}'))
  cfg = families.with_mtp(family, cfg, source.names)
  shapes = sharding.abstract_params(HybridLM(cfg))
  entries, copies = store.matched(source, family, cfg, shapes)
  return family, cfg, [*entries, *copies]


def _record(family, source, folder, entries):
  config = json.loads((pathlib.Path(source) / 'config.json').read_text())
  return {
    'family': family.name,
    'source': str(source),
    'config': config,
    'tensors': {
      entry.name: [
        folder.names[entry.name],
        _kept(folder, entry.name).name,
        entry.shape,
      ]
      for entry in entries
    },
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
  (target / PIECES).mkdir(parents=True, exist_ok=True)
  _copy_text(record['source'], target)
  write(target / RECORD, text)


def _copy_text(source, target):
  for name in store.TEXT_FILES:
    if (pathlib.Path(source) / name).is_file():
      shutil.copyfile(pathlib.Path(source) / name, target / name)


def _kept(folder, name):
  """The type to keep: float8 loses its scales and becomes bfloat16."""
  found = folder.dtype(name)
  return found if found.itemsize > 1 else np.dtype(ml_dtypes.bfloat16)


def _size(entry):
  return math.prod(entry.shape)


def _piece(slot):
  """A slot's piece and its index within."""
  name = '.'.join(slot.path)
  if slot.path[1] != 'period':
    return name, slot.index
  return f'{name}.{slot.index[0]}', slot.index[1:]


def _crc(array):
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _sums(folder):
  """{piece: CRC-32} of the finished pieces; a half-written line is none."""
  path, found = pathlib.Path(folder) / SUMS, {}
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      name, crc = json.loads(line)
    except ValueError:
      continue
    found[name] = crc
  return found


def _save_piece(orbax, target, name, array):
  path = (target / PIECES / name).resolve()
  orbax.save(path, {'w': array}, force=True)
  orbax.wait_until_finished()
  crc = _crc(array)
  if _crc(_restore(orbax, path)) != crc:
    raise ConversionError(f'{path} does not read back as it was written')
  with open(target / SUMS, 'a') as f:
    f.write('\n' + json.dumps([name, crc]))


def _restore(orbax, path):
  return np.asarray(orbax.restore(path)['w'])


class _Pieces:
  """Reads pieces; the last few stay in memory."""

  def __init__(self, folder, keep=4):
    self._folder = pathlib.Path(folder)
    self._sums = _sums(folder)
    self._orbax = ocp.StandardCheckpointer()
    self._keep = keep
    self._last = collections.OrderedDict()

  def read(self, name):
    if name in self._last:
      self._last.move_to_end(name)
      return self._last[name]
    path = (self._folder / PIECES / name).resolve()
    if name not in self._sums:
      raise ConfigError(f'{path} is not finished; run the conversion again')
    array = _restore(self._orbax, path)
    if _crc(array) != self._sums[name]:
      raise ConversionError(f'{path} differs from its checksum')
    self._last[name] = array
    if len(self._last) > self._keep:
      self._last.popitem(last=False)
    return array

  def join(self, entry):
    """The released tensor of an entry."""
    found = [_piece(slot) for slot in entry.slots]
    return entry.layout.join([self.read(name)[rest] for name, rest in found])


def _write_file(target, file, group, record, pieces):
  described = {
    entry.name: (np.dtype(record['tensors'][entry.name][1]), entry.shape)
    for entry in group
  }
  sums = {}

  def tensors():
    for entry in group:
      tensor = pieces.join(entry)
      sums[entry.name] = _crc(tensor)
      yield tensor

  part = target / f'{file}.part'
  files.write_file(part, described, tensors())
  written = files.File(part)
  for name, crc in sums.items():
    if _crc(written.read(name)) != crc:
      raise ConversionError(f'{part}: {name} does not read back as written')
  part.replace(target / file)


class _Progress:
  """A line on stderr, with the share that is done."""

  def __init__(self, total):
    self._total, self._done, self._shown = total, 0, -1

  def add(self, count):
    self._done += count
    percent = 100 * self._done // max(1, self._total)
    if percent > self._shown:
      self._shown = percent
      print(f'\rconverted {percent} %', end='', file=sys.stderr, flush=True)

  def end(self):
    print(file=sys.stderr)
