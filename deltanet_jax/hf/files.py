"""Folders of safetensors files: read tensor by tensor, written in a stream."""

import json
import math
import pathlib
import reprlib

import ml_dtypes
import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names, quantised
from deltanet_jax.hf.names import INDEX
from deltanet_jax.hf.quantised import BLOCK

SHARD_BYTES = 5 * 10**9
WEIGHTS = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
# powers of two as their exponents, in a type of their own or as plain bytes
EXPONENTS = {
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'U8': np.dtype(np.uint8),
}
DTYPES = WEIGHTS | EXPONENTS
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT8 = WEIGHTS['F8_E4M3']
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
      with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        self.header = json.loads(f.read(size))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
      reason = names.line(error)
      raise ConfigError(f'{path}: cannot be read: {reason}') from error
    self.header.pop('__metadata__', None)
    self._start = 8 + size
    for name in self.header:
      if not name.isprintable():
        raise ConfigError(f'{path}: {name!r:.200} is no name of a tensor')

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
  """Released tensors by name. A subclass has `path`, `settings`, the folder's
  config.json, `names`, which maps a tensor to its file, `shape`, `dtype` and
  `raw`, the tensor as it is stored.
  """

  def where(self, name):
    """The tensor with its file, as errors name it."""
    return f'{self.path / self.names[name]}: {name}'

  def read(self, name):
    """The tensor; float8 is multiplied by its blocks' scales, to float32."""
    tensor, scale = self.raw(name), self.scale_of(name)
    return tensor if scale is None else dequantise(tensor, self._scales(scale))

  def checked(self, name):
    """The tensor as it is stored.

    Raises:
      ConfigError: a value of it is not finite, or is not with its scale.
    """
    tensor, scale = self.raw(name), self.scale_of(name)
    self.require_finite(name, tensor)
    if scale is not None:
      most = np.float32(ml_dtypes.finfo(FLOAT8).max)
      with np.errstate(over='ignore'):
        small = finite(self._scales(scale) * most)
      if not small:  # some product may be beyond float32
        self.require_finite(name, self.read(name))
    return tensor

  def require_finite(self, name, values):
    """Raises:
    ConfigError: some of `values`, which are of this tensor, are not finite.
    """
    if not finite(values):
      raise ConfigError(
        f'{self.where(name)} holds NaN or infinity, or what {values.dtype} does'
        ' not hold; the weights are damaged'
      )

  def _scales(self, name):
    """float32 scales of a float8 tensor."""
    found = self.raw(name)
    self.require_finite(name, found)
    if found.dtype == EXPONENTS['U8']:
      found = found.view(EXPONENTS['F8_E8M0'])
    with np.errstate(over='ignore'):
      return found.astype(np.float32)

  def require_type(self, name):
    """Refuses a weight whose type is not in WEIGHTS, or whose scales are not
    what a float8 weight has.

    Raises:
      ConfigError: with both.
    """
    if self.dtype(name) not in WEIGHTS.values():
      raise ConfigError(_no_type(self.where(name), NAMES[self.dtype(name)]))
    self.scale_of(name)

  def scale_of(self, name):
    """The name of a float8 tensor's scales, None of another tensor.

    Raises:
      ConfigError: there are none, or their type or shape is wrong.
    """
    scale, shape = name + SCALE, self.shape(name)
    if self.dtype(name) != FLOAT8:
      if scale in self.names:
        raise ConfigError(
          f'{self.where(scale)} scales a tensor that is not float8 but'
          f' {NAMES[self.dtype(name)]}; one of the two is of another release'
        )
      return None
    if len(shape) < 2:
      raise ConfigError(
        f'{self.where(name)} is float8 of shape {shape}; only matrices are,'
        ' with a scale for each block'
      )
    if scale not in self.names:
      raise ConfigError(f'{self.where(name)} is float8 and has no {scale}')
    wanted = (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
    if self.shape(scale) != wanted:
      raise ConfigError(
        f'{self.where(scale)} has shape {self.shape(scale)}; expected {wanted},'
        f' one scale for {BLOCK} x {BLOCK} of {shape}'
      )
    kind = self.dtype(scale)
    if kind == FLOAT8 or (
      kind == EXPONENTS['U8'] and not quantised.exponents(self.settings)
    ):
      raise ConfigError(
        f'{self.where(scale)} has type {NAMES[kind]}; expected scales of type'
        ' F32 BF16 F16 F64 F8_E8M0, or U8 where config.json says scale_fmt'
        ' ue8m0'
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
      there or lies elsewhere, one tensor in two files, or quantised weights.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.names, self.settings = {}, {}
    self._open_files = {}
    config = self.path / 'config.json'
    if config.is_file():
      self.settings = names.read_json(config)
    for file in names.of_folder(self.path):
      for name in self._open(file):
        if name in self.names:
          raise ConfigError(
            f'{self.path / file}: {name} is in {self.names[name]} too; remove'
            ' one of the files'
          )
        self.names[name] = file
    quantised.require_none(self.settings, self.names, self.path)

  def _open(self, file):
    found = File(names.place(self.path, file))
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
      raise ConfigError(_no_type(self.where(name), found))
    return DTYPES[found]

  def raw(self, name):
    """The tensor as it is stored."""
    return self._open_files[self.names[name]].read(name)


class Recorded(Tensors):
  """The tensors of a released folder that may not be there any more.

  tensors: {name: [file, type, shape]}, as a file holds them that was written
  when the folder was read   settings: its config.json   where: that file

  Raises:
    ConfigError: they cannot be tensors of a folder.
  """

  def __init__(self, tensors, settings, path, where):
    self.path, self.settings = pathlib.Path(path), settings
    kinds = [dtype.name for dtype in NAMES]
    for name, found in tensors.items():
      file, dtype, shape = found if _is_list(found, 3) else (None, None, None)
      whole = _is_list(shape) and all(type(n) is int and n >= 0 for n in shape)
      if not (whole and dtype in kinds and name.isprintable()):
        raise ConfigError(
          f'{where}: {name!r:.200} is {reprlib.repr(found)}; expected a file, a'
          ' type and a shape'
        )
      names.require(file, f'{where}: {name}')
    self._tensors = tensors
    self.names = {name: found[0] for name, found in tensors.items()}

  def shape(self, name):
    return tuple(self._tensors[name][2])

  def dtype(self, name):
    return np.dtype(self._tensors[name][1])


def _is_list(found, count=None):
  return isinstance(found, list) and count in (None, len(found))


def _no_type(where, found):
  """Of an error: a tensor has no type of a weight."""
  whole = ', as quantised weights have' if found[0] in 'IU' else ''
  return f'{where} has type {found}{whole}; expected one of {" ".join(WEIGHTS)}'


def finite(array):
  """Whether no element is NaN or infinite, which have an exponent of ones."""
  if array.dtype.kind in 'iu':
    return True
  bits = f'u{array.dtype.itemsize}'
  ones = np.asarray(np.inf, np.float32).astype(array.dtype).view(bits)
  flat = np.ascontiguousarray(array).reshape(-1).view(bits)
  # by pieces that stay in a processor's cache: several times as fast
  pieces = (flat[i : i + 2**16] for i in range(0, flat.size, 2**16))
  return all((piece & ones).max() < ones for piece in pieces)


def dequantise(tensor, scale):
  """float32 [...,R,C] = tensor [...,R,C] * scale of its 128 x 128 block."""
  columns = tensor.shape[-1]
  grown = np.repeat(scale, BLOCK, axis=-1)[..., :columns]
  out = tensor.astype(np.float32)
  with np.errstate(over='ignore', invalid='ignore'):
    for i in range(grown.shape[-2]):
      out[..., i * BLOCK : (i + 1) * BLOCK, :] *= grown[..., i : i + 1, :]
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


def held(folder, wanted, settings):
  """Those of the files `wanted` that a folder to be written has already.

  settings: the config.json that it will have

  Raises:
    ConfigError: it has other files of weights, another config.json, or links.
  """
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'{folder} is a file; give a folder')
  found = {path.relative_to(folder) for path in folder.rglob('*.safetensors')}
  found = {path.as_posix() for path in found}
  others = [folder / file for file in sorted(found - set(wanted))]
  # what is written through a link is written elsewhere
  others += [path for path in folder.rglob('*') if path.is_symlink()]
  if (folder / INDEX).exists() and len(wanted) < 2:
    others.append(folder / INDEX)
  config = folder / 'config.json'
  if config.exists() and names.read_json(config) != settings:
    others.append(config)
  if others:
    raise ConfigError(
      f'{others[0]} is no part of what is written; give another folder'
    )
  return found


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
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  try:
    with open(temporary, 'wb') as f:
      f.write(len(text).to_bytes(8, 'little'))
      f.write(text)
      for (dtype, _), tensor in zip(described.values(), tensors, strict=True):
        np.ascontiguousarray(tensor, dtype).tofile(f)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


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
