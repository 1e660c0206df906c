"""The initial weights of a run: checks and records."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.hf import hub
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.source import Source

# fields of the model that may change: how it is computed
_FREE = re.compile(r'(.*\.)?(remat|mixer\.(form|chunk|stage))')


def make_texts(source: Source | None, tokenizer: str) -> dict[str, str]:
  """{path in the folder: text} of a run: the record of its initial weights and
  the files of its tokenizer.

  tokenizer: 'bytes', or the path of a tokenizer.json
  """
  from deltanet_jax.hf.store import TEXT_FILES

  texts = {}
  if source is not None:
    record = {
      'name': source.name,
      'model': json.loads(config.to_json(source.model)),
      'tokenizer': source.tokenizer,
      'released': source.released,
    }
    texts['start.json'] = json.dumps(record) + '\n'
  if tokenizer == 'bytes':
    return texts
  path = pathlib.Path(tokenizer)
  texts['tokenizer/tokenizer.json'] = path.read_text()
  own = source is not None and tokenizer == source.tokenizer
  declaring = 'tokenizer_config.json', 'special_tokens_map.json'
  for name in TEXT_FILES if own else declaring:
    beside = path.with_name(name)
    if beside.is_file():
      texts[f'tokenizer/{name}'] = beside.read_text()
  return texts


def make_experiment(
  source: Source, path: str, changes: Iterable[tuple[str, str]]
) -> Experiment:
  """The Experiment that fine-tunes a Source.

  path: of a configuration file, whose get_config takes the Source, or whose
  model is the same   changes: (name, text) pairs, as for `override_fields`

  Raises:
    ConfigError: the file or the changes are wrong, or of another model.
  """
  experiment = config.load(path, source)
  if experiment.model.mtp is None:
    experiment = _with_model(experiment, mtp=source.model.mtp)
  _require_same(experiment.model, source, str(path))
  experiment = config.override_fields(experiment, changes)
  _require_same(experiment.model, source, '--config.model')
  return experiment


def require_same_source(
  workdir: Workdir, source: Source | None, name: str
) -> Source:
  """Returns the Source of the initial weights of a run; refuses another `name`.

  source: the one recorded in the run   name: as for `open_model`

  Raises:
    ConfigError: names both.
  """
  if source is None:
    raise ConfigError(
      f'{workdir.path} holds a run that did not start from released weights;'
      ' give another --workdir'
    )
  if source.name not in hub.list_names(name):
    raise ConfigError(
      f'{workdir.path} holds a run that started from {source.name}, not from'
      f' {name}; give another --workdir'
    )
  return source


def _with_model(experiment, **changes):
  model = dataclasses.replace(experiment.model, **changes)
  return dataclasses.replace(experiment, model=model)


def _require_same(model, source, where):
  lines = [
    line
    for line in config.list_differences(source.model, model)
    if not _FREE.fullmatch(line.split(':')[0])
  ]
  if lines:
    more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise ConfigError(
      f'{where} is another model than that of {source.name}:'
      f' {"; ".join(lines[:3])}{more} (there != here); only remat, form, chunk'
      ' and stage may change'
    )
