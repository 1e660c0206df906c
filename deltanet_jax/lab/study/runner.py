"""Runs the cells that are not done, side by side, and says how it goes."""

import concurrent.futures
import sys
import threading
import time
import traceback

from deltanet_jax.lab.study import cell as cells_
from deltanet_jax.lab.study.matrix import make_task, seconds


class Progress:
  """A line on stderr whenever a cell is done, and at least every half minute:
  what is done, cells a minute, the time left."""

  def __init__(self, costs, stream=sys.stderr, clock=time.monotonic):
    self._costs, self._parts = costs, dict.fromkeys(costs, 0.0)
    self._stream, self._clock = stream, clock
    self._start, self._said = clock(), clock()
    self._lock = threading.Lock()

  def part(self, name, share):
    """`share` of a cell is done."""
    with self._lock:
      self._parts[name] = share
      if self._clock() - self._said >= 30:
        self._say(f'in {name}')

  def done(self, name, said):
    with self._lock:
      self._parts[name] = 1.0
      self._say(f'{name}: {said}')

  def _say(self, what):
    self._said = self._clock()
    spent = self._said - self._start
    cost = lambda share: sum(self._costs[n] * share(n) for n in self._costs)
    made = cost(lambda n: self._parts[n])
    left = cost(lambda n: 1 - self._parts[n])
    finished = sum(x == 1 for x in self._parts.values())
    rest = f', {clock(spent / made * left)} left' if made else ''
    rate = f'{60 * finished / spent:.1f} cells a minute' if spent else ''
    print(
      f'{finished}/{len(self._parts)} {what} ({clock(spent)} gone, {rate}'
      f'{rest})',
      file=self._stream, flush=True,
    )  # fmt: skip


def clock(seconds):
  """'2:05' of 125 seconds, '1:02:05' of an hour more."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def run(cfg, cells, folder, jobs, limit=0.0):
  """Every cell of `cells` that `folder` lacks, `jobs` at a time; none is begun
  after `limit` seconds, unless that is 0.

  Killed and started again, what was done stays as it is: a cell depends on
  nothing but the sizes. A cell that raises is told and left out; returns
  {name: error} of these.
  """
  todo = [cell for cell in cells if not folder.done(cell)]
  progress = Progress({cell.name: seconds(cfg, cell) for cell in todo})
  errors = {}
  stop, began = threading.Event(), time.monotonic()

  def work(cell):
    if stop.is_set():
      raise cells_.Stopped
    start = time.monotonic()
    if limit and start - began > limit:
      return

    def tell(share):
      if stop.is_set():
        raise cells_.Stopped
      progress.part(cell.name, share)

    try:
      rows, arrays = cells_.run(cfg, cell, make_task(cfg, cell.task), tell)
    except (cells_.Stopped, KeyboardInterrupt):
      stop.set()  # before this thread takes another cell
      raise
    except Exception as error:
      # hours of other cells do not hang on this one
      errors[cell.name] = error
      traceback.print_exception(error)
      progress.done(cell.name, f'FAILED: {error}')
      return
    folder.keep(cell, rows, arrays, time.monotonic() - start)
    progress.done(cell.name, _told(rows))

  pool = concurrent.futures.ThreadPoolExecutor(jobs)
  futures = [pool.submit(work, cell) for cell in todo]
  try:
    for future in concurrent.futures.as_completed(futures):
      future.result()
  finally:
    stop.set()
    pool.shutdown(cancel_futures=True)
  return errors


def _told(rows):
  last = [
    row['accuracy'] for row in rows
    if row['phase'] == 'fresh' and row['slice'] == 'all'
    and row['step'] == row['steps']
  ]  # fmt: skip
  if not last or None in last:
    return 'NOT FINITE'
  return f'accuracy {sum(last) / len(last):.3f}'
