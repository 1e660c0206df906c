"""What a run starts from, and how its result is released again.

Nothing here needs jax before weights are read or written.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.config.files import write_text
from deltanet_jax.hf import families, files, hub, keys, names, quantised
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.runs.folder import Workdir

# what may change though the weights are given: how they are computed with
_FREE = re.compile(r'(.*\.)?(remat|mixer\.(form|chunk|stage))')


class Start(NamedTuple):
  """Weights to begin with: a released folder, a converted one, or a run's."""

  name: str  # the folder's absolute path, or its id on the hub
  model: ModelConfig
  tokenizer: str  # 'bytes', or the path of a tokenizer.json
  released: dict | None  # family, config.json and every tensor's file, type
  # and shape, as in a converted folder; None for a model trained from nothing

  def load(self, mesh, dtype=np.float32):
    """The parameters on a mesh, weight by weight.

    Raises:
      ConfigError: the folder is gone, or lacks something.
      CheckpointError: a run has no whole checkpoint.
    """
    folder = hub.find(self.name)
    if is_run(folder):
      from deltanet_jax.infer import generate

      return generate.load_params(Workdir(folder), self.model, mesh)
    from deltanet_jax import hf

    return hf.load(folder, dtype=dtype, mesh=mesh)[1]

  def check(self):
    """Refuses a released folder whose tensors do not fit its config.json, and
    a run without a checkpoint."""
    folder = hub.find(self.name)
    if is_run(folder):
      if not Workdir(folder).checkpoints.is_dir():
        raise ConfigError(f'{folder} has no checkpoint yet; train there first')
      return
    if (folder / 'converted.json').is_file():
      from deltanet_jax.hf import convert

      convert.Converted(folder)
      return
    from deltanet_jax.hf import store
    from deltanet_jax.model import HybridLM
    from deltanet_jax.parallel import sharding

    shapes = sharding.abstract_params(HybridLM(self.model))
    family = families.named(self.released['family'])
    source = family.source(files.Folder(folder))
    store.matched(source, family, self.model, shapes)

  def require_tokenizer(self):
    """Refuses a folder without the tokenizer that it should bring."""
    path = pathlib.Path(self.tokenizer)
    if self.tokenizer != 'bytes' and not path.is_file():
      raise ConfigError(f'{path}: no such file; copy it from the release')


def read(given):
  """The Start of a folder, or of an id on the hub.

  Raises:
    ConfigError: nothing there that we can start from.
  """
  folder = hub.find(given)
  name = hub.names(given)[0]
  if is_run(folder):
    return of_run(Workdir(folder))
  if (folder / 'converted.json').is_file():
    from deltanet_jax.hf import convert

    found = convert.read_record(folder)
    released = {key: found[key] for key in ('family', 'config', 'tensors')}
  else:
    released = _record(folder)
  tokenizer = str(folder / 'tokenizer.json')
  return Start(name, _model(released, folder), tokenizer, released)


def of_run(workdir):
  """The Start that a run's newest checkpoint is."""
  experiment, before = workdir.read(), recorded(workdir)
  return Start(
    str(workdir.path.resolve()),
    experiment.model,
    workdir.tokenizer(experiment),
    before and before.released,
  )


def recorded(workdir):
  """The Start that a run once had, or None.

  Raises:
    ConfigError: its record cannot be read.
  """
  if not workdir.start.is_file():
    return None
  found = names.read_json(workdir.start)
  try:
    found['model'] = config.from_json(json.dumps(found['model']), ModelConfig)
    if found['released'] is not None:
      keys.Keys(found['released']['config'])
      families.named(found['released']['family'])
      found['released']['tensors']
    return Start(**found)
  except KeyError as error:
    raise ConfigError(f'{workdir.start}: no key {error}') from error
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise ConfigError(f'{workdir.start}: {names.line(error)}') from error


def is_run(folder):
  """Whether config.json is that of a training run."""
  try:
    return '_type' in names.read_json(pathlib.Path(folder) / 'config.json')
  except ConfigError:
    return False  # who reads it as a release says what is wrong


def kept(begun, tokenizer):
  """Texts that a run keeps: its Start, and copies of its tokenizer's files.

  begun: Start or None   tokenizer: 'bytes', or the path of a tokenizer.json
  """
  from deltanet_jax.hf.store import TEXT_FILES

  texts = {}
  if begun is not None:
    found = begun._asdict()
    found['model'] = json.loads(config.to_json(begun.model))
    texts['start.json'] = json.dumps(found) + '\n'
  if tokenizer == 'bytes':
    return texts
  path = pathlib.Path(tokenizer)
  texts['tokenizer/tokenizer.json'] = path.read_text()
  own = begun is not None and tokenizer == begun.tokenizer
  declared = 'tokenizer_config.json', 'special_tokens_map.json'
  for name in TEXT_FILES if own else declared:
    beside = path.with_name(name)
    if beside.is_file():
      texts[f'tokenizer/{name}'] = beside.read_text()
  return texts


