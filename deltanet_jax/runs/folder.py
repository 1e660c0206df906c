"""The folder of a run: which configuration owns it, and where things lie.

Standard library only, so that a folder of another run is refused before jax is
imported.
"""

import fcntl
import pathlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import TextIO

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.config.files import (
  JsonObject,
  format_json,
  read_json,
  read_text,
  write_text,
)

# what a run may change when it is taken up again: nothing that the steps done
# so far have computed
CHANGEABLE = (
  'steps', 'log_every', 'eval_every', 'eval_rows', 'save_every', 'keep'
)  # fmt: skip
FREE = re.compile(rf'mesh\..*|train\.({"|".join(CHANGEABLE)})')
# and where its text lies, if it is told to go on with another
TEXT = re.compile(r'data\.(path|field)')


# what two texts are told apart by, see `TextData.fingerprint`
Fingerprint = Mapping[str, int | list[int]]


def require_folder(path: pathlib.Path) -> None:
  """Refuses a --workdir that is a file."""
  if path.exists() and not path.is_dir():
    raise ConfigError(f'--workdir={path} is a file; give a folder')


def require_same(
  path: pathlib.Path, differences: list[str], what: str, advice: str = ''
) -> None:
  """Refuses a folder that holds `what` of another configuration.

  differences: lines of `list_differences`   advice: what else helps
  """
  if differences:
    raise ConfigError(
      f'{path} holds {what}: {"; ".join(differences)} (there != here); give'
      f' another --workdir{advice}'
    )


