"""A training run: start or resume, train, evaluate, save, finish."""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import statistics
import time
from collections.abc import Mapping
from typing import TextIO

import jax

from deltanet_jax import config, kernels
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.config.files import format_json, write_text
from deltanet_jax.data.text import TextData
from deltanet_jax.objectives.score import score_batches
from deltanet_jax.parallel import sharding
from deltanet_jax.runs import processes
from deltanet_jax.runs.checkpoint import Checkpoints
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.source import Source
from deltanet_jax.train import compiled, log
from deltanet_jax.train.program import make_program
from deltanet_jax.train.state import State
from deltanet_jax.train.step import MAX_SKIPPED_IN_A_ROW

Result = dict[str, int | float | None]

RATE = 'tokens_per_second'


class NonFiniteError(RuntimeError):
  """Too many steps in a row had a loss, gradient or parameter not finite."""


def make_items(state: State) -> dict[str, object]:
  """The items of a checkpoint; generation reads 'params' alone."""
  return {'params': state.params, 'rest': tuple(state[1:])}


def train(
  experiment: Experiment,
  workdir: Workdir,
  data: TextData,
  stream: TextIO | None = None,
  source: Source | None = None,
  texts: Mapping[str, str] | None = None,
  new_text: bool = False,
) -> Result | int | None:
  """Trains to the last step, or up to SIGTERM or SIGINT; then saves.

  workdir: a Workdir that was checked   data: the experiment's TextData
  source: the initial weights; None: random ones
  texts: see `Workdir.lock`   new_text: see `Workdir.check_text`

  Returns the results, which are also in `result.json`, or the number of the
  signal that stopped the run. Every process calls this; all of them write
  checkpoints, the first alone writes the other files and returns results, the
  others return None.

  A run resumes from the newest complete checkpoint: on the same mesh,
  `metrics.jsonl` is then bitwise identical to that of an uninterrupted run. If
  `train.steps` has changed (`Workdir.check`), lines up to the checkpoint stay.

  Raises:
    ConfigError: the mesh needs more devices, or does not divide the model;
      the folder cannot be written, or another run trains in it; `source`
      cannot be read; the text is not that of the run; the processes were
      started differently.
    NonFiniteError: MAX_SKIPPED_IN_A_ROW steps in a row were skipped.
    CheckpointError: no checkpoint can be read or written.
    OSError: another file of the run cannot be written, as on a full disk.
  """
  stored = experiment  # with -1 in the mesh, so that another size can resume
  try:
    filled = experiment.mesh.fill(jax.device_count())
    experiment = dataclasses.replace(experiment, mesh=filled)
    mesh = sharding.make_mesh(filled)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  processes.require_devices(mesh)
  program = make_program(experiment, mesh)
  # not earlier: a configuration that cannot run must not lock the folder
  note = _lock(stored, workdir, data, source, texts, new_text)
  keep = experiment.train.keep
  with (
    jax.set_mesh(mesh),
    Checkpoints(workdir.checkpoints, keep) as checkpoints,
  ):
    run = _Run(experiment, workdir, data, program, checkpoints, stream)
    with contextlib.closing(run):
      run.begin(source, mesh, new_text, note)
      with _signals() as caught:
        stop = run.train(caught)
      # all is saved: from here on a signal ends the process as usual
      return stop or run.finish()


def _lock(experiment, workdir, data, source, texts, new_text):
  """Checks that all processes run the same, then process 0 locks the folder;
  returns a message, or None."""
  text = data.fingerprint()
  processes.require_same_start(
    {
      'a configuration': config.to_json(experiment),
      'a text': format_json(text),
      'weights to begin with': source.name if source else '',
      'a flag --new_text': str(new_text),
    }
  )
  first = processes.is_first()

  def lock():
    if first:
      workdir.check_text(text, new_text)
      return workdir.lock(experiment, texts)
    return None

  note = processes.call_together(lock)
  processes.call_together(lambda: workdir.require_seen(experiment))
  return note


