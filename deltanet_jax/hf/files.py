"""Reads folders of safetensors files, tensor by tensor."""

import json
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import TypedDict

import ml_dtypes
import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names, quantized
from deltanet_jax.hf.layout import Shape
from deltanet_jax.hf.names import AnyPath, Json
from deltanet_jax.hf.quantized import BLOCK

WEIGHTS = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
# exponents of powers of two, in a dtype of their own or as bytes
EXPONENTS = {
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'U8': np.dtype(np.uint8),
}
DTYPES = WEIGHTS | EXPONENTS
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT8 = WEIGHTS['F8_E4M3']
SCALE = '_scale_inv'


class HeaderEntry(TypedDict):
  """A tensor in the header of a file."""

  dtype: str
  shape: list[int]
  data_offsets: list[int]


class File:
  """A safetensors file: its header and its tensors.

  Raises:
    ConfigError: it cannot be read.
  """

  def __init__(self, path: pathlib.Path):
    from safetensors import SafetensorError, safe_open

    self._path = path
    try:
      with safe_open(path, 'np'):
        pass  # the library checks header, offsets and length
      with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        self.header: dict[str, HeaderEntry] = json.loads(f.read(size))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
      reason = names.format_error(error)
      raise ConfigError(f'{path}: cannot be read: {reason}') from error
    self.header.pop('__metadata__', None)
    self._start = 8 + size
    for name in self.header:
      if not name.isprintable():
        raise ConfigError(f'{path}: {name!r:.200} is not a valid tensor name')

  def read(self, name: str) -> np.ndarray:
    """The tensor, of a dtype in DTYPES."""
    entry = self.header[name]
    dtype, (begin, end) = DTYPES[entry['dtype']], entry['data_offsets']
    # read, not mapped: mapped pages would count as memory of the process
    flat = np.fromfile(
      self._path,
      dtype,
      (end - begin) // dtype.itemsize,
      offset=self._start + begin,
    )
    return flat.reshape(entry['shape'])