class Workdir:
  """Paths of a run's files, and its configuration."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.config = self.path / 'config.json'
    self.metrics = self.path / 'metrics.jsonl'  # the same after any restart
    self.timing = self.path / 'timing.jsonl'
    self.plot = self.path / 'loss.png'
    self.result = self.path / 'result.json'
    self.checkpoints = self.path / 'checkpoints'
    self.tensorboard = self.path / 'tensorboard'
    self.start = self.path / 'start.json'  # of what it began with, if released
    self.text = self.path / 'tokenizer'  # copies: a run needs nothing outside
    self.corpus = self.path / 'text.json'  # which text it is trained on
    self._lock: TextIO | None = None

  def read(self, classes: Iterable[type] = ()) -> Experiment:
    """The Experiment that the folder belongs to.

    classes: as for `config.from_json`

    Raises:
      ConfigError: there is none.
    """
    if not self.config.is_file():
      raise ConfigError(
        f'no run in {self.path} (no config.json); give the --workdir of a'
        ' training run'
      )
    try:
      return config.from_json(read_text(self.config), Experiment, classes)
    except ConfigError as error:
      raise ConfigError(f'{self.config}: {error}') from error

  def check(self, experiment: Experiment, new_text: bool = False) -> None:
    """Refuses a folder that another configuration owns.

    The mesh and the fields of CHANGEABLE may differ: they change no step that
    was made, beyond the order of a sum. `train.steps` may be any number that is
    not below the steps done; from the checkpoint on the schedule is that of so
    many steps. With `new_text` the fields of TEXT may differ too.

    Raises:
      ConfigError: with the fields that differ, or the steps that are done.
    """
    require_folder(self.path)
    if not self.config.is_file():
      return
    stored, lines = self.read(config.find_own_classes(experiment)), []
    for line in config.list_differences(stored, experiment):
      name = line.split(':')[0]
      if not FREE.fullmatch(name) and not (new_text and TEXT.fullmatch(name)):
        lines.append(line)
    what, advice = 'a run of another configuration', self._advise(lines)
    require_same(self.path, lines, what, advice)
    self._require_steps_left(stored, experiment)

  def _advise(self, lines):
    """What else to do about such differences."""
    advice = _or_new_text(lines)
    if self._find_last_step() and not any(x.startswith('model') for x in lines):
      advice += f' (with --released={self.path} it begins with these weights)'
    return (
      f'{advice}; of a run that has begun only mesh and train.'
      f'{", ".join(CHANGEABLE)} may change'
    )

  def _find_last_step(self):
    """The step of the newest checkpoint, 0 if there is none."""
    names = [path.name for path in self.checkpoints.glob('*')]
    return max((int(name) for name in names if name.isdecimal()), default=0)

  def _require_steps_left(self, stored, experiment):
    steps, done = experiment.train.steps, self._find_last_step()
    if steps == stored.train.steps:
      return
    if steps < done:
      raise ConfigError(
        f'--config.train.steps={steps}: the run in {self.path} has done {done}'
        f' steps; give {done} or more, or another --workdir'
      )
    result = self.read_result()
    if result is not None and not done:
      raise ConfigError(
        f'{self.path} holds the results of {result["step"]} steps and no'
        ' checkpoint to go on from; give another --workdir'
      )

  def find_tokenizer(self, experiment: Experiment) -> str:
    """What `data.tokenizer` names, or the folder's own copy of it."""
    copy = self.text / 'tokenizer.json'
    return str(copy) if copy.is_file() else experiment.data.tokenizer

  def claim(
    self, experiment: Experiment, texts: Mapping[str, str] | None = None
  ) -> str | None:
    """Makes the folder this run's own, until `release` or the process's end.

    texts: {relative path: text} of the files that a new run is to have.
    `config.json` is from here on what the run goes on with. Where that is
    another number of steps, the results of the former number are removed first:
    killed at any moment, the folder is that of a run with steps to do, or with
    its results to write.

    Returns what to say of another number of steps, else None.

    Raises:
      ConfigError: it cannot be written, or another process trains in it.
    """
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      lock = open(self.path / 'lock', 'w')
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._lock = lock
    except BlockingIOError as error:
      raise ConfigError(
        f'another process trains in {self.path}; stop it or give another'
        ' --workdir'
      ) from error
    except OSError as error:
      raise ConfigError(f'--workdir={self.path}: {error.strerror}') from error
    try:
      if not self.config.is_file():
        for name, text in (texts or {}).items():
          path = self.path / name
          path.parent.mkdir(exist_ok=True)
          write_text(path, text)
      note = self._change_steps(experiment)
      write_text(self.config, config.to_json(experiment) + '\n')
    except OSError as error:
      raise ConfigError(f'--workdir={self.path}: {error.strerror}') from error
    return note

  def _change_steps(self, experiment):
    if not self.config.is_file():
      return None
    stored = self.read(config.find_own_classes(experiment))
    before, now = stored.train.steps, experiment.train.steps
    if before == now:
      return None
    self.result.unlink(missing_ok=True)
    return (
      f'{now} steps in the place of {before}; from the last checkpoint on the'
      f' learning rate follows the {experiment.optim.schedule} schedule of'
      f' {now} steps'
    )

  def check_text(self, text: Fingerprint, new_text: bool = False) -> None:
    """Refuses another text than the run was trained on so far.

    new_text: the run is to go on with this one

    Raises:
      ConfigError: with what differs.
    """
    before = self._text()
    if before is None or new_text:
      return
    if lines := _changes(before, text):
      raise ConfigError(
        f'the text of {self.path} has changed: {"; ".join(lines)}; bring back'
        ' the text it was, or add --new_text to go on with this one, its rows'
        ' from the first on in an order of their own'
      )

  def take_text(
    self, text: Fingerprint, step: int, new_text: bool = False
  ) -> tuple[int, str | None]:
    """(step since when the run is trained on `text`, what to say of it or
    None), known from here on, `step` steps being done."""
    before, message = self._text(), None
    if before is None:
      since = step if new_text else 0
      if step:
        message = (
          'stored before texts were known; this one is its text from now on'
        )
    elif lines := _changes(before, text):
      since = step
      message = f'another text from here on ({"; ".join(lines)})'
    else:
      since = min(before['since'], step)
    record = {**text, 'since': since}
    if record != before:
      write_text(self.corpus, format_json(record))
    return since, message

  def _text(self):
    if not self.corpus.is_file():
      return None
    record = read_json(self.corpus)
    since = record.get('since')
    if not isinstance(since, int) or since < 0:
      raise ConfigError(
        f'{self.corpus}: no "since"; remove the file, and the run takes its'
        ' text for the one it was trained on'
      )
    return record

  def require_seen(self, experiment: Experiment, seconds: float = 60) -> None:
    """Waits until the folder shows what another process claimed it with.

    Raises:
      ConfigError: it does not: it is not a folder that the processes share.
    """
    wanted = config.to_json(experiment) + '\n'
    until = time.monotonic() + seconds  # a network disk may show it late
    while not self.config.is_file() or self.config.read_text() != wanted:
      if time.monotonic() > until:
        raise ConfigError(
          f'--workdir={self.path}: what process 0 wrote there is not seen'
          ' here; give a folder on a disk that all processes share'
        )
      time.sleep(0.1)

  def release(self) -> None:
    """Gives the folder free, if it was claimed."""
    if self._lock:
      self._lock.close()

  def read_result(self) -> JsonObject | None:
    """The results of a run that is done, or None."""
    if not self.result.is_file():
      return None
    result = read_json(self.result)
    if 'step' not in result:
      raise ConfigError(
        f'{self.result}: no results of a run; remove it, and the run is scored'
        ' again'
      )
    return result


def _or_new_text(lines):
  """What else to do where nothing but the text's place differs."""
  if all(TEXT.fullmatch(line.split(':')[0]) for line in lines):
    return ', or add --new_text to go on with another text'
  return ''


def _changes(before, text):
  """Lines 'files: 60 before, 61 now' of what differs."""
  counts = [
    f'{name}: {before.get(name)} before, {value} now'
    for name, value in text.items()
    if before.get(name) != value and name != 'sums'
  ]
  if not counts and before.get('sums') != text['sums']:
    return ['as many files, documents and bytes, and others among them']
  return counts
