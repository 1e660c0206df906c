"""Runs the jobs of a study in parallel and prints their progress."""

import concurrent.futures
import threading
import time
import traceback

from deltanet_jax.lab.study import training
from deltanet_jax.lab.study.matrix import estimate_seconds, make_task
from deltanet_jax.progress import Line, format_span


class Jobs:
  """Prints a line for every job done and at least every half minute; once a job
  is done, with the rate and the time left."""

  def __init__(self, costs, stream=None, clock=time.monotonic):
    self._costs, self._shares = costs, dict.fromkeys(costs, 0.0)
    self._line, self._clock = Line(stream), clock
    self._start = self._shown = clock()
    self._lock = threading.Lock()

  def part(self, name, share):
    """Notes that `share` of a job is done."""
    with self._lock:
      self._shares[name] = share
      if self._clock() - self._shown >= 30:
        self._show(f'in {name}')

  def done(self, name, result):
    """Notes that a job is done, with its result in words."""
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
    about = f'{format_span(spent)} elapsed'
    if finished and spent:  # the first job compiles most of the time
      about += (
        f', {60 * finished / spent:.1f} jobs a minute,'
        f' {format_span(spent / work * left)} left'
      )
    self._line.say(f'{finished}/{len(self._shares)} {what} ({about})')


def run_jobs(cfg, jobs, folder, parallel, limit=0.0):
  """Runs the jobs that `folder` lacks, `parallel` at a time; returns {name:
  error} of those that raised.

  No job starts after `limit` seconds, unless that is 0. A job depends on the
  sizes alone, so a study may be stopped and started again.
  """
  todo = [job for job in jobs if not folder.done(job)]
  progress = Jobs({job.name: estimate_seconds(cfg, job) for job in todo})
  errors = {}
  stop, began = threading.Event(), time.monotonic()

  def work(job):
    if stop.is_set():
      raise training.Stopped
    start = time.monotonic()
    if limit and start - began > limit:
      return

    def report(share):
      if stop.is_set():
        raise training.Stopped
      progress.part(job.name, share)

    try:
      rows, arrays = training.run_job(
        cfg, job, make_task(cfg, job.task), report
      )
    except (training.Stopped, KeyboardInterrupt):
      stop.set()  # before this thread takes another job
      raise
    except Exception as error:
      # the other jobs, maybe hours of them, go on
      errors[job.name] = error
      traceback.print_exception(error)
      progress.done(job.name, f'FAILED: {error}')
      return
    folder.keep(job, rows, arrays, time.monotonic() - start)
    progress.done(job.name, _describe_result(rows))

  pool = concurrent.futures.ThreadPoolExecutor(parallel)
  futures = [pool.submit(work, job) for job in todo]
  try:
    for future in concurrent.futures.as_completed(futures):
      future.result()
  finally:
    stop.set()
    pool.shutdown(cancel_futures=True)
  return errors


def _describe_result(rows):
  last = [
    row['accuracy'] for row in rows
    if (row['phase'], row['slice'], row['step'])
    == ('fresh', 'all', row['steps'])
  ]  # fmt: skip
  if not last or None in last:
    return 'NOT FINITE'
  return f'accuracy {sum(last) / len(last):.3f}'
