"""Progress lines of a long job. Standard library only."""

import sys
import time
from typing import TextIO

TERMINAL_PAUSE, FILE_PAUSE = 1.0, 10.0  # seconds between two lines


class Line:
  """A line that is overwritten on a terminal; in a file, one line a text."""

  def __init__(self, stream: TextIO | None = None):
    self._stream = stream or sys.stderr
    self.live = self._stream.isatty()
    self._width = 0

  def show(self, text: str) -> None:
    """Shows `text` in place of the text before it."""
    if self.live:
      self._write('\r' + text.ljust(self._width))
      self._width = len(text)
    else:
      self._write(text + '\n')

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self.clear()
    self._write(text + '\n')

  def clear(self) -> None:
    """Clears the line on the terminal."""
    if self._width:
      self._write('\r' + ' ' * self._width + '\r')
      self._width = 0

  def _write(self, text: str) -> None:
    self._stream.write(text)
    self._stream.flush()


class Progress:
  """Shows how much of a job is done, the rate and the time left.

  what: a verb, as 'converted'   total: of the job
  unit: the name of `size`, as 'GB' of 10^9: counts are shown divided by it
  """

  def __init__(
    self,
    what: str,
    total: int,
    unit: str,
    size: int = 1,
    stream: TextIO | None = None,
  ):
    self._what, self._unit, self._size = what, unit, size
    self._total, self._done, self._skipped = total, 0, 0
    self._line = Line(stream)
    self._start = self._shown = time.monotonic()

  def skip(self, count: int) -> None:
    """Counts what an earlier start has done, which gives no rate."""
    self._skipped += count
    self._done += count

  def add(self, count: int) -> None:
    """Counts `count` more as done."""
    self._done += count
    pause = TERMINAL_PAUSE if self._line.live else FILE_PAUSE
    if time.monotonic() > self._shown + pause:
      self._shown = time.monotonic()
      self._line.show(self._text())

  def end(self) -> None:
    """Prints the final line."""
    self._line.say(self._text())

  def _text(self) -> str:
    done, total = (f'{x / self._size:,.0f}' for x in (self._done, self._total))
    text = f'{self._what} {done}/{total} {self._unit}'
    if self._done == self._skipped:
      return text  # there is no rate yet
    seconds = max(time.monotonic() - self._start, 1e-9)
    rate = (self._done - self._skipped) / seconds
    left = (self._total - self._done) / rate
    return (
      f'{text}  {rate / self._size:,.0f} {self._unit}/s'
      f'  {format_span(left)} left'
    )


def format_span(seconds: float) -> str:
  """'2m05s' of 125 seconds, '1h02m' of 3,725."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s'
