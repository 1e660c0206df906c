"""Loads a released folder into a model, and writes one back."""

import json
import math
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import families, files, names, plan, quantised
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding

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


def load(folder, *, dtype=jnp.float32, mesh=None):
  """(model, params) of a released folder.

  The model computes in `dtype`; matrices of the parameters have it, vectors
  stay float32. With a mesh every parameter lies where `sharding` puts it.

  Raises:
    ConfigError: what is there is not a model that we have, or a tensor is
      missing, unknown, quantised, of another shape or type or holds NaN: named,
      with its file.
  """
  family, cfg = families.read(folder)
  source = family.source(files.Folder(folder))
  cfg = families.with_mtp(family, cfg, source.names)
  model = ReleasedLM(cfg, dtype, family=family.name)
  shapes = sharding.abstract_params(model)
  entries, copies = matched(source, family, model.cfg, shapes)
  require_copies(source, entries, copies)
  return model, fill(source, entries, model, mesh)


def matched(source, family, cfg, shapes):
  """The plan of a model under the names that the folder uses, and the entries
  of those tensors in it that only repeat others.

  source: `files.Tensors`

  A folder may have more rows of embeddings than its config.json has ids: they
  are not used, which a warning says.

  Raises:
    ConfigError: a tensor is missing, unknown or of another shape or type.
  """
  spelling = Spelling(family, source.names)
  entries = plan.build(family, cfg, shapes, spelling)
  copies = plan.copies(family, cfg, shapes, spelling)
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
    known = name in wanted or source.is_scale(name) or spelling.needless(name)
    if not known:
      raise ConfigError(
        f'{source.where(name)} {source.shape(name)} is no tensor of a'
        f' {family.name} of this config.json'
      )
  return entries, copies


def _require_shape(source, entry):
  found, wanted = source.shape(entry.name), entry.shape
  if found == wanted:
    return
  if not surplus(source, entry):
    raise ConfigError(
      f'{source.where(entry.name)} has shape {found}; config.json asks for'
      f' {wanted}'
    )
  warnings.warn(
    f'{source.where(entry.name)} has {found[0]} rows; those from {wanted[0]} on'
    ' are beyond the vocab_size of config.json and not used',
    stacklevel=4,
  )


def surplus(source, entry):
  """How many rows of an embedding or a head are beyond the vocabulary."""
  found, wanted = source.shape(entry.name), entry.shape
  if entry.slots[0].path not in VOCABULARY or found[1:] != wanted[1:]:
    return 0
  return max(0, found[0] - wanted[0])


def split(source, entry):
  """The released tensor of an entry as its slots' values."""
  # only what `surplus` counts is longer than the entry
  tensor = source.read(entry.name)[: entry.shape[0]]
  return entry.layout.split(tensor, [slot.shape for slot in entry.slots])


def require_copies(source, entries, copies):
  """Refuses a tensor that should repeat another one and does not.

  Raises:
    ConfigError: with both.
  """
  first = {entry.slots: entry for entry in entries}
  for copy in copies:
    entry = first[copy.slots]
    pairs = zip(split(source, copy), split(source, entry), strict=True)
    if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
      raise ConfigError(
        f'{source.where(copy.name)} differs from the {entry.name} that it'
        ' should repeat'
      )


def _weight_dtype(shape, index, dtype):
  """Of a parameter: vectors are float32, whatever the matrices are."""
  return np.dtype(dtype if len(shape) - len(index) > 1 else np.float32)


def fill(source, entries, model, mesh=None):
  """The parameters of a model from the entries of its plan, in its dtype.

  source: `files.Tensors`

  Raises:
    ConfigError: a value is not finite, in the source or in that dtype.
  """
  shapes = sharding.abstract_params(model)
  waiting, arrays = {}, {}
  for entry in entries:
    for slot in entry.slots:
      waiting[slot.path] = waiting.get(slot.path, 0) + 1
  place = {}
  if mesh is not None:
    place = dict(plan.leaves(sharding.param_shardings(model, mesh)))
  buffers, by_path = {}, dict(plan.leaves(shapes))
  for entry in entries:
    parts = split(source, entry)
    for slot, part in zip(entry.slots, parts, strict=True):
      shape = by_path[slot.path].shape
      if slot.path not in buffers:
        scanned = slot.index[:1] if slot.path[1] == 'period' else ()
        kept = _weight_dtype(shape, scanned, model.dtype)
        buffers[slot.path] = np.empty(shape, kept)
      with np.errstate(over='ignore', invalid='ignore'):
        buffers[slot.path][slot.index] = part
      source.require_finite(entry.name, buffers[slot.path][slot.index])
      waiting[slot.path] -= 1
      if not waiting[slot.path]:
        array = buffers.pop(slot.path)
        arrays[slot.path] = _put(array, place.get(slot.path))
  return nested(arrays)


