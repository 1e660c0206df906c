"""Loads a released folder into a model, and writes one back."""

import json
import math
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.hf import families, files, names, output, plan, quantized
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.layout import Shape
from deltanet_jax.hf.names import SHARD_BYTES
from deltanet_jax.hf.output import Described
from deltanet_jax.hf.plan import Entry, Path
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Params

TEXT_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
)

VOCABULARY = (('backbone', 'embed'), ('head', 'w'))  # a row for each id


class ReleasedLM(HybridLM):
  """A model that knows under which family's names it was released."""

  family: str | None = None


def load_model(
  folder: str | pathlib.Path,
  *,
  dtype: DTypeLike = jnp.float32,
  mesh: Mesh | None = None,
) -> tuple[ReleasedLM, Params]:
  """(model, params) of a released folder.

  The model computes in `dtype`; matrices of the parameters have it, vectors
  stay float32. With a mesh every parameter lies where `sharding` puts it.

  Raises:
    ConfigError: what is there is not a model that we have, or a tensor is
      missing, unknown, quantized, of another shape or type or holds NaN: named,
      with its file.
  """
  family, cfg = families.read_config(folder)
  source = family.restore_shapes(files.FolderTensors(folder))
  cfg = families.add_mtp(family, cfg, source.names)
  model = ReleasedLM(cfg, dtype, family=family.name)
  shapes = sharding.make_abstract_params(model)
  entries, copies = match_tensors(source, family, model.cfg, shapes)
  require_copies(source, entries, copies)
  return model, fill_params(source, entries, model, mesh)


def match_tensors(
  source: files.Tensors, family: Family, cfg: ModelConfig, shapes: Params
) -> tuple[list[Entry], list[Entry]]:
  """The plan of a model under the names that the folder uses, and the entries
  of those tensors in it that only repeat others.

  A folder may have more rows of embeddings than its config.json has ids: they
  are not used, which a warning says.

  Raises:
    ConfigError: a tensor is missing, unknown or of another shape or type.
  """
  spelling = Spelling(family, source.names)
  entries = plan.build_plan(family, cfg, shapes, spelling)
  copies = plan.build_copies(family, cfg, shapes, spelling)
  copies = [entry for entry in copies if entry.name in source.names]
  for entry in [*entries, *copies]:
    if entry.name not in source.names:
      raise ConfigError(
        f'{source.path}: no tensor {entry.name}; expected one of shape'
        f' {entry.shape} in its files'
      )
    source.require_type(entry.name)
    _require_shape(source, entry)
  wanted = {entry.name for entry in [*entries, *copies]}
  for name in source.names:
    known = (
      name in wanted or source.is_scale(name) or spelling.is_needless(name)
    )
    if not known:
      raise ConfigError(
        f'{source.where(name)} {source.shape(name)} is no tensor of a'
        f' {family.name} of this config.json'
      )
  return entries, copies


def _require_shape(source: files.Tensors, entry: Entry) -> None:
  shape, wanted = source.shape(entry.name), entry.shape
  if shape == wanted:
    return
  if not count_surplus(source, entry):
    raise ConfigError(
      f'{source.where(entry.name)} has shape {shape}; config.json asks for'
      f' {wanted}'
    )
  warnings.warn(
    f'{source.where(entry.name)} has {shape[0]} rows; those from {wanted[0]} on'
    ' are beyond the vocab_size of config.json and not used',
    stacklevel=4,
  )


def count_surplus(source: files.Tensors, entry: Entry) -> int:
  """How many rows of an embedding or a head are beyond the vocabulary."""
  shape, wanted = source.shape(entry.name), entry.shape
  if entry.slots[0].path not in VOCABULARY or shape[1:] != wanted[1:]:
    return 0
  return max(0, shape[0] - wanted[0])


def split_entry(source: files.Tensors, entry: Entry) -> list[np.ndarray]:
  """The released tensor of an entry as its slots' values."""
  # only what `count_surplus` counts is longer than the entry
  tensor = source.read(entry.name)[: entry.shape[0]]
  return entry.layout.split(tensor, [slot.shape for slot in entry.slots])


