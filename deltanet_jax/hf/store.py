"""Loads and saves released folders."""

import json
import math
import pathlib
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.hf import families, files, names, output, plan, quantized
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.names import SHARD_BYTES, AnyPath
from deltanet_jax.hf.output import Described
from deltanet_jax.hf.plan import Entry, Path
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Params

TEXT_FILES = (
  'tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json'
  ' merges.txt chat_template.jinja chat_template.json generation_config.json'
).split()
VOCABULARY = (('backbone', 'embed'), ('head', 'w'))  # one row per id


class ReleasedLM(HybridLM):
  """A model with the family that it was released in."""

  family: str | None = None


class MatchedTensors(NamedTuple):
  """Released tensors and their places in a model."""

  family: Family
  cfg: ModelConfig
  tensors: files.Tensors
  entries: list[Entry]  # the plan of the model
  copies: list[Entry]  # tensors that repeat others

  @property
  def all(self) -> list[Entry]:
    return self.entries + self.copies


def open_folder(folder: AnyPath) -> MatchedTensors:
  """Finds the tensors of a released folder.

  Raises:
    ConfigError: the model is not supported, or a tensor is missing, unknown,
      quantized, has a wrong shape or dtype, or differs from the one that it
      should repeat; names tensor and file.
  """
  family, cfg = families.read_config(folder)
  tensors = family.tensors(folder)
  cfg = families.add_mtp(family, cfg, tensors.names)
  found = match_tensors(tensors, family, cfg)
  _require_copies(found)
  return found


def match_tensors(
  source: files.Tensors, family: Family, cfg: ModelConfig
) -> MatchedTensors:
  """Finds all tensors of a model.

  A folder may have more embedding rows than its config.json has ids; a warning
  says that they are not used.

  Raises:
    ConfigError: a tensor is missing, unknown or has a wrong shape or dtype.
  """
  spelling = Spelling(family, source.names)
  shapes = sharding.make_abstract_params(HybridLM(cfg))
  entries = plan.build_plan(family, cfg, shapes, spelling)
  copies = plan.build_copies(family, cfg, shapes, spelling)
  copies = [entry for entry in copies if entry.name in source.names]
  found = MatchedTensors(family, cfg, source, entries, copies)
  for entry in found.all:
    if entry.name not in source.names:
      raise ConfigError(
        f'{source.path}: no tensor {entry.name}; expected one of shape'
        f' {entry.shape} in its files'
      )
    source.require_type(entry.name)
    _require_shape(source, entry)
  wanted = {entry.name for entry in found.all}
  for name in source.names:
    known = (
      name in wanted or source.is_scale(name) or spelling.is_needless(name)
    )
    if not known:
      raise ConfigError(
        f'{source.where(name)} {source.shape(name)} is not a tensor of a'
        f' {family.name} with this config.json'
      )
  return found


def _require_shape(source: files.Tensors, entry: Entry) -> None:
  shape, wanted = source.shape(entry.name), entry.shape
  if shape == wanted:
    return
  if not count_surplus(source, entry):
    raise ConfigError(
      f'{source.where(entry.name)} has shape {shape}; by config.json it should'
      f' be {wanted}'
    )
  warnings.warn(
    f'{source.where(entry.name)} has {shape[0]} rows; those from {wanted[0]} on'
    ' are beyond the vocab_size of config.json and not used',
    stacklevel=4,
  )


def count_surplus(source: files.Tensors, entry: Entry) -> int:
  """The number of rows of an embedding or a head beyond the vocabulary."""
  shape, wanted = source.shape(entry.name), entry.shape
  if entry.slots[0].path not in VOCABULARY or shape[1:] != wanted[1:]:
    return 0
  return max(0, shape[0] - wanted[0])


def _require_copies(found: MatchedTensors) -> None:
  """Refuses a tensor that differs from the one that it should repeat."""
  source, first = found.tensors, {entry.slots: entry for entry in found.entries}
  for copy in found.copies:
    entry = first[copy.slots]
    ours, theirs = (x.split(source.read(x.name)) for x in (copy, entry))
    if not all(map(np.array_equal, ours, theirs)):
      raise ConfigError(
        f'{source.where(copy.name)} differs from the {entry.name} that it'
        ' should repeat'
      )


