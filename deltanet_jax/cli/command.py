"""What all commands share: absl flags; bad input is one line, exit status 2."""

import contextlib
import errno
import functools
import io
import os
import pathlib
import re
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
CLOSED_PIPE = 141  # the exit status of a command that SIGPIPE ended
ENTRY_POINTS = 'deltanet', 'python -m deltanet_jax'


def as_main(
  take: Take[T] | None = None,
) -> Callable[[Callable[[T], int]], Callable[[], NoReturn]]:
  """Decorates a function of `arguments` to run by `run_command`."""
  return lambda main: functools.partial(run_command, main, take)


def run_command(
  main: Callable[[T], int], take: Take[T] | None = None
) -> NoReturn:
  """Runs `main(arguments)` as an absl app and exits with the status it returns.

  take: argv -> (arguments, what absl is to parse); without it `arguments` is
  None.
  --help shows the docstring and the flags of the module of `main`.
  """
  # a character that the terminal lacks is shown as its number
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    status = _run(main, take)
    sys.stdout.flush()
  except OSError as error:
    if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
      raise
    if error.errno == errno.EPIPE:  # the reader of the output has closed it
      status = CLOSED_PIPE
    else:
      print(f'error: {error.filename or "output"}: {error.strerror}',
            file=sys.stderr)  # fmt: skip
      status = 1
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in sys.stdout, sys.stderr:
      os.dup2(nothing, stream.fileno())  # what is still buffered goes there
  sys.exit(status)


def _run(main, take):
  """Runs `main` as an absl app; returns its exit status."""
  argv = sys.argv
  warnings.formatwarning = lambda message, *_, **__: f'warning: {message}\n'
  if {'--help', '-help', '-h', '--helpfull'} & set(argv):
    module = sys.modules[main.__module__]
    print(spell_command(module.__doc__ or ''))
    name = sys.argv[0] if module.__name__ == '__main__' else module.__name__
    print(FLAGS.module_help(name).replace(f'{name}:', 'Flags:', 1))
    return 0

  try:
    arguments, argv = (None, argv) if take is None else take(argv)
  except ConfigError as error:
    refuse_input(error)

  def parse(argv):
    try:
      rest = FLAGS(argv)
    except flags.Error as error:
      text = ' '.join(str(error).split())
      missing = re.fullmatch(r'flag --(\w+)=None: .* other than None\.', text)
      refuse_input(f'no --{missing[1]} given' if missing else text)
    if FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)  # the libraries log much
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
  """Prints the message as one line and exits with status 2."""
  line = spell_command(' '.join(str(message).splitlines()))
  print(f'error: {line}', file=sys.stderr)
  sys.exit(2)


def spell_command(text: str) -> str:
  """`text` with every `python -m launch.NAME` or `launch.NAME` spelled as this
  process was started, such as `deltanet NAME`."""
  program = sys.argv[0].rpartition(' ')[0]
  if program not in ENTRY_POINTS:
    return text
  return re.sub(r'(python -m )?\blaunch\.(?=[a-z])', f'{program} ', text)


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
  """Turns a ValueError about what the user gave into a ConfigError."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


def read_numbers(
  flag: flags.FlagHolder[list[str]], least: int, most: int, advice: str
) -> tuple[int, ...]:
  """The integers of a flag, ascending and distinct.

  Raises:
    ConfigError: there is none, or one is outside `least` to `most`; the message
      ends with `advice`.
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
  """The path that a flag names, or None; checked before the work starts.

  suffix: of the file; by default the name of the flag

  Raises:
    ConfigError: another suffix, no such folder, or no matplotlib for a .png.
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