class Tensors:
  """Released tensors by name; subclasses know where they are stored."""

  path: pathlib.Path
  settings: Json  # config.json of the folder
  names: Mapping[str, str]  # {tensor: file}

  def shape(self, name: str) -> Shape:
    """The shape of a tensor."""
    raise NotImplementedError

  def dtype(self, name: str) -> np.dtype:
    """The dtype of a tensor."""
    raise NotImplementedError

  def read_raw(self, name: str) -> np.ndarray:
    """The stored tensor."""
    raise NotImplementedError

  def size(self, name: str) -> int:
    """The bytes of a tensor."""
    return math.prod(self.shape(name)) * self.dtype(name).itemsize

  def where(self, name: str) -> str:
    """The tensor with its file, for errors."""
    return f'{self.path / self.names[name]}: {name}'

  def read(self, name: str) -> np.ndarray:
    """The tensor; float8 is multiplied by its block scales, to float32."""
    tensor, scale = self.read_raw(name), self.find_scale(name)
    return tensor if scale is None else dequantize(tensor, self._scales(scale))

  def read_checked(self, name: str) -> np.ndarray:
    """The stored tensor.

    Raises:
      ConfigError: a value is not finite, or not when scaled.
    """
    tensor, scale = self.read_raw(name), self.find_scale(name)
    self.require_finite(name, tensor)
    if scale is not None:
      most = np.float32(ml_dtypes.finfo(FLOAT8).max)
      with np.errstate(over='ignore'):
        small = is_finite(self._scales(scale) * most)
      if not small:  # a product may exceed float32
        self.require_finite(name, self.read(name))
    return tensor

  def require_finite(self, name: str, values: np.ndarray) -> None:
    """Raises:
    ConfigError: some of the `values` of this tensor are not finite.
    """
    if not is_finite(values):
      raise ConfigError(
        f'{self.where(name)} holds NaN or infinity, or a value beyond'
        f' {values.dtype}; the weights are damaged'
      )

  def _scales(self, name: str) -> np.ndarray:
    """The float32 scales of a float8 tensor."""
    scales = self.read_raw(name)
    self.require_finite(name, scales)
    if scales.dtype == EXPONENTS['U8']:
      scales = scales.view(EXPONENTS['F8_E8M0'])
    with np.errstate(over='ignore'):
      return scales.astype(np.float32)

  def require_type(self, name: str) -> None:
    """Refuses a weight whose dtype is not in WEIGHTS, or with wrong scales.

    Raises:
      ConfigError: names tensor and dtype.
    """
    if self.dtype(name) not in WEIGHTS.values():
      raise ConfigError(_no_type(self.where(name), NAMES[self.dtype(name)]))
    self.find_scale(name)

  def find_scale(self, name: str) -> str | None:
    """The name of the scales of a float8 tensor, None for other tensors.

    Raises:
      ConfigError: there are none, or their dtype or shape is wrong.
    """
    scale, shape = name + SCALE, self.shape(name)
    if self.dtype(name) != FLOAT8:
      if scale in self.names:
        raise ConfigError(
          f'{self.where(scale)} scales a tensor that is'
          f' {NAMES[self.dtype(name)]}, not float8; one of the two belongs to'
          ' another release'
        )
      return None
    if len(shape) < 2:
      raise ConfigError(
        f'{self.where(name)} is float8 of shape {shape}; only matrices may be,'
        ' with a scale per block'
      )
    if scale not in self.names:
      raise ConfigError(f'{self.where(name)} is float8 and has no {scale}')
    wanted = (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
    if self.shape(scale) != wanted:
      raise ConfigError(
        f'{self.where(scale)} has shape {self.shape(scale)}; expected {wanted},'
        f' one scale per {BLOCK} x {BLOCK} block of {shape}'
      )
    kind = self.dtype(scale)
    if kind == FLOAT8 or (
      kind == EXPONENTS['U8'] and not quantized.has_exponents(self.settings)
    ):
      raise ConfigError(
        f'{self.where(scale)} has type {NAMES[kind]}; expected scales of type'
        ' F32 BF16 F16 F64 F8_E8M0, or U8 where config.json says scale_fmt'
        ' ue8m0'
      )
    return scale

  def is_scale(self, name: str) -> bool:
    """Whether the tensor only scales another one."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in self.names


class FolderTensors(Tensors):
  """The tensors in the safetensors files of a folder.

  Only headers are read before `read`.

  Raises:
    ConfigError: a file is missing or unreadable, the index names a missing file
      or one outside, a tensor is in two files, or weights are quantized.
  """

  def __init__(self, path: AnyPath):
    self.path, self.settings = pathlib.Path(path), {}
    self.names: dict[str, str] = {}
    self._open_files: dict[str, File] = {}
    config = self.path / 'config.json'
    if config.is_file():
      self.settings = names.read_json(config)
    for file in names.list_files(self.path):
      for name in self._open(file):
        if name in self.names:
          raise ConfigError(
            f'{self.path / file}: {name} is also in {self.names[name]}; remove'
            ' one of the files'
          )
        self.names[name] = file
    quantized.refuse_quantized(self.settings, self.names, self.path)

  def _open(self, file: str) -> dict[str, HeaderEntry]:
    self._open_files[file] = File(names.locate_file(self.path, file))
    return self._open_files[file].header

  def shape(self, name: str) -> Shape:
    return tuple(self._header(name)['shape'])

  def _header(self, name: str) -> HeaderEntry:
    return self._open_files[self.names[name]].header[name]

  def dtype(self, name: str) -> np.dtype:
    """Raises ConfigError for a dtype that is not supported."""
    kind = self._header(name)['dtype']
    if kind not in DTYPES:
      raise ConfigError(_no_type(self.where(name), kind))
    return DTYPES[kind]

  def read_raw(self, name: str) -> np.ndarray:
    return self._open_files[self.names[name]].read(name)


class RecordedTensors(Tensors):
  """The recorded tensors of a released folder, which may be gone.

  tensors: {name: [file, dtype, shape]} of the record   settings: config.json
  where: the file of the record

  Raises:
    ConfigError: the record is not valid.
  """

  def __init__(
    self, tensors: Json, settings: Json, path: AnyPath, where: AnyPath
  ):
    self.path, self.settings = pathlib.Path(path), settings
    kinds = {dtype.name: dtype for dtype in NAMES}
    self.names: dict[str, str] = {}
    self._types: dict[str, tuple[np.dtype, Shape]] = {}
    is_size = lambda n: type(n) is int and n >= 0
    for name, entry in tensors.items():
      match entry:
        case [file, str(kind), list(shape)] if (
          kind in kinds and all(map(is_size, shape)) and name.isprintable()
        ):
          self.names[name] = names.require_name(file, f'{where}: {name}')
          self._types[name] = kinds[kind], tuple(shape)
        case _:
          raise ConfigError(
            f'{where}: {name!r:.200} is {reprlib.repr(entry)}; expected file,'
            ' dtype and shape'
          )

  def shape(self, name: str) -> Shape:
    return self._types[name][1]

  def dtype(self, name: str) -> np.dtype:
    return self._types[name][0]


def _no_type(where: str, kind: str) -> str:
  """Part of an error: a tensor has a dtype that weights do not have."""
  whole = ', as quantized weights have' if kind[0] in 'IU' else ''
  return f'{where} has type {kind}{whole}; expected one of {" ".join(WEIGHTS)}'


def is_finite(array: np.ndarray) -> bool:
  """Whether no element is NaN or infinite."""
  if array.dtype.kind in 'iu':
    return True
  bits = f'u{array.dtype.itemsize}'
  ones = np.asarray(np.inf, np.float32).astype(array.dtype).view(bits)
  flat = np.ascontiguousarray(array).reshape(-1).view(bits)
  # by pieces that fit in a processor's cache: several times as fast
  pieces = (flat[i : i + 2**16] for i in range(0, flat.size, 2**16))
  return all((piece & ones).max() < ones for piece in pieces)


def dequantize(tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """float32 [...,R,C] = tensor [...,R,C] * scale of its 128 x 128 block."""
  columns = tensor.shape[-1]
  grown = np.repeat(scale, BLOCK, axis=-1)[..., :columns]
  out = tensor.astype(np.float32)
  with np.errstate(over='ignore', invalid='ignore'):
    for i in range(grown.shape[-2]):
      out[..., i * BLOCK : (i + 1) * BLOCK, :] *= grown[..., i : i + 1, :]
  return out
