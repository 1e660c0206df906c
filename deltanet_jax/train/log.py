"""Logs of a run: JSON lines, TensorBoard events, a plot, terminal lines."""

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import TextIO

from deltanet_jax.config.extras import describe_extra, is_installed
from deltanet_jax.config.files import replace_nonfinite, write_text
from deltanet_jax.progress import Line, format_span
from deltanet_jax.runs.folder import Workdir

Record = dict[str, float]  # numbers by name, 'step' among them
Stored = dict[str, float | None]  # as read back: inf and nan are None


class JsonLines:
  """A file with a JSON object on each line, continued after `step`.

  Lines of later steps, and an incomplete last line, are removed: the run writes
  them again.
  """

  def __init__(self, path: pathlib.Path, step: int):
    records = [r for r in read_records(path) if r['step'] <= step]  # type: ignore[operator]
    write_text(path, ''.join(map(_encode, records)))
    self._file = open(path, 'a')

  def write(self, record: Record) -> None:
    self._file.write(_encode(record))
    self._file.flush()

  def sync(self) -> None:
    """Returns when every line is on disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read_records(path: pathlib.Path) -> list[Stored]:
  """The records of a JsonLines file, without an incomplete last line.

  Complete lines that are no records, as after a power failure, are left out
  and reported on stderr.
  """
  if not path.is_file():
    return []
  records = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
    try:
      record = json.loads(line.decode())
      if not isinstance(record['step'], int):
        raise TypeError
      records.append(record)
    except (ValueError, TypeError, LookupError, RecursionError):
      print(f'{path}:{number} is no record; left out', file=sys.stderr)
  return records


def _encode(record):
  return json.dumps(replace_nonfinite(record), allow_nan=False) + '\n'


class Log:
  """The records of a run in its Workdir, continued after `step`.

  `metrics.jsonl` holds what the configuration determines, `timing.jsonl` what
  depends on the clock.
  """

  def __init__(self, workdir: Workdir, step: int):
    self._metrics = JsonLines(workdir.metrics, step)
    self._timing = JsonLines(workdir.timing, step)
    self._board = None
    if is_installed('tensorboardX'):
      self._board = Board(workdir.tensorboard, step)
    else:
      _say_missing('TensorBoard events', 'tensorboardX')
    if not is_installed('matplotlib'):
      _say_missing(workdir.plot.name, 'matplotlib')

  def metrics(self, record: Record) -> None:
    self._metrics.write(record)
    self._to_board(record)

  def timing(self, record: Record) -> None:
    self._timing.write(record)
    self._to_board(record)

  def _to_board(self, record):
    if self._board is not None:
      self._board.write(record)

  def sync(self) -> None:
    """Returns when all is on disk; call it before a checkpoint is saved."""
    self._metrics.sync()
    self._timing.sync()
    if self._board is not None:
      self._board.flush()

  def close(self) -> None:
    # closes all of them even if one fails
    with contextlib.ExitStack() as stack:
      for file in (self._metrics, self._timing, self._board):
        if file is not None:
          stack.callback(file.close)


def _say_missing(file, library):
  print(f'no {file}: {describe_extra(library)}', file=sys.stderr)


class Board:
  """TensorBoard events, continued after `step`.

  `write` writes in the caller's thread. The library's own writer has a thread
  of its own: when a full disk ends it, the run does not notice at once.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    self._events = EventsWriter(str(folder / 'events'))
    if step > 0:
      # hides events that an earlier process wrote for later steps
      start = SessionLog(status=SessionLog.START)
      self._events.write_event(Event(step=step + 1, session_log=start))

  def write(self, record: Record) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    for name, value in record.items():
      if name != 'step' and math.isfinite(value):
        event = Event(step=record['step'], summary=scalar(name, value))
        event.wall_time = time.time()
        self._events.write_event(event)
    self.flush()

  def flush(self) -> None:
    self._events.flush()

  def close(self) -> None:
    self._events.close()


class NoLog:
  """The Log of a process that writes nothing."""

  def metrics(self, record: Record) -> None:
    pass

  def timing(self, record: Record) -> None:
    pass

  def sync(self) -> None:
    pass

  def close(self) -> None:
    pass


class Clock:
  """Tokens per second and time left, from the latest steps.

  Several steps may have begun; they end in their order, and a step counts from
  the end of the one before, if that is later than its own begin.
  """

  def __init__(self, tokens: int, total: int):
    self._tokens = tokens  # of a step
    self._total = total  # steps
    self._seconds: collections.deque[float] = collections.deque(maxlen=20)
    self._starts: collections.deque[float] = collections.deque()
    self._end = 0.0  # of the step before
    self._count = 0

  def start(self) -> None:
    self._starts.append(time.perf_counter())

  def stop(self) -> None:
    """Ends the first of the steps that `start` began."""
    now = time.perf_counter()
    seconds = now - max(self._starts.popleft(), self._end)
    self._end = now
    if self._count == 1:
      self._seconds.clear()  # drops the first step, which compiles
    self._seconds.append(seconds)
    self._count += 1

  @property
  def rate(self) -> float:
    return self._tokens * len(self._seconds) / sum(self._seconds)

  def left(self, step: int) -> float:
    """Seconds of training left after `step`."""
    return (self._total - step) * sum(self._seconds) / len(self._seconds)


class Steps:
  """Shows steps: one line that is updated on a terminal, else a line every
  `every` steps."""

  def __init__(self, total: int, every: int, stream: TextIO | None = None):
    self._total = total
    self._every = every
    self._line = Line(stream)
    self.say = self._line.say

  def step(
    self, step: int, loss: float, bits: float | None, clock: Clock
  ) -> None:
    """bits: the loss in bits per byte, or None."""
    due = step % self._every == 0 or step == self._total
    if not (self._line.live or due):
      return
    parts = [f'step {step}/{self._total}', f'loss {loss:.4f}']
    if bits is not None:
      parts.append(f'{bits:.3f} bits/byte')
    parts += [
      f'{clock.rate:,.0f} tokens/s',
      f'{format_span(clock.left(step))} left',
    ]
    self._line.show('  '.join(parts))


def draw_losses(workdir: Workdir) -> None:
  """Draws `loss.png` from `metrics.jsonl`, where matplotlib is installed."""
  if not is_installed('matplotlib'):
    return
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  records = read_records(workdir.metrics)
  figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
  for name, label, style in (
    ('loss', 'training', '-'),
    ('heldout_loss', 'held-out', 'o'),
  ):
    points = [(r['step'], r[name]) for r in records if r.get(name) is not None]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
  axes.set_xlabel('step')
  axes.set_ylabel('loss (nats per token)')
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  if axes.lines:
    axes.legend(frameon=False)
  temporary = workdir.plot.with_suffix('.tmp.png')
  try:
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, workdir.plot)
  finally:
    pyplot.close(figure)
    temporary.unlink(missing_ok=True)
