"""Writes the parameters of a run as released weights."""

import json
import math
import pathlib
import sys

from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import write_text
from deltanet_jax.hf import families, files, output, quantized
from deltanet_jax.runs import checkpoint
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.source import read_start


class _Released(files.RecordedTensors):
  """The tensors of a release with trained values."""

  def dtype(self, name):
    dtype = super().dtype(name)
    # the stored float8 scales do not fit trained values
    return files.WEIGHTS['BF16'] if dtype == files.FLOAT8 else dtype

  def find_scale(self, name):
    del name  # trained weights are written without scales


def write_release(workdir: Workdir, target: str | pathlib.Path) -> None:
  """Writes the newest parameters of a run as released weights, with tokenizer.

  A run that started from a release is written with its names, files, dtypes and
  config.json (float8 becomes bfloat16; embedding rows beyond the vocabulary are
  left out). Any other run is written in the first family that fits, with the
  end-of-document id in config.json.

  Raises:
    ConfigError: no family fits the model, or `target` holds another model.
    CheckpointError: no checkpoint is intact.
  """
  from deltanet_jax import hf
  from deltanet_jax.data.tokenizer import FileTokenizer
  from deltanet_jax.model import HybridLM

  target = pathlib.Path(target)
  model, start = HybridLM(workdir.read().model), read_start(workdir)
  if (target / 'config.json').exists():
    raise ConfigError(f'{target} holds a model; give another folder')
  like = None if start is None else start.released
  wanted: set[str] = set()
  if start is None or like is None:
    family = families.match_family(model.cfg).name
    copy = workdir.text / 'tokenizer.json'
    end = FileTokenizer(copy).eod if copy.is_file() else None
  else:
    source = _Released(
      like['tensors'], like['config'], start.name, workdir.start
    )
    entries = _entries(source, like, model)
    wanted = {source.names[entry.name] for entry in entries}
  output.find_written(target, wanted, None)
  params = checkpoint.load_params(workdir, model.cfg)
  target.mkdir(parents=True, exist_ok=True)
  for path in sorted(workdir.text.glob('*')):
    write_text(target / path.name, path.read_text())
  if like is None:
    hf.save_model(target, model, params, family=family, end=end)
  else:
    _write_like(source, entries, params, target)


def _entries(source, released, model):
  from deltanet_jax.hf import store

  family = families.get_family(released['family'])
  return store.match_tensors(source, family, model.cfg).all


def _write_like(source, entries, params, target):
  from deltanet_jax.hf import plan, store

  arrays, groups, total = dict(plan.list_leaves(params)), {}, 0
  for entry in entries:
    groups.setdefault(source.names[entry.name], []).append(entry)
    total += math.prod(entry.shape) * source.dtype(entry.name).itemsize
  groups = dict(sorted(groups.items()))
  for i, (file, group) in enumerate(groups.items(), 1):
    described = {
      entry.name: (source.dtype(entry.name), entry.shape) for entry in group
    }
    tensors = (store.join_entry(entry, arrays) for entry in group)
    output.write_file(target / file, described, tensors)
    print(f'wrote {file} ({i} of {len(groups)})', file=sys.stderr)
  names = {file: [entry.name for entry in groups[file]] for file in groups}
  output.write_index(target, names, total)
  settings = quantized.remove_settings(source.settings)
  write_text(target / 'config.json', json.dumps(settings, indent=2) + '\n')
