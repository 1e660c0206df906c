"""Work in a process of its own: a compiler that aborts ends that process alone.

Standard library only: the process is forked before jax is loaded.
"""

import multiprocessing
import os
import re
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

from deltanet_jax.config import ConfigError

T = TypeVar('T')

# the words of an abort: a fatal line of libtpu's log, or LLVM's
_FATAL = re.compile(
  r'^(?:F\d{4} .*?\] |.*(?=Check failed|LLVM ERROR))(.+)$', re.M
)


class CompilerError(Exception):
  """The compiler refused the program or ended its process; says its words."""


def run_apart(work: Callable[[Callable[[str], None]], T]) -> T:
  """Returns work(say), run in another process; `say` shows a line on stderr.

  Raises:
    ConfigError, CompilerError: work raised it.
    CompilerError: the process ended without a result.
    RuntimeError: work raised something else; says where.
  """
  fork = multiprocessing.get_context('fork')
  receive, send = fork.Pipe(duplex=False)
  with tempfile.TemporaryFile() as errors, os.fdopen(os.dup(2), 'w') as shown:
    process = fork.Process(
      target=_answer, args=(work, send, errors, shown), daemon=True
    )
    process.start()
    send.close()
    try:
      raised, result = receive.recv()
    except EOFError:
      raised, result = CompilerError, None
    process.join()
    if raised is None:
      return result
    if result is None:
      errors.seek(0)
      text = errors.read().decode(errors='replace')
      result = _last_words(text, process.exitcode)
    raise raised(result)


def _answer(work, send, errors, shown):
  """Sends (exception or None, its message or the result of `work`)."""
  os.dup2(errors.fileno(), 2)  # what libtpu writes there, it writes at length
  try:
    answer = None, work(lambda line: print(line, file=shown, flush=True))
  except (ConfigError, CompilerError) as error:
    answer = type(error), str(error)
  except Exception:
    answer = RuntimeError, traceback.format_exc()
  send.send(answer)


def _last_words(text, status):
  """What the compiler said before its process ended."""
  if match := _FATAL.search(text):
    return match[1].strip()
  if status is not None and status < 0:
    name = signal.Signals(-status).name
    memory = '; this machine may lack memory' if name == 'SIGKILL' else ''
    return f'its process was ended by {name}{memory}'
  return f'its process ended with status {status}'