def experiment(begun, path, changes):
  """The Experiment that trains a Start further.

  path: of a configuration file, whose get_config takes the Start, or whose
  model is the same   changes: (name, text) pairs, as in `config.override_all`

  Raises:
    ConfigError: the file or the changes are wrong, or ask for another model.
  """
  found = config.load(path, begun)
  if found.model.mtp is None:
    found = _with_model(found, mtp=begun.model.mtp)
  _require_same(found.model, begun, str(path))
  found = config.override_all(found, changes)
  _require_same(found.model, begun, '--config.model')
  return found


def require_same(workdir, begun, given):
  """Refuses a begun run that did not begin with what is given.

  begun: the Start recorded in it, or None   given: as for `read`

  Raises:
    ConfigError: with both.
  """
  if begun is None:
    raise ConfigError(
      f'{workdir.path} holds a run that did not begin with released weights;'
      ' give another --workdir'
    )
  if begun.name not in hub.names(given):
    raise ConfigError(
      f'{workdir.path} holds a run that began with {begun.name}, not with'
      f' {given}; give another --workdir'
    )


def _with_model(found, **changes):
  model = dataclasses.replace(found.model, **changes)
  return dataclasses.replace(found, model=model)


def _require_same(model, begun, where):
  lines = [
    line
    for line in config.difference(begun.model, model)
    if not _FREE.fullmatch(line.split(':')[0])
  ]
  if lines:
    more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise ConfigError(
      f'{where} asks for another model than {begun.name} holds:'
      f' {"; ".join(lines[:3])}{more} (there != here); only remat, form, chunk'
      ' and stage may change'
    )


def _record(folder):
  """What `hf.convert` keeps of a released folder, from its headers."""
  family, _ = families.read(folder)
  source = family.source(files.Folder(folder))
  needless = Spelling(family, source.names).needless
  return {
    'family': family.name,
    'config': names.read_json(folder / 'config.json'),
    'tensors': {
      name: [file, source.dtype(name).name, list(source.shape(name))]
      for name, file in source.names.items()
      if not needless(name)
    },
  }


def _model(released, folder):
  family = families.named(released['family'])
  cfg = family.read(keys.Keys(released['config'], str(folder / 'config.json')))
  return families.with_mtp(family, cfg, released['tensors'])


class _Released(files.Recorded):
  """The tensors that a trained model is written as."""

  def dtype(self, name):
    found = super().dtype(name)
    # values that were trained have no place in another's blocks and scales
    return files.WEIGHTS['BF16'] if found == files.FLOAT8 else found

  def scale_of(self, name):
    del name  # what the scales of a release belonged to has none any more


def release(workdir, target):
  """Writes a run's newest parameters as released weights, with its tokenizer.

  A run that began with released weights gives their names, files, types and
  config.json again (float8 becomes bfloat16, rows of embeddings beyond the
  vocabulary are left out); any other one those of the first family that fits,
  and in config.json the id that its texts ended with.

  Raises:
    ConfigError: no family describes the model, or `target` holds another.
    CheckpointError: no checkpoint is whole.
  """
  from deltanet_jax import hf
  from deltanet_jax.data.tokenizer import FileTokenizer
  from deltanet_jax.infer import generate
  from deltanet_jax.model import HybridLM

  target = pathlib.Path(target)
  model, begun = HybridLM(workdir.read().model), recorded(workdir)
  if (target / 'config.json').exists():
    raise ConfigError(f'{target} holds a model; give another folder')
  like = None if begun is None else begun.released
  if like is None:
    family, wanted = families.of(model.cfg).name, ()
    copy = workdir.text / 'tokenizer.json'
    end = FileTokenizer(copy).eod if copy.is_file() else None
  else:
    source = _Released(
      like['tensors'], like['config'], begun.name, workdir.start
    )
    entries = _entries(source, like, model)
    wanted = {source.names[entry.name] for entry in entries}
  files.held(target, wanted, None)
  params = generate.load_params(workdir, model.cfg)
  target.mkdir(parents=True, exist_ok=True)
  for path in sorted(workdir.text.glob('*')):
    write_text(target / path.name, path.read_text())
  if like is None:
    hf.save(target, model, params, family=family, end=end)
  else:
    _write_like(source, entries, params, target)


def _entries(source, released, model):
  from deltanet_jax.hf import store
  from deltanet_jax.parallel import sharding

  family = families.named(released['family'])
  shapes = sharding.abstract_params(model)
  return sum(store.matched(source, family, model.cfg, shapes), [])


def _write_like(source, entries, params, target):
  from deltanet_jax.hf import plan, store

  arrays, groups, total = dict(plan.leaves(params)), {}, 0
  for entry in entries:
    groups.setdefault(source.names[entry.name], []).append(entry)
    total += math.prod(entry.shape) * source.dtype(entry.name).itemsize
  for i, (file, group) in enumerate(sorted(groups.items()), 1):
    described = {
      entry.name: (source.dtype(entry.name), entry.shape) for entry in group
    }
    tensors = (store.joined(entry, arrays) for entry in group)
    files.write_file(target / file, described, tensors)
    print(f'wrote {file} ({i} of {len(groups)})', file=sys.stderr)
  names = [[entry.name for entry in groups[file]] for file in sorted(groups)]
  files.write_index(target, names, sorted(groups), total)
  settings = quantised.removed(source.settings)
  write_text(target / 'config.json', json.dumps(settings, indent=2) + '\n')