def require_copies(
  source: files.Tensors, entries: Sequence[Entry], copies: Sequence[Entry]
) -> None:
  """Refuses a tensor that should repeat another one and does not.

  Raises:
    ConfigError: with both.
  """
  first = {entry.slots: entry for entry in entries}
  for copy in copies:
    entry = first[copy.slots]
    pairs = zip(
      split_entry(source, copy), split_entry(source, entry), strict=True
    )
    if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
      raise ConfigError(
        f'{source.where(copy.name)} differs from the {entry.name} that it'
        ' should repeat'
      )


def _weight_dtype(
  shape: Shape, indices: tuple[int, ...], dtype: DTypeLike
) -> np.dtype:
  """Of a parameter: vectors are float32, whatever the matrices are."""
  return np.dtype(dtype if len(shape) - len(indices) > 1 else np.float32)


def fill_params(
  source: files.Tensors,
  entries: Sequence[Entry],
  model: HybridLM,
  mesh: Mesh | None = None,
) -> Params:
  """The parameters of a model from the entries of its plan, in its dtype.

  Raises:
    ConfigError: a value is not finite, in the source or in that dtype.
  """
  shapes = sharding.make_abstract_params(model)
  waiting: dict[Path, int] = {}
  arrays: dict[Path, jax.Array] = {}
  for entry in entries:
    for slot in entry.slots:
      waiting[slot.path] = waiting.get(slot.path, 0) + 1
  places: dict[Path, Any] = {}
  if mesh is not None:
    places = dict(plan.list_leaves(sharding.make_param_shardings(model, mesh)))
  buffers: dict[Path, np.ndarray] = {}
  by_path = dict(plan.list_leaves(shapes))
  for entry in entries:
    parts = split_entry(source, entry)
    for slot, part in zip(entry.slots, parts, strict=True):
      shape = by_path[slot.path].shape
      if slot.path not in buffers:
        scanned = slot.indices[:1] if slot.path[1] == 'period' else ()
        dtype = _weight_dtype(shape, scanned, model.dtype)
        buffers[slot.path] = np.empty(shape, dtype)
      with np.errstate(over='ignore', invalid='ignore'):
        buffers[slot.path][slot.indices] = part
      source.require_finite(entry.name, buffers[slot.path][slot.indices])
      waiting[slot.path] -= 1
      if not waiting[slot.path]:
        array = buffers.pop(slot.path)
        arrays[slot.path] = _put(array, places.get(slot.path))
  return nest_arrays(arrays)


def _put(array: np.ndarray, place: NamedSharding | None) -> jax.Array:
  if place is None:
    return jax.device_put(array)
  # several processes each put the parts that their devices hold
  return jax.make_array_from_callback(
    array.shape, place, lambda index: array[index]
  )


def nest_arrays(arrays: Mapping[Path, jax.Array]) -> Params:
  """A nested dict of {path: array}."""
  tree: Params = {}
  for path, array in arrays.items():
    node: Any = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = array
  return tree


