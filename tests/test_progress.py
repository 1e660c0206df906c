"""Progress lines of long jobs."""

import io

import pytest

from deltanet_jax import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_rate_and_time_left_count_what_this_call_did(clock, stream):
  stream = stream()
  job = progress.Progress('converted', 4 * 10**9, 'MB', 10**6, stream)
  job.skip(2 * 10**9)  # by an earlier call
  clock[0] = 20.0
  job.add(5 * 10**8)
  assert 'converted 2,500/4,000 MB  25 MB/s  1m00s left' in stream.getvalue()
  job.add(15 * 10**8)  # no time has passed: no line
  assert stream.getvalue().count('converted') == 1
  job.end()
  assert stream.getvalue().endswith('4,000/4,000 MB  100 MB/s  0m00s left\n')


def test_no_time_is_left_of_what_has_not_begun(clock):
  stream = io.StringIO()
  job = progress.Progress('tokenized', 100, 'MB', stream=stream)
  job.skip(20)
  clock[0] = 60.0
  job.add(0)
  assert stream.getvalue() == 'tokenized 20/100 MB\n'


def test_a_line_is_written_over_on_a_terminal_alone():
  terminal, file = Terminal(), io.StringIO()
  for stream in terminal, file:
    line = progress.Line(stream)
    line.show('a long one')
    line.show('short')
    line.say('stays')
  assert terminal.getvalue() == ('\ra long one\rshort     \r     \rstays\n')
  assert file.getvalue() == 'a long one\nshort\nstays\n'


def test_spans_of_time():
  assert [progress.format_span(x) for x in (-1, 9.6, 125, 3725)] == [
    '0m00s', '0m10s', '2m05s', '1h02m',
  ]  # fmt: skip
