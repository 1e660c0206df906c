"""Opens a model from a run, released weights or converted ones.

jax is imported only when weights are loaded.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.hf import families, hub, keys, names
from deltanet_jax.hf.spelling import Spelling
from deltanet_jax.runs.folder import Workdir

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from jax.typing import DTypeLike

  from deltanet_jax.parallel.sharding import Params


class Release(TypedDict):
  """Record of a release in a converted folder or a run."""

  family: str
  config: names.Json  # config.json
  tensors: names.Json  # {name: [file, dtype, shape]}


class Source(NamedTuple):
  """A model that can be opened: a release, a conversion or a run."""

  name: str  # the folder's absolute path, or its id on the hub
  model: ModelConfig
  tokenizer: str  # 'bytes', or the path of a tokenizer.json
  released: Release | None  # None for a model trained from scratch
  dtype: str = 'bfloat16'  # of the computation
  trained: bool = False  # by a run: documents follow an end-of-document token
  seq_len: int = 2048  # tokens per row when it is scored

  def load(
    self, mesh: 'Mesh | None' = None, dtype: 'DTypeLike' = np.float32
  ) -> 'Params':
    """Loads the parameters, weight by weight, on a mesh or the first device.

    Raises:
      ConfigError: the folder is gone or incomplete.
      CheckpointError: a run has no intact checkpoint.
    """
    folder = hub.find_folder(self.name)
    if is_run(folder):
      from deltanet_jax.runs import checkpoint

      return checkpoint.load_params(Workdir(folder), self.model, mesh)
    from deltanet_jax import hf

    return hf.load_model(folder, dtype=dtype, mesh=mesh)[1]

  def check(self) -> None:
    """Refuses a release whose tensors do not fit its config.json, and a run
    without a checkpoint."""
    folder = hub.find_folder(self.name)
    if is_run(folder):
      if not Workdir(folder).checkpoints.is_dir():
        raise ConfigError(f'{folder} has no checkpoint yet; train there first')
      return
    if (folder / 'converted.json').is_file():
      from deltanet_jax.hf import converted

      converted.Converted(folder)
      return
    if self.released is None:
      raise ConfigError(f'{folder} no longer holds a run')
    from deltanet_jax.hf import store

    family = families.get_family(self.released['family'])
    source = family.tensors(folder)
    store.match_tensors(source, family, self.model)

  def require_tokenizer(self) -> None:
    """Refuses a folder that lacks its tokenizer.json."""
    path = pathlib.Path(self.tokenizer)
    if self.tokenizer != 'bytes' and not path.is_file():
      raise ConfigError(f'{path}: no such file; copy it from the release')


def open_model(name: str, classes: Iterable[type] = ()) -> Source:
  """The Source of a folder or of an id on the hub.

  classes: as for `config.from_json`

  Raises:
    ConfigError: there is no model that can be opened.
  """
  folder = hub.find_folder(name)
  if is_run(folder):
    return open_run(Workdir(folder), classes)
  if (folder / 'converted.json').is_file():
    from deltanet_jax.hf import converted

    record = converted.read_record(folder)
    released = Release(
      family=record['family'],
      config=record['config'],
      tensors=record['tensors'],
    )
  else:
    released = _record(folder)
  tokenizer = str(folder / 'tokenizer.json')
  return Source(
    hub.list_names(name)[0], _model(released, folder), tokenizer, released
  )


def open_run(workdir: Workdir, classes: Iterable[type] = ()) -> Source:
  """The Source of the newest checkpoint of a run."""
  experiment, start = workdir.read(classes), read_start(workdir, classes)
  return Source(
    str(workdir.path.resolve()),
    experiment.model,
    workdir.find_tokenizer(experiment),
    start and start.released,
    experiment.train.dtype,
    trained=True,
    seq_len=experiment.data.seq_len,
  )


def read_start(workdir: Workdir, classes: Iterable[type] = ()) -> Source | None:
  """The Source of the initial weights of a run, or None.

  Raises:
    ConfigError: its record cannot be read.
  """
  if not workdir.start.is_file():
    return None
  record: dict = names.read_json(workdir.start)
  try:
    record['model'] = config.from_json(
      json.dumps(record['model']), ModelConfig, classes
    )
    if record['released'] is not None:
      keys.ConfigKeys(record['released']['config'])
      families.get_family(record['released']['family'])
      record['released']['tensors']
    return Source(**record)
  except KeyError as error:
    raise ConfigError(f'{workdir.start}: no key {error}') from error
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise ConfigError(
      f'{workdir.start}: {names.format_error(error)}'
    ) from error


def is_run(folder: str | pathlib.Path) -> bool:
  """Whether the folder holds a training run."""
  try:
    return '_type' in names.read_json(pathlib.Path(folder) / 'config.json')
  except ConfigError:
    return False  # reading it as a release says what is wrong


def _record(folder: pathlib.Path) -> Release:
  """The record of a released folder, from its headers."""
  family, _ = families.read_config(folder)
  source = family.tensors(folder)
  is_needless = Spelling(family, source.names).is_needless
  return {
    'family': family.name,
    'config': names.read_json(folder / 'config.json'),
    'tensors': {
      name: [file, source.dtype(name).name, list(source.shape(name))]
      for name, file in source.names.items()
      if not is_needless(name)
    },
  }


def _model(released: Release, folder: pathlib.Path) -> ModelConfig:
  family = families.get_family(released['family'])
  cfg = family.read_config(
    keys.ConfigKeys(released['config'], str(folder / 'config.json'))
  )
  return families.add_mtp(family, cfg, released['tensors'])