def fill_params(
  found: MatchedTensors, model: HybridLM, mesh: Mesh | None = None
) -> Params:
  """Loads the parameters of a model from its tensors, in its dtype.

  Raises:
    ConfigError: a value is not finite, in the source or in that dtype.
  """
  source, entries = found.tensors, found.entries
  waiting = Counter(slot.path for entry in entries for slot in entry.slots)
  arrays: dict[Path, jax.Array] = {}
  buffers: dict[Path, np.ndarray] = {}
  shardings: dict[Path, Any] = {}
  if mesh is not None:
    shardings = dict(
      plan.list_leaves(sharding.make_param_shardings(model, mesh))
    )
  for entry in entries:
    parts = entry.split(source.read(entry.name))
    for slot, part in zip(entry.slots, parts, strict=True):
      if slot.path not in buffers:
        # vectors are float32, whatever the dtype of matrices
        axes = len(slot.weight) - (slot.path[1] == 'period')
        dtype = np.dtype(model.dtype if axes > 1 else np.float32)
        buffers[slot.path] = np.empty(slot.weight, dtype)
      with np.errstate(over='ignore', invalid='ignore'):
        buffers[slot.path][slot.indices] = part
      source.require_finite(entry.name, buffers[slot.path][slot.indices])
      waiting[slot.path] -= 1
      if not waiting[slot.path]:
        array = buffers.pop(slot.path)
        arrays[slot.path] = _put(array, shardings.get(slot.path))
  return unflatten_dict(arrays)


def _put(array: np.ndarray, place: NamedSharding | None) -> jax.Array:
  if place is None:
    return jax.device_put(array)
  # each process supplies the shards of its devices
  return jax.make_array_from_callback(
    array.shape, place, lambda index: array[index]
  )


def save_model(
  folder: AnyPath,
  model: HybridLM,
  params: Params,
  *,
  family: str | None = None,
  like: AnyPath | None = None,
  end: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a released folder: safetensors, their index and config.json.

  With `like`, a released folder of the same model, names, dtypes, text files
  and config.json are those of that folder, with as many embedding rows as
  config.json has ids. Its float8 tensors are copied if all still have their
  values; if one was trained, all become bfloat16, with a warning. Without
  `like`, dtypes are those of the parameters, and the family is `family`, the
  one that the model was loaded from, or the first that fits; `end`, if given,
  is the end-of-text id in config.json.

  Raises:
    ConfigError: no family fits the model, or `like` holds another one.
  """
  folder = pathlib.Path(folder)
  cfg = model.cfg
  source: files.Tensors | None = None
  arrays = dict(plan.list_leaves(params))
  if like is not None:
    known, other = families.read_config(like)
    if not families.is_same_model(other, cfg):
      raise ConfigError(f'{like} holds another model than the one to save')
    source = known.tensors(like)
    entries = match_tensors(source, known, cfg).all
    settings = names.read_json(pathlib.Path(like) / 'config.json')
  else:
    name = family or getattr(model, 'family', None)
    known = families.get_family(name) if name else families.match_family(cfg)
    shapes = sharding.make_abstract_params(model)
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
  # last: a folder without it is unfinished
  (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n')


def copy_text(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the tokenizer and other text files of a released folder."""
  for name in TEXT_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _saved_type(
  entry: Entry, arrays: Mapping[Path, jax.Array], source: files.Tensors | None
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
  """Whether there are float8 tensors and all equal the parameters."""
  small = [entry for entry in entries if source.find_scale(entry.name)]
  for entry in small:
    ours = join_entry(entry, arrays)
    theirs = source.read(entry.name)[: entry.shape[0]]
    if not np.array_equal(theirs.astype(ours.dtype), ours):
      warnings.warn(
        f'{entry.name} differs from {source.path}; tensors that are float8'
        ' there are written as bfloat16',
        stacklevel=3,
      )
      return False
  return bool(small)


def _with_float8(
  source: files.Tensors,
  described: Described,
  tensor: Callable[[str], np.ndarray],
) -> tuple[Described, Callable[[str], np.ndarray]]:
  """(dtypes and shapes, function of a name that returns its tensor), with
  float8 and scales copied from the source."""
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
  """Writes the files of a folder and their index.

  tensor: name -> values
  """
  sizes = {
    name: math.prod(shape) * dtype.itemsize
    for name, (dtype, shape) in described.items()
  }
  groups = output.group_shards(sizes, shard_bytes)
  for file, group in groups.items():
    output.write_file(
      folder / file, {x: described[x] for x in group}, map(tensor, group)
    )
  output.write_index(folder, groups, sum(sizes.values()))


def join_entry(entry: Entry, arrays: Mapping[Path, jax.Array]) -> np.ndarray:
  """The released tensor of an entry.   arrays: {path: parameter}"""
  return entry.layout.join(
    [np.asarray(arrays[slot.path][slot.indices]) for slot in entry.slots]
  )