def save_model(
  folder: str | pathlib.Path,
  model: HybridLM,
  params: Params,
  *,
  family: str | None = None,
  like: str | pathlib.Path | None = None,
  end: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a released folder: safetensors, their index and config.json.

  With `like`, a released folder of the same model, the names, types, files of
  text and config.json are that folder's, with as many rows of embeddings as
  config.json has ids. Its float8 tensors are written as they are there when
  every one of them still has its values; when one was trained, all become
  bfloat16, which a warning says. Otherwise the parameters' types, and the
  family named, the one that the model was loaded from, or the first that fits;
  config.json then says that a text ends with the id `end`, if given.

  Raises:
    ConfigError: no family describes the model, or `like` holds another one.
  """
  folder = pathlib.Path(folder)
  cfg = model.cfg
  source: files.Tensors | None = None
  shapes = sharding.make_abstract_params(model)
  arrays = dict(plan.list_leaves(params))
  if like is not None:
    known, other = families.read_config(like)
    if not families.is_same_model(other, cfg):
      raise ConfigError(f'{like} is another model than the one to save')
    source = known.restore_shapes(files.FolderTensors(like))
    entries = sum(match_tensors(source, known, cfg, shapes), [])
    settings = names.read_json(pathlib.Path(like) / 'config.json')
  else:
    family = family or getattr(model, 'family', None)
    if name := family or getattr(model, 'family', None):
      known = families.get_family(name)
    else:
      known = families.match_family(cfg)
    entries = plan.build_plan(known, cfg, shapes)
    settings = known.write_config(cfg)
    if end is not None:
      settings['eos_token_id'] = end
  by_name = {entry.name: entry for entry in entries}
  described: Described = {
    entry.name: (_saved_type(entry, arrays, source), entry.shape)
    for entry in entries
  }
  tensor = lambda name: join_entry(by_name[name], arrays)
  if source is not None and _float8_is_unchanged(source, entries, arrays):
    described, tensor = _with_float8(source, described, tensor)
  else:
    settings = quantized.remove_settings(settings)
  folder.mkdir(parents=True, exist_ok=True)
  write_files(folder, described, tensor, shard_bytes)
  if like is not None:
    copy_text(pathlib.Path(like), folder)
  # last: a folder without it is not finished
  (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n')


def copy_text(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a released folder's tokenizer and what else it has of text."""
  for name in TEXT_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _saved_type(
  entry: Entry,
  arrays: Mapping[Path, jax.Array],
  source: files.Tensors | None,
) -> np.dtype:
  if source is None:
    return np.dtype(arrays[entry.slots[0].path].dtype)
  dtype = source.dtype(entry.name)
  return dtype if dtype.itemsize > 1 else np.dtype(jnp.bfloat16)


def _float8_is_unchanged(
  source: files.Tensors,
  entries: Sequence[Entry],
  arrays: Mapping[Path, jax.Array],
) -> bool:
  """Whether there are float8 tensors and all have the parameters' values."""
  small = [entry for entry in entries if source.find_scale(entry.name)]
  for entry in small:
    ours = join_entry(entry, arrays)
    theirs = source.read(entry.name)[: entry.shape[0]]
    if not np.array_equal(theirs.astype(ours.dtype), ours):
      warnings.warn(
        f'{entry.name} is not that of {source.path} any more; the tensors that'
        ' are float8 there are written as bfloat16',
        stacklevel=3,
      )
      return False
  return bool(small)


def _with_float8(
  source: files.Tensors,
  described: Described,
  tensor: Callable[[str], np.ndarray],
) -> tuple[Described, Callable[[str], np.ndarray]]:
  """Types and shapes, and the tensor of a name, with float8 and its scales as
  they are in the source."""
  both = dict(described)
  for name in described:
    if scale := source.find_scale(name):
      both |= {x: (source.dtype(x), source.shape(x)) for x in (name, scale)}

  def stored(name):
    unchanged = source.is_scale(name) or source.find_scale(name)
    return source.read_raw(name) if unchanged else tensor(name)

  return both, stored


def write_files(
  folder: pathlib.Path,
  described: Described,
  tensor: Callable[[str], np.ndarray],
  shard_bytes: int,
) -> None:
  """The files of a folder with their index.

  tensor: name -> its values
  """
  sizes = {
    name: math.prod(shape) * dtype.itemsize
    for name, (dtype, shape) in described.items()
  }
  groups = output.group_shards(sizes, shard_bytes)
  names = output.make_file_names(len(groups))
  for group, name in zip(groups, names, strict=True):
    output.write_file(
      folder / name, {x: described[x] for x in group}, map(tensor, group)
    )
  output.write_index(folder, groups, names, sum(sizes.values()))


def join_entry(entry: Entry, arrays: Mapping[Path, jax.Array]) -> np.ndarray:
  """The released tensor of an entry; arrays: the parameters by path."""
  return entry.layout.join(
    [np.asarray(arrays[slot.path][slot.indices]) for slot in entry.slots]
  )
