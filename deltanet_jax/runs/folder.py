"""The folder of a run: its configuration and its files.

Standard library only, so that the folder of another run is refused before jax
is imported.
"""

import fcntl
import pathlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

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

# what may change when a run continues: nothing that affects the steps done. Of
# the model it is how the same function is computed
CHANGEABLE = (
  'steps', 'log_every', 'eval_every', 'eval_rows', 'save_every', 'keep'
)  # fmt: skip
FREE = re.compile(
  rf'mesh\..*|train\.({"|".join(CHANGEABLE)})'
  r'|model\.(.*\.)?(remat|mixer\.(form|chunk))'
)
# what --new_text may change too
TEXT = re.compile(r'data\.(path|field)')


# identifies a text, see `TextData.fingerprint`
Fingerprint = Mapping[str, int | list[int]]


def require_folder(path: pathlib.Path) -> None:
  """Refuses a --workdir that is a file."""
  if path.exists() and not path.is_dir():
    raise ConfigError(f'--workdir={path} is a file; give a folder')


def require_same(
  path: pathlib.Path, differences: list[str], what: str, advice: str = ''
) -> None:
  """Refuses a folder that holds `what` of another configuration.

  differences: lines of `list_differences`   advice: appended to the message
  """
  if differences:
    raise ConfigError(
      f'{path} holds {what}: {"; ".join(differences)} (there != here); give'
      f' another --workdir{advice}'
    )


