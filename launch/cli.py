"""What the mains share: flags by absl; bad input is one line and status 2."""

import pathlib
import sys
import warnings

from absl import app, flags, logging

from deltanet_jax.config import ConfigError

FLAGS = flags.FLAGS


def run(main, take=lambda argv: (None, argv)):
  """Runs `main(taken)` as an absl app and exits with the status it returns.

  take: argv -> (what it took, the other arguments), before absl reads them.
  """
  argv = sys.argv
  warnings.formatwarning = lambda message, *_, **__: f'warning: {message}\n'
  if {'--help', '-help', '-h', '--helpfull'} & set(argv):
    print(sys.modules['__main__'].__doc__)
    print(FLAGS.main_module_help())
    sys.exit(0)

  try:
    taken, argv = take(argv)
  except ConfigError as error:
    refuse(error)

  def parse(argv):
    try:
      rest = FLAGS(argv)
    except flags.Error as error:
      refuse(' '.join(str(error).split()))
    if FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)  # the libraries tell a lot
    if rest[1:]:
      refuse(f'unexpected argument {rest[1]!r}; --help shows the flags')
    return rest

  def guarded(argv):
    del argv
    try:
      return main(taken)
    except ConfigError as error:
      refuse(error)
    except KeyboardInterrupt:
      return 130

  app.run(guarded, argv, parse)


def refuse(message):
  """Ends the process as bad input does."""
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


def output(flag, suffix=None):
  """The path that a flag names, or None: known to be writable before the work.

  suffix: of the file; the flag's own name unless given

  Raises:
    ConfigError: another suffix, or no such folder.
  """
  if flag.value is None:
    return None
  path, suffix = pathlib.Path(flag.value), suffix or f'.{flag.name}'
  if path.suffix != suffix or not path.parent.is_dir():
    raise ConfigError(
      f'--{flag.name}={path}: give a {suffix} file in an existing folder'
    )
  return path
