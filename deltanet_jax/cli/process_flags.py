"""The flags by which a main is one of several processes."""

import contextlib
import re
import sys
import traceback

from absl import flags

from deltanet_jax.config import ConfigError

COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where several meet.'
)
PROCESSES = flags.DEFINE_integer(
  'processes', None, 'How many processes meet there.', lower_bound=1
)
PROCESS = flags.DEFINE_integer(
  'process', None, 'Which of them this is, from 0.', lower_bound=0
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Find the other processes by SLURM, Open MPI, Kubernetes or Cloud TPU.',
)
MEET_SECONDS = flags.DEFINE_integer(
  'meet_seconds', 120, 'How long to wait for the others.', lower_bound=1
)


def read_process_flags():
  """The arguments of `processes.join_processes`, or None for a process alone.

  Raises:
    ConfigError: flags are missing or do not fit each other.
  """
  given = {
    'coordinator': COORDINATOR.value,
    'processes': PROCESSES.value,
    'process': PROCESS.value,
  }
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if DISTRIBUTED.value and len(missing) < 3:
    raise ConfigError(
      '--distributed finds the other processes by itself; give it alone, or'
      ' --coordinator, --processes and --process'
    )
  if DISTRIBUTED.value:
    return {'seconds': MEET_SECONDS.value}
  if len(missing) == 3:
    return None
  if missing:
    raise ConfigError(
      f'no {" and no ".join(missing)} given; several processes need'
      ' --coordinator=HOST:PORT, --processes=N and --process=I'
    )
  if not re.fullmatch(r'.+:\d+', COORDINATOR.value):
    raise ConfigError(
      f'--coordinator={COORDINATOR.value}: give HOST:PORT, as in 10.0.0.1:8476'
    )
  if PROCESS.value >= PROCESSES.value:
    raise ConfigError(
      f'--process={PROCESS.value} of --processes={PROCESSES.value}: give 0 to'
      f' {PROCESSES.value - 1}'
    )
  return given | {'seconds': MEET_SECONDS.value}


@contextlib.contextmanager
def join_others():
  """What is done in it is done by all processes together.

  A failure in one ends it at once, and thereby the others.

  Raises:
    ConfigError: as `read_process_flags`.
  """
  how = read_process_flags()
  if how is None:
    yield
    return
  from deltanet_jax.runs import processes

  processes.join_processes(**how)
  try:
    yield
  except BaseException as error:
    processes.leave_processes(_told(error))


def _told(error):
  """The exit status of an error, after saying what it is."""
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code
  if isinstance(error, KeyboardInterrupt):
    return 130
  if isinstance(error, ConfigError):
    print(f'error: {error}', file=sys.stderr)
    return 2
  traceback.print_exception(error)
  return 1
