"""Writes the files of a released folder, tensor by tensor."""

import json
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names
from deltanet_jax.hf.files import NAMES
from deltanet_jax.hf.layout import Shape
from deltanet_jax.hf.names import INDEX, SUFFIX, Json

Described = Mapping[str, tuple[np.dtype, Shape]]  # tensors by name


def group_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """{file: tensors} in order, with at most `limit` bytes per file, or one
  larger tensor.   sizes: bytes of each tensor"""
  groups: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if groups[-1] and used + size > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {f'model{SUFFIX}': groups[0]}
  return {
    f'model-{i:05d}-of-{len(groups):05d}{SUFFIX}': group
    for i, group in enumerate(groups, 1)
  }


def find_written(
  folder: pathlib.Path, wanted: Collection[str], settings: Json | None
) -> set[str]:
  """The files of `wanted` that the target folder already has.

  settings: the config.json that it will have

  Raises:
    ConfigError: it has other weight files, another config.json, or links.
  """
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'{folder} is a file; give a folder')
  files = {
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*.safetensors')
  }
  others = [folder / file for file in sorted(files - set(wanted))]
  # writing through a link would write elsewhere
  others += [path for path in folder.rglob('*') if path.is_symlink()]
  if (folder / INDEX).exists() and len(wanted) < 2:
    others.append(folder / INDEX)
  config = folder / 'config.json'
  if config.exists() and names.read_json(config) != settings:
    others.append(config)
  if others:
    raise ConfigError(
      f'{others[0]} does not belong to this model; give another folder'
    )
  return files


def write_file(
  path: pathlib.Path, described: Described, tensors: Iterable[np.ndarray]
) -> None:
  """Writes a safetensors file with one tensor in memory at a time.

  tensors: values in the order of the described ones
  """
  header: Json = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for name, (dtype, shape) in described.items():
    size = math.prod(shape) * dtype.itemsize
    header[name] = {
      'dtype': NAMES[dtype],
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


def write_index(
  folder: pathlib.Path, groups: Mapping[str, Iterable[str]], total: int
) -> None:
  """Writes the index of several files; none for a single file.

  groups: {file: tensors}   total: bytes of all
  """
  if len(groups) == 1:
    return
  weight_map = {name: file for file, group in groups.items() for name in group}
  text = json.dumps(
    {'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2
  )
  (folder / INDEX).write_text(text + '\n')
