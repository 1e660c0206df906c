"""Trains a model, or continues a run from its newest checkpoint.

  python -m launch.train --config=quickstart --workdir=runs/first

launch.presets lists the presets. --config=qwen3:8b names one from any folder,
--config=configs/qwen3.py:8b by its file, --config=mine.py is a file of yours.

Flags set any field of the configuration; tuples take an index:

  --config.train.steps=100 --config.model.period.0.mixer.chunk=32

(model.period is the block of layers that repeats model.repeats times.) The
fields are documented in deltanet_jax/config/experiment.py and mixers.py.

To fine-tune released weights:

  python -m launch.train --released=Qwen3-0.6B --workdir=runs/mine \\
    --config.data.path='texts/*.jsonl' --config.train.steps=500

--released is a folder with its tokenizer.json, the output of launch.convert,
ORG/NAME[@REVISION] on the Hugging Face hub, or the --workdir of another run. It
gives model and tokenizer; --config gives everything else (default: finetune).
Of the model only remat, form, chunk and stage may be set. Once the run has a
checkpoint it no longer needs the folder.

Started again with the same --workdir, a run continues from its newest
checkpoint; --config may be left out. Only the mesh, remat, form, chunk and
train.log_every, eval_every, eval_rows, save_every, keep and steps may change.
SIGTERM and Ctrl-C save after the current step. If the text files have changed,
the run is refused; --new_text continues with the new text (or that of
--config.data.path) from its first row, newly shuffled.

The form 'auto' of a mixer, the default, is on a TPU a kernel, for softmax
attention on an NVIDIA GPU cuDNN, and elsewhere a program of XLA ('chunked',
'blocks'). What a run takes is shown at its start and recorded in
WORKDIR/forms.json, with the step from which on it holds.

To make a run longer, also a finished one:

  python -m launch.train --workdir=runs/mine --config.train.steps=300

From the newest checkpoint on the learning rate follows the schedule of 300
steps. For any other change start a new run from the weights of this one:
--released=runs/mine --workdir=runs/new.

Exit status: 0 done; 1 the run failed; 2 bad input; 128 + n stopped and saved
after signal n.

To train with several processes, on one machine or many, start each with the
same command, the same files and a --workdir on a disk that all share:

  python -m launch.train ... --coordinator=HOST:PORT --processes=2 --process=0

or with --distributed under SLURM, Open MPI, GKE or on TPU VMs. The number of
processes may change when a run continues.

Compiled programs are cached in ~/.cache/deltanet_jax/compiled (XDG_CACHE_HOME
replaces ~/.cache), which may be deleted at any time.
JAX_COMPILATION_CACHE_DIR=DIR names another folder, an empty value turns the
cache off.

JAX_PLATFORMS chooses the devices. Eight simulated devices on a CPU:
  JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command, process_flags
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.config.files import JsonObject, format_json
from deltanet_jax.config.overrides import suggest_field
from deltanet_jax.runs.folder import Workdir

if TYPE_CHECKING:
  from deltanet_jax.runs.source import Source

Changes = Sequence[tuple[str, str]]

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, new or to be continued.'
)
RELEASED = flags.DEFINE_string(
  'released', None, 'Initial weights: a folder, or ORG/NAME on the hub.'
)
NEW_TEXT = flags.DEFINE_bool(
  'new_text', False, 'Continue although the text files have changed.'
)
flags.adopt_module_key_flags(process_flags)


def split_flags(
  argv: list[str],
) -> tuple[tuple[str | None, Changes], list[str]]:
  """((file or None, changes), other arguments) of a command line."""
  path, changes, rest = config.split_argv(argv)
  _refuse_fields(rest)
  return (path, changes), rest


def _refuse_fields(argv):
  """Refuses --steps=5 and names --config.train.steps=5."""
  known = list(flags.FLAGS)
  for argument in argv[1:]:
    if argument == '--':
      break
    name, equals, value = argument.removeprefix('--').partition('=')
    if name == argument or name in known or name.removeprefix('no') in known:
      continue
    if difflib.get_close_matches(name, known, n=1, cutoff=0.8):
      continue  # absl names it
    if field := suggest_field(Experiment, name):
      raise ConfigError(
        f'no flag --{name}; did you mean --config.{field}{equals}{value}?'
      )


@command.as_main(split_flags)
def main(arguments: tuple[str | None, Changes]) -> int:
  """The command."""
  experiment, source = read_flags(*arguments)
  assert WORKDIR.value is not None  # read_flags refuses None
  result = train_run(experiment, Workdir(WORKDIR.value), source)
  if isinstance(result, int):
    return 128 + result
  if result is not None:
    print(format_json(result), end='')
  return 0


def read_flags(
  path: str | None, changes: Changes
) -> 'tuple[Experiment, Source | None]':
  """(Experiment, the Source of its initial weights or None).

  path: of the configuration or None   changes: (name, text) pairs
  """
  workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
  if RELEASED.value is None:
    experiment = _without_start(path, changes, workdir)
  if workdir is None:
    raise ConfigError('no --workdir=DIR given, the folder of the run')
  if RELEASED.value is None and not workdir.start.is_file():
    return experiment, None
  from deltanet_jax.runs import start
  from deltanet_jax.runs.source import open_model, read_start

  classes = config.find_classes(path) if path else ()
  source = read_start(workdir, classes)
  if RELEASED.value is None:
    return experiment, source
  if workdir.config.is_file():
    source = start.require_same_source(workdir, source, RELEASED.value)
  else:
    source = open_model(RELEASED.value, classes)
  return start.make_experiment(source, path or 'finetune', changes), source


def _without_start(path, changes, workdir):
  if path is None and workdir is not None and workdir.config.is_file():
    return config.override_fields(workdir.read(), changes)
  return config.read_experiment(path, changes)


def train_run(
  experiment: Experiment, workdir: Workdir, source: 'Source | None' = None
) -> JsonObject | int | None:
  """The results of the run, or the signal that stopped it; of several
  processes only the first has results, the others None."""
  workdir.check(experiment, NEW_TEXT.value)
  result = workdir.read_result()
  if result is not None and result['step'] == experiment.train.steps:
    if NEW_TEXT.value:
      raise ConfigError(
        f'--new_text: the run in {workdir.path} is finished; give more'
        ' --config.train.steps, or another --workdir'
      )
    print(f'{workdir.path} is already finished', file=sys.stderr)
    return result
  with process_flags.join_others():
    tokenizer = workdir.find_tokenizer(experiment)
    if source is not None and tokenizer == source.tokenizer:
      source.require_tokenizer()
    data = _read(experiment, tokenizer)
    if source is not None and not workdir.config.is_file():
      source.check()
    return _train(experiment, workdir, data, source, tokenizer)


def _read(experiment, tokenizer):
  from deltanet_jax.data.text import TextData
  from deltanet_jax.data.tokenizer import load_tokenizer

  # before a long text is tokenized
  ids = load_tokenizer(tokenizer).vocab_size
  rows = experiment.model.vocab
  if ids > rows:
    raise ConfigError(
      f'the tokenizer has {ids} ids and model.vocab is {rows};'
      + (
        " give this model's tokenizer as --config.data.tokenizer"
        if RELEASED.value
        else ' raise model.vocab'
      )
    )
  return TextData(dataclasses.replace(experiment.data, tokenizer=tokenizer))


def _train(experiment, workdir, data, source, tokenizer):
  from deltanet_jax.runs import start
  from deltanet_jax.runs.checkpoint import CheckpointError
  from deltanet_jax.train import compiled, loop

  if note := compiled.keep_programs():
    print(f'warning: {note}', file=sys.stderr)
  texts = start.make_texts(source, tokenizer)
  try:
    return loop.train(
      experiment, workdir, data, source=source, texts=texts,
      new_text=NEW_TEXT.value,
    )  # fmt: skip
  except (loop.NonFiniteError, CheckpointError) as error:
    print(f'error: {error}', file=sys.stderr)
  except OSError as error:
    print(
      f'error: {error.filename or workdir.path}: {error.strerror or error};'
      ' once that is fixed, start again to continue from the newest checkpoint',
      file=sys.stderr,
    )
  sys.exit(1)


if __name__ == '__main__':
  main()