class _Run:
  """A run, in one of its processes."""

  def __init__(self, experiment, workdir, data, program, checkpoints, stream):
    self._experiment, self._workdir, self._data = experiment, workdir, data
    self._program, self._checkpoints = program, checkpoints
    cfg, size = experiment.train, experiment.data
    self._first = processes.is_first()
    if not self._first:
      stream = open(os.devnull, 'w')
    self._progress = log.Steps(cfg.steps, cfg.log_every, stream)
    self._clock = log.Clock(size.batch * size.seq_len, cfg.steps)
    self._bytes = size.tokenizer == 'bytes'
    self._log = None
    self._scored = False  # true once the held-out loss is compiled

  def close(self):
    if self._log is not None:
      self._log.close()

  def begin(self, source, mesh, new_text, note):
    """Restores the newest checkpoint; without one, loads `source` and scores
    it, or makes random weights.   note: a message to show first, or None"""
    if note:
      self._progress.say(f'{self._workdir.path}: {note}')
    size = lambda tree: (
      f'{sharding.count_bytes_per_device(tree) / 2**20:,.1f} MiB'
    )
    abstract = self._program.abstract
    self._progress.say(
      f'each device holds {size(abstract.params)} of parameters and'
      f' {size(abstract.opt_state)} of optimizer state, gradients take as much'
      ' as parameters'
    )
    newest = self._checkpoints.restore(make_items(self._program.abstract))
    self._step = newest[0] if newest else 0
    self._take_text(new_text)
    if newest is not None:
      state = newest[1]
      self._state = State(state['params'], *state['rest'])
      self._progress.say(f'continuing after step {self._step}')
      self._log = self._open_log(self._step)
      return
    if source is None:
      params = self._program.init()
    else:
      self._progress.say(f'reading the weights of {source.name}')
      params = source.load(mesh)
    self._state = self._program.begin(params)
    self._log = self._open_log(-1)
    if source is not None:
      self._evaluate_some()

  def _take_text(self, new_text):
    """Tells the data from which step on the run has its present text."""
    since = 0
    if self._first:
      text = self._data.fingerprint()
      since, note = self._workdir.take_text(text, self._step, new_text)
      if note:
        self._progress.say(f'{self._workdir.path}: {note}')
    self._data.begin(processes.find_largest(since))

  def _open_log(self, step):
    return log.Log(self._workdir, step) if self._first else log.NoLog()

  def train(self, caught):
    """Trains to the last step, or until `caught` of any process has a signal;
    returns the signal, or 0."""
    cfg = self._experiment.train
    if self._step == cfg.steps:
      return 0
    self._compile()
    share = self._program.share(self._experiment.data.batch)
    for batch in self._data.iterate(self._step, share.rows):
      self._step += 1
      self._train_on(share.place(batch))
      last = self._step == cfg.steps
      if self._step % cfg.eval_every == 0 or last:
        self._evaluate_some()
      # one process got the signal, and all stop after the same step
      stop = processes.find_largest(caught[0] if caught else 0)
      if self._step % cfg.save_every == 0 or last or stop:
        self._save()
      if stop:
        name = signal.Signals(stop).name
        self._progress.say(
          f'{name}: saved after step {self._step}; start again to continue'
        )
      if last or stop:
        break
    self._checkpoints.wait()
    return processes.find_largest(caught[0] if caught else 0)

  def _compile(self):
    """Compiles before the first step, which uses the compiled program."""
    self._progress.say(f'compiling the step ({compiled.describe_kept()})')
    start = time.monotonic()
    with kernels.collect_forms() as forms:
      step = self._program.step.lower(self._state, self._program.batch)
    if self._first:
      device, *_ = self._state.step.devices()
      line = self._workdir.take_forms(forms, device.platform, self._step)
      self._progress.say(line)
    step = step.compile()
    size = step.memory_analysis().temp_size_in_bytes / 2**20
    self._progress.say(
      f'the step is compiled, in {time.monotonic() - start:.1f} s: each device'
      f' needs {size:,.1f} MiB more for activations, gradients and the like'
    )

  def _train_on(self, batch):
    cfg, step = self._experiment.train, self._step
    self._clock.start()
    self._state, metrics = self._program.step(self._state, batch)
    # waits for the step: concurrent programs can deadlock on a simulated mesh,
    # and a step takes far longer than its dispatch
    metrics = {k: x.item() for k, x in jax.device_get(metrics).items()}
    self._clock.stop()
    counts = {
      name: metrics.pop(name)
      for name in ('skipped_in_a_row', 'tokens', 'bytes')
    }
    if counts['skipped_in_a_row'] >= MAX_SKIPPED_IN_A_ROW:
      raise NonFiniteError(
        f'steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step} had no finite loss,'
        ' gradient and parameters; lower the rate or look at the data (the last'
        f' checkpoint is in {self._workdir.checkpoints})'
      )
    if step % cfg.log_every == 0 or step == cfg.steps:
      size = self._experiment.data
      record = {'step': step, **metrics}
      record['tokens'] = step * size.batch * size.seq_len
      self._log.metrics(record)
      rate = self._clock.rate
      self._log.timing({'step': step, RATE: rate})
    bits = None
    if self._bytes and (size := counts['bytes']):
      bits = metrics['loss'] * counts['tokens'] / math.log(2) / size
    self._progress.step(step, metrics['loss'], bits, self._clock)

  def _score(self, least=None):
    """(Score, its description) of the held-out text, or of the first `least`
    rows, rounded up to whole batches."""
    if not self._scored:
      self._progress.say('compiling the held-out loss (less than the step)')
      self._scored = True
    experiment, params = self._experiment, self._state.params
    rows = experiment.data.batch // experiment.optim.accumulate
    share = self._program.share(rows)
    batches = self._data.make_heldout_batches(rows, share.rows)
    total = self._data.heldout_row_count
    count = math.ceil(min(least or total, total) / rows)
    batches = itertools.islice(batches, count)
    eod = self._data.tokenizer.eod
    score = score_batches(self._program.loss, params, batches, share.place, eod)
    every = 'all ' if count * rows >= total else ''
    return score, f'held-out loss of {every}{min(count * rows, total):,} rows'

  def _evaluate_some(self):
    score, what = self._score(self._experiment.train.eval_rows)
    record = {'step': self._step, 'heldout_loss': score.loss}
    line = f'step {self._step}: {what} {score.loss:.4f}'
    if self._bytes:
      # with the byte tokenizer every target but the eod is a byte
      bits = score.bits_per_byte(score.tokens - score.ends)
      record['heldout_bits_per_byte'] = bits
      line += f', {bits:.3f} bits/byte'
    self._log.metrics(record)
    self._progress.say(line)
    if self._first:
      log.draw_losses(self._workdir)

  def _save(self):
    # logs first: they must have every line up to a checkpoint's step
    self._log.sync()
    self._checkpoints.save(self._step, make_items(self._state))

  def finish(self):
    """Scores the whole held-out text; the first process writes the results to
    `result.json` and returns them."""
    self._progress.say('scoring the whole held-out text')
    (score, what), skipped = self._score(), int(self._state.skipped)
    bits = score.bits_per_byte(self._data.heldout_bytes)
    self._progress.say(
      f'step {self._step}: {what} {score.loss:.4f}, {bits:.3f} bits/byte'
    )
    if not self._first:
      return None
    size = self._experiment.data
    timing = log.read_records(self._workdir.timing)
    rates = [r[RATE] for r in timing if r.get(RATE)]
    result = {
      'step': self._step,
      'tokens': self._step * size.batch * size.seq_len,
      # None where timing.jsonl is lost
      RATE: statistics.median(rates) if rates else None,
      'parameters': sum(x.size for x in jax.tree.leaves(self._state.params)),
      'skipped': skipped,
      'heldout_loss': score.loss,
      'heldout_perplexity': score.perplexity,
      'heldout_bytes': self._data.heldout_bytes,
      'heldout_bits_per_byte': bits,
    }
    log.draw_losses(self._workdir)
    write_text(self._workdir.result, format_json(result))
    return result


@contextlib.contextmanager
def _signals():
  """Collects SIGTERM and SIGINT in a list, without their usual effect."""
  caught = []

  def catch(number, frame):
    del frame
    caught.append(number)

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, catch) for n in numbers}
  try:
    yield caught
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
