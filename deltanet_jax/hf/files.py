"""Folders of safetensors files: read tensor by tensor, written in a stream."""

import json
import math
import pathlib

import ml_dtypes
import numpy as np

from deltanet_jax.config import ConfigError

INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 128  # rows and columns that share a scale in block-scaled float8
SCALE = '_scale_inv'


class File:
  """One safetensors file: its header, and its tensors as they are.

  Raises:
    ConfigError: it cannot be read.
  """

  def __init__(self, path):
    from safetensors import SafetensorError, safe_open

    self._path = path
    try:
      with safe_open(path, 'np'):
        pass  # the library checks the header, its offsets and the length
    except (OSError, SafetensorError) as error:
      raise ConfigError(f'{path}: cannot be read: {error}') from error
    with open(path, 'rb') as f:
      size = int.from_bytes(f.read(8), 'little')
      self.header = json.loads(f.read(size))
    self.header.pop('__metadata__', None)
    self._start = 8 + size

  def read(self, name):
    """The tensor; of a type in DTYPES."""
    found = self.header[name]
    dtype, (begin, end) = DTYPES[found['dtype']], found['data_offsets']
    # read, not mapped: mapped pages of all files would count as ours
    flat = np.fromfile(
      self._path,
      dtype,
      (end - begin) // dtype.itemsize,
      offset=self._start + begin,
    )
    return flat.reshape(found['shape'])


class Tensors:
  """Released tensors by name. A subclass has `path`, `names`, which maps a
  tensor to its file, `shape`, `dtype` and `raw`, the tensor as it is stored.
  """

  def read(self, name):
    """The tensor; float8 is multiplied by its blocks' scales, to float32."""
    tensor = self.raw(name)
    if self.dtype(name).itemsize > 1:
      return tensor
    return dequantise(tensor, self.raw(self.scale_of(name)))

  def scale_of(self, name):
    """The name of a float8 tensor's scales, None of another tensor.

    Raises:
      ConfigError: there are none, or their shape is wrong.
    """
    if self.dtype(name).itemsize > 1:
      return None
    scale, shape = name + SCALE, self.shape(name)
    file = self.path / self.names[name]
    if scale not in self.names:
      raise ConfigError(f'{file}: {name} is float8 and has no {scale}')
    wanted = tuple(-(-n // BLOCK) for n in shape)
    if self.shape(scale) != wanted:
      raise ConfigError(
        f'{self.path / self.names[scale]}: {scale} has shape'
        f' {self.shape(scale)}; expected {wanted}, one scale for {BLOCK} x'
        f' {BLOCK} of {shape}'
      )
    return scale

  def is_scale(self, name):
    """Whether the tensor only scales another one."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in self.names


class Folder(Tensors):
  """The tensors of the safetensors files of a folder.

  `names` maps a tensor to its file; nothing but headers is read before `read`.

  Raises:
    ConfigError: no file, an unreadable one, an index that names what is not
      there, or one tensor in two files.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.names = {}
    self._open_files = {}
    for file in self._files():
      for name in self._open(file):
        if name in self.names:
          raise ConfigError(
            f'{self.path / file}: {name} is in {self.names[name]} too; remove'
            ' one of the files'
          )
        self.names[name] = file

  def _files(self):
    if not self.path.is_dir():
      raise ConfigError(f'{self.path}: no such folder')
    index = self.path / INDEX
    if index.is_file():
      try:
        found = json.loads(index.read_text())
        files = sorted(set(found['weight_map'].values()))
      except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f'{index}: no index of safetensors files') from error
    else:
      files = sorted(file.name for file in self.path.glob('*.safetensors'))
    if not files:
      raise ConfigError(
        f'{self.path}: no *.safetensors; give the folder of a released model'
      )
    return files

  def _open(self, file):
    found = File(self.path / file)
    self._open_files[file] = found
    return found.header

  def shape(self, name):
    return tuple(self._header(name)['shape'])

  def _header(self, name):
    return self._open_files[self.names[name]].header[name]

  def dtype(self, name):
    """The numpy dtype of a tensor.

    Raises:
      ConfigError: a type that is no number of ours.
    """
    found = self._header(name)['dtype']
    if found not in DTYPES:
      raise ConfigError(
        f'{self.path / self.names[name]}: {name} has type {found}; expected one'
        f' of {" ".join(DTYPES)}'
      )
    return DTYPES[found]

  def raw(self, name):
    """The tensor as it is stored."""
    return self._open_files[self.names[name]].read(name)


def dequantise(tensor, scale):
  """float32 [R,C] = tensor [R,C] * scale of its 128 x 128 block."""
  rows, columns = tensor.shape
  grown = np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, :columns]
  out = tensor.astype(np.float32)
  for i, row in enumerate(grown):
    out[i * BLOCK : (i + 1) * BLOCK] *= row
  return out


def shards(sizes, limit=SHARD_BYTES):
  """Groups of names whose bytes stay within `limit`, in order.

  sizes: {name: bytes}.
  """
  groups, used = [[]], 0
  for name, size in sizes.items():
    if groups[-1] and used + size > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  return groups


def file_names(count):
  if count == 1:
    return ['model.safetensors']
  return [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]


def write_file(path, described, tensors):
  """A safetensors file, one tensor in memory at a time.

  described: {name: (dtype, shape)}   tensors: their values, in that order
  """
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name, (dtype, shape) in described.items():
    size = math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      'dtype': NAMES[np.dtype(dtype)],
      'shape': list(shape),
      'data_offsets': [offset, offset + size],
    }
    offset += size
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    f.write(len(text).to_bytes(8, 'little'))
    f.write(text)
    for (dtype, _), tensor in zip(described.values(), tensors, strict=True):
      np.ascontiguousarray(tensor, dtype).tofile(f)
  temporary.replace(path)


def write_index(folder, groups, files, total):
  """The index of several files; none for one."""
  if len(files) == 1:
    return
  weight_map = {
    name: file
    for group, file in zip(groups, files, strict=True)
    for name in group
  }
  text = json.dumps(
    {'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2
  )
  (folder / INDEX).write_text(text + '\n')