class Workdir:
  """The files of a run and its configuration."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.config = self.path / 'config.json'
    self.metrics = self.path / 'metrics.jsonl'  # identical after any restart
    self.timing = self.path / 'timing.jsonl'
    self.plot = self.path / 'loss.png'
    self.result = self.path / 'result.json'
    self.checkpoints = self.path / 'checkpoints'
    self.tensorboard = self.path / 'tensorboard'
    self.start = self.path / 'start.json'  # the initial weights, if released
    self.text = self.path / 'tokenizer'  # copies: the run needs no other folder
    self.corpus = self.path / 'text.json'  # fingerprint of the training text
    self.forms = self.path / 'forms.json'  # see `take_forms`
    self._lock: TextIO | None = None

  def read(self, classes: Iterable[type] = ()) -> Experiment:
    """The Experiment of the run.

    classes: as for `config.from_json`

    Raises:
      ConfigError: the folder holds no run.
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
    """Refuses the folder of a run with another configuration.

    The mesh, remat, form, chunk and the fields of CHANGEABLE may differ: they
    change no step that was made, up to the order of sums. `train.steps` may be
    any number from the steps done on; from the checkpoint on the learning rate
    follows the schedule of that many steps. With `new_text` the fields of TEXT
    may differ too.

    Raises:
      ConfigError: names the fields that differ, or the steps that are done.
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
    """Advice on such differences."""
    advice = _or_new_text(lines)
    if self._find_last_step() and not any(x.startswith('model') for x in lines):
      advice += f' (with --released={self.path} it starts from these weights)'
    return (
      f'{advice}; once a run has started only mesh, remat, form, chunk and'
      f' train.{", ".join(CHANGEABLE)} may change'
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
        ' checkpoint to continue from; give another --workdir'
      )

  def find_tokenizer(self, experiment: Experiment) -> str:
    """`data.tokenizer`, or the copy of it in the folder."""
    copy = self.text / 'tokenizer.json'
    return str(copy) if copy.is_file() else experiment.data.tokenizer

  def lock(
    self, experiment: Experiment, texts: Mapping[str, str] | None = None
  ) -> str | None:
    """Creates the folder if needed and locks it until `unlock` or process end.

    texts: {relative path: text} of further files of a new run

    Writes `config.json`. If the number of steps changes, `result.json` is
    removed first, so that the folder is consistent whenever the process is
    killed.

    Returns a message if the number of steps changes, else None.

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
      f'{now} steps instead of {before}; from the newest checkpoint on the'
      f' learning rate follows the {experiment.optim.schedule} schedule of'
      f' {now} steps'
    )

  def check_text(self, text: Fingerprint, new_text: bool = False) -> None:
    """Refuses another text than the run was trained on.

    new_text: continue with this one

    Raises:
      ConfigError: says what differs.
    """
    before = self._text()
    if before is None or new_text:
      return
    if lines := _changes(before, text):
      raise ConfigError(
        f'the text of {self.path} has changed: {"; ".join(lines)}; restore the'
        ' files, or add --new_text to continue with the new text from its first'
        ' row, newly shuffled'
      )

  def take_text(
    self, text: Fingerprint, step: int, new_text: bool = False
  ) -> tuple[int, str | None]:
    """Records `text` as the text from `step` on.

    Returns (step since when the run is trained on it, message or None).
    """
    before, message = self._text(), None
    if before is None:
      since = step if new_text else 0
      if step:
        message = (
          'an older version stored no fingerprint of the text; this text is'
          ' assumed to be the same'
        )
    elif lines := _changes(before, text):
      since = step
      message = f'new text from here on ({"; ".join(lines)})'
    else:
      since = min(before['since'], step)
    record = {**text, 'since': since}
    if record != before:
      write_text(self.corpus, format_json(record))
    return since, message

  def take_forms(
    self, forms: Mapping[str, str], platform: str, step: int
  ) -> str:
    """Records which forms mixers take from `step` on: a list of
    {"step", "platform", "forms"}, with an entry where they change.

    forms: {mixer: form}, as `kernels.collect_forms` yields it

    Returns a line that says so.
    """
    entry = {'platform': platform, 'forms': dict(forms)}
    stored: Any = []
    if self.forms.is_file():
      stored = read_json(self.forms).get('since', [])
    history = [old for old in stored if old['step'] <= step]
    line = f'on {platform}: {_list_forms(forms)}'
    before = history[-1] if history else None
    if before is None or before | entry != before:
      history.append({'step': step, **entry})
      if before:
        was = f'on {before["platform"]}: {_list_forms(before["forms"])}'
        line += f'; up to this step {was}'
    if history != stored:
      write_text(self.forms, format_json({'since': history}))
    return line

  def _text(self):
    if not self.corpus.is_file():
      return None
    record = read_json(self.corpus)
    since = record.get('since')
    if not isinstance(since, int) or since < 0:
      raise ConfigError(
        f'{self.corpus}: no "since"; remove the file, and the present text is'
        ' assumed to be the one of the run'
      )
    return record

  def require_seen(self, experiment: Experiment, seconds: float = 60) -> None:
    """Waits until the `config.json` of process 0 is visible here.

    Raises:
      ConfigError: it is not: the processes do not share the folder.
    """
    wanted = config.to_json(experiment) + '\n'
    until = time.monotonic() + seconds  # a network disk may show it late
    while not self.config.is_file() or self.config.read_text() != wanted:
      if time.monotonic() > until:
        raise ConfigError(
          f'--workdir={self.path}: files of process 0 are not visible here;'
          ' give a folder on a disk that all processes share'
        )
      time.sleep(0.1)

  def unlock(self) -> None:
    """Unlocks the folder, if it is locked."""
    if self._lock:
      self._lock.close()

  def read_result(self) -> JsonObject | None:
    """The results of a finished run, or None."""
    if not self.result.is_file():
      return None
    result = read_json(self.result)
    if 'step' not in result:
      raise ConfigError(
        f'{self.result}: not the results of a run; remove it, and the run is'
        ' scored again'
      )
    return result


def _list_forms(forms):
  return ', '.join(f'{name} {form}' for name, form in forms.items()) or (
    'no mixer with forms'
  )


def _or_new_text(lines):
  """Advice if only the path of the text differs."""
  if all(TEXT.fullmatch(line.split(':')[0]) for line in lines):
    return ', or add --new_text to continue with another text'
  return ''


def _changes(before, text):
  """Lines 'files: 60 before, 61 now' of what differs."""
  counts = [
    f'{name}: {before.get(name)} before, {value} now'
    for name, value in text.items()
    if before.get(name) != value and name != 'sums'
  ]
  if not counts and before.get('sums') != text['sums']:
    return ['the same number of files, documents and bytes, other contents']
  return counts