def _put(array, place):
  if place is None:
    return jax.device_put(array)
  # several processes each put the parts that their devices hold
  return jax.make_array_from_callback(
    array.shape, place, lambda index: array[index]
  )


def nested(arrays):
  """A nested dict of {path: array}."""
  tree = {}
  for path, array in arrays.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = array
  return tree


def save(
  folder,
  model,
  params,
  *,
  family=None,
  like=None,
  end=None,
  shard_bytes=files.SHARD_BYTES,
):
  """Writes a released folder: safetensors, their index and config.json.

  With `like`, a released folder of the same model, the names, types, files of
  text and config.json are that folder's, with as many rows of embeddings as
  config.json has ids. Its float8 tensors are written as they
  are there when every one of them still has its values; when one was trained,
  all become bfloat16, which a warning says. Otherwise the parameters' types,
  and the family named, the one that the model was loaded from, or the first
  that fits; config.json then says that a text ends with the id `end`, if given.

  Raises:
    ConfigError: no family describes the model, or `like` holds another one.
  """
  folder = pathlib.Path(folder)
  cfg, source = model.cfg, None
  shapes = sharding.abstract_params(model)
  arrays = dict(plan.leaves(params))
  if like is not None:
    found, other = families.read(like)
    if not families.same(other, cfg):
      raise ConfigError(f'{like} is another model than the one to save')
    source = found.source(files.Folder(like))
    entries = sum(matched(source, found, cfg, shapes), [])
    settings = names.read_json(pathlib.Path(like) / 'config.json')
  else:
    family = family or getattr(model, 'family', None)
    found = families.named(family) if family else families.of(cfg)
    entries = plan.build(found, cfg, shapes)
    settings = found.write(cfg) | ({} if end is None else {'eos_token_id': end})
  by_name = {entry.name: entry for entry in entries}
  described = {
    entry.name: (_saved_type(entry, arrays, source), entry.shape)
    for entry in entries
  }
  tensor = lambda name: joined(by_name[name], arrays)
  if source is not None and _float8_is_unchanged(source, entries, arrays):
    described, tensor = _with_float8(source, described, tensor)
  else:
    settings = quantised.removed(settings)
  folder.mkdir(parents=True, exist_ok=True)
  write(folder, described, tensor, shard_bytes)
  for name in TEXT_FILES if like else ():
    if (pathlib.Path(like) / name).is_file():
      shutil.copyfile(pathlib.Path(like) / name, folder / name)
  # last: a folder without it is not finished
  (folder / 'config.json').write_text(json.dumps(settings, indent=2) + '\n')


def _saved_type(entry, arrays, source):
  if source is None:
    return np.dtype(arrays[entry.slots[0].path].dtype)
  found = source.dtype(entry.name)
  return found if found.itemsize > 1 else np.dtype(jnp.bfloat16)


def _float8_is_unchanged(source, entries, arrays):
  """Whether there are float8 tensors and all have the parameters' values."""
  small = [entry for entry in entries if source.scale_of(entry.name)]
  for entry in small:
    ours = joined(entry, arrays)
    theirs = source.read(entry.name)[: entry.shape[0]]
    if not np.array_equal(theirs.astype(ours.dtype), ours):
      warnings.warn(
        f'{entry.name} is not that of {source.path} any more; the tensors that'
        ' are float8 there are written as bfloat16',
        stacklevel=3,
      )
      return False
  return bool(small)


def _with_float8(source, described, tensor):
  """Types and shapes, and the tensor of a name, with float8 and its scales as
  they are in the source."""
  found = {}
  for name in described:
    found[name] = described[name]
    if scale := source.scale_of(name):
      found[name] = source.dtype(name), source.shape(name)
      found[scale] = source.dtype(scale), source.shape(scale)
  kept = lambda name: source.is_scale(name) or source.scale_of(name)
  return found, lambda name: source.raw(name) if kept(name) else tensor(name)


def write(folder, described, tensor, shard_bytes):
  """The files of a folder with their index.

  described: {name: (dtype, shape)}   tensor: name -> its values
  """
  sizes = {
    name: math.prod(shape) * dtype.itemsize
    for name, (dtype, shape) in described.items()
  }
  groups = files.shards(sizes, shard_bytes)
  names = files.file_names(len(groups))
  for group, name in zip(groups, names, strict=True):
    files.write_file(
      folder / name, {x: described[x] for x in group}, map(tensor, group)
    )
  files.write_index(folder, groups, names, sum(sizes.values()))


def joined(entry, arrays):
  """The released tensor of an entry; arrays: {path: array}."""
  return entry.layout.join(
    [np.asarray(arrays[slot.path][slot.index]) for slot in entry.slots]
  )
