"""The folder of a run: which configuration owns it, and where things lie.

Standard library only, so that a folder of another run is refused before jax is
imported.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import time

from deltanet_jax import config
from deltanet_jax.config import ConfigError

# what a run may change when it is taken up again: nothing that a step computes
CADENCE = ('log_every', 'eval_every', 'eval_rows', 'save_every', 'keep')


class Workdir:
  """Paths of a run's files, and its configuration."""

  def __init__(self, path):
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
    self._lock = None

  def read(self):
    """The Experiment that the folder belongs to.

    Raises:
      ConfigError: there is none.
    """
    if not self.config.is_file():
      raise ConfigError(
        f'no run in {self.path} (no config.json); give the --workdir of a'
        ' training run'
      )
    try:
      return config.from_json(self.config.read_text())
    except ConfigError as error:
      raise ConfigError(f'{self.config}: {error}') from error

  def check(self, experiment):
    """Refuses a folder that another configuration owns.

    The mesh and the fields of CADENCE may differ: they change no step beyond
    the order of a sum. `train.steps` may not, as the schedule depends on it.

    Raises:
      ConfigError: with the fields that differ.
    """
    if self.path.exists() and not self.path.is_dir():
      raise ConfigError(f'--workdir={self.path} is a file; give a folder')
    if not self.config.is_file():
      return
    found = self.read()
    free = {name: getattr(experiment.train, name) for name in CADENCE}
    train = dataclasses.replace(found.train, **free)
    same = dataclasses.replace(
      experiment, mesh=found.mesh, train=experiment.train
    )
    lines = config.difference(dataclasses.replace(found, train=train), same)
    if lines:
      raise ConfigError(
        f'{self.path} holds a run of another configuration:'
        f' {"; ".join(lines)} (there != here); give another --workdir'
      )

  def tokenizer(self, experiment):
    """What `data.tokenizer` names, or the folder's own copy of it."""
    copy = self.text / 'tokenizer.json'
    return str(copy) if copy.is_file() else experiment.data.tokenizer

  def claim(self, experiment, kept=None):
    """Makes the folder this run's own, until `release` or the process's end.

    kept: {relative path: text}, files that a new run is to have from the first.

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
    if not self.config.is_file():
      for name, text in (kept or {}).items():
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write(path, text)
    write(self.config, config.to_json(experiment) + '\n')

  def require_seen(self, experiment, seconds=60):
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

  def release(self):
    """Gives the folder free, if it was claimed."""
    if self._lock:
      self._lock.close()

  def finished(self):
    """The results of a run that is done, or None."""
    if not self.result.is_file():
      return None
    return json.loads(self.result.read_text())


def write(path, text):
  """Puts `text` in the file at once: a reader sees all of it or the old."""
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
