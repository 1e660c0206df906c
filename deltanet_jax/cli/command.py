"""What the mains share: flags by absl; bad input is one line and status 2."""

import contextlib
import errno
import functools
import io
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from absl import app, flags, logging

from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra

T = TypeVar('T')
Take = Callable[[list[str]], tuple[T, list[str]]]
FLAGS = flags.FLAGS
CLOSED_PIPE = 141  # what a shell says of a command that SIGPIPE ended


def as_main(
  take: Take[T] | None = None,
) -> Callable[[Callable[[T], int]], Callable[[], NoReturn]]:
  """A decorator: a function of `arguments` as a main, by `run_command`."""
  return lambda main: functools.partial(run_command, main, take)


def run_command(
  main: Callable[[T], int], take: Take[T] | None = None
) -> NoReturn:
  """Runs `main(arguments)` as an absl app and exits with the status it returns.

  take: argv -> (arguments, the rest), before absl reads the rest; without it
  `arguments` is None.
  --help shows the docstring and the flags of the module of `main`.
  """
  # a character that the terminal has not shows as its number
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    status = _run(main, take)
    sys.stdout.flush()
  except OSError as error:
    if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
      raise
    if error.errno == errno.EPIPE:  # who read the output has seen enough
      status = CLOSED_PIPE
    else:
      print(f'error: {error.filename or "output"}: {error.strerror}',
            file=sys.stderr)  # fmt: skip
      status = 1
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in sys.stdout, sys.stderr:
      os.dup2(nothing, stream.fileno())  # what is still held back goes there
  sys.exit(status)


def _run(main, take):
  """The exit status of an absl app."""
  argv = sys.argv
  warnings.formatwarning = lambda message, *_, **__: f'warning: {message}\n'
  if {'--help', '-help', '-h', '--helpfull'} & set(argv):
    module = sys.modules[main.__module__]
    print(module.__doc__)
    name = sys.argv[0] if module.__name__ == '__main__' else module.__name__
    print(FLAGS.module_help(name))
    return 0

  try:
    arguments, argv = (None, argv) if take is None else take(argv)
  except ConfigError as error:
    refuse_input(error)

  def parse(argv):
    try:
      rest = FLAGS(argv)
    except flags.Error as error:
      refuse_input(' '.join(str(error).split()))
    if FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)  # the libraries tell a lot
    if rest[1:]:
      refuse_input(f'unexpected argument {rest[1]!r}; --help shows the flags')
    return rest

  def guarded(argv):
    del argv
    try:
      return main(arguments)
    except ConfigError as error:
      refuse_input(error)
    except KeyboardInterrupt:
      return 130

  try:
    app.run(guarded, argv, parse)
  except SystemExit as end:
    return end.code


def refuse_input(message: str | ConfigError) -> NoReturn:
  """Ends the process as bad input does."""
  line = ' '.join(str(message).splitlines())
  print(f'error: {line}', file=sys.stderr)
  sys.exit(2)


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
  """A ValueError in it is of what the user gave, and becomes a ConfigError."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


def read_numbers(
  flag: flags.FlagHolder[list[str]], least: int, most: int, advice: str
) -> tuple[int, ...]:
  """The whole numbers of a flag, ascending, each once.

  Raises:
    ConfigError: none, or one that is not from `least` to `most`; with `advice`.
  """
  try:
    numbers = sorted({int(text) for text in flag.value})
  except ValueError:
    numbers = []
  if not numbers or numbers[0] < least or numbers[-1] > most:
    raise ConfigError(f'--{flag.name}={",".join(flag.value)}: {advice}')
  return tuple(numbers)


def check_output(
  flag: flags.FlagHolder[str | None], suffix: str | None = None
) -> pathlib.Path | None:
  """The path that a flag names, or None: known to be writable before the work.

  suffix: of the file; the flag's own name unless given

  Raises:
    ConfigError: another suffix, no such folder, or nothing to draw with.
  """
  if flag.value is None:
    return None
  path = pathlib.Path(flag.value)
  suffix = suffix or f'.{flag.name}'
  if path.suffix != suffix or not path.parent.is_dir():
    raise ConfigError(
      f'--{flag.name}={path}: give a {suffix} file in an existing folder'
    )
  if suffix == '.png':
    require_extra('matplotlib', f'--{flag.name}')
  return path
