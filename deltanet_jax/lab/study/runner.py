"""Runs the cells that are not done, side by side, and says how it goes."""

import concurrent.futures
import threading
import time
import traceback

from deltanet_jax.lab.study import training
from deltanet_jax.lab.study.matrix import estimate_seconds, make_task
from deltanet_jax.progress import Line, format_span


class Cells:
  """A line whenever a cell is done, and at least every half minute: what is
  done, and once a cell is, cells a minute and the time left."""

  def __init__(self, costs, stream=None, clock=time.monotonic):
    self._costs, self._shares = costs, dict.fromkeys(costs, 0.0)
    self._line, self._clock = Line(stream), clock
    self._start = self._shown = clock()
    self._lock = threading.Lock()

  def part(self, name, share):
    """`share` of a cell is done."""
    with self._lock:
      self._shares[name] = share
      if self._clock() - self._shown >= 30:
        self._show(f'in {name}')

  def done(self, name, result):
    """A cell is done; `result` in words."""
    with self._lock:
      self._shares[name] = 1.0
      self._show(f'{name}: {result}')

  def _show(self, what):
    self._shown = self._clock()
    spent = self._shown - self._start
    cost = lambda share: sum(self._costs[n] * share(n) for n in self._costs)
    work = cost(lambda n: self._shares[n])
    left = cost(lambda n: 1 - self._shares[n])
    finished = sum(x == 1 for x in self._shares.values())
    about = f'{format_span(spent)} gone'
    if finished and spent:  # the first cell compiles most of the time
      about += (
        f', {60 * finished / spent:.1f} cells a minute,'
        f' {format_span(spent / work * left)} left'
      )
    self._line.say(f'{finished}/{len(self._shares)} {what} ({about})')


def run_cells(cfg, cells, folder, jobs, limit=0.0):
  """Every cell of `cells` that `folder` lacks, `jobs` at a time; none is begun
  after `limit` seconds, unless that is 0.

  Killed and started again, what was done stays as it is: a cell depends on
  nothing but the sizes. A cell that raises is told and left out; returns
  {name: error} of these.
  """
  todo = [cell for cell in cells if not folder.done(cell)]
  progress = Cells({cell.name: estimate_seconds(cfg, cell) for cell in todo})
  errors = {}
  stop, began = threading.Event(), time.monotonic()

  def work(cell):
    if stop.is_set():
      raise training.Stopped
    start = time.monotonic()
    if limit and start - began > limit:
      return

    def tell(share):
      if stop.is_set():
        raise training.Stopped
      progress.part(cell.name, share)

    try:
      rows, arrays = training.run_cell(
        cfg, cell, make_task(cfg, cell.task), tell
      )
    except (training.Stopped, KeyboardInterrupt):
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
    if (row['phase'], row['slice'], row['step'])
    == ('fresh', 'all', row['steps'])
  ]  # fmt: skip
  if not last or None in last:
    return 'NOT FINITE'
  return f'accuracy {sum(last) / len(last):.3f}'
