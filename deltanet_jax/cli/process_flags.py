"""The flags of a command that runs as several processes."""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from deltanet_jax.config import ConfigError

COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where the processes meet.'
)
PROCESSES = flags.DEFINE_integer(
  'processes', None, 'Number of processes.', lower_bound=1
)
PROCESS = flags.DEFINE_integer(
  'process', None, 'Number of this process, from 0.', lower_bound=0
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False,
  'Find the other processes through SLURM, Open MPI, Kubernetes or TPU VMs.',
)  # fmt: skip
MEET_SECONDS = flags.DEFINE_integer(
  'meet_seconds', 120, 'Seconds to wait for the other processes.', lower_bound=1
)


class Meeting(NamedTuple):
  """The arguments of `processes.join_processes`."""

  seconds: int
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


def read_process_flags() -> Meeting | None:
  """Where the processes meet, or None for a single process.

  Raises:
    ConfigError: flags are missing or contradict each other.
  """
  coordinator, process = COORDINATOR.value, PROCESS.value
  processes, seconds = PROCESSES.value, MEET_SECONDS.value
  meeting = COORDINATOR, PROCESSES, PROCESS
  missing = [f'--{flag.name}' for flag in meeting if flag.value is None]
  if DISTRIBUTED.value and len(missing) < 3:
    raise ConfigError(
      '--distributed finds the other processes by itself; give it alone, or'
      ' give --coordinator, --processes and --process'
    )
  if DISTRIBUTED.value:
    return Meeting(seconds)
  if len(missing) == 3:
    return None
  if coordinator is None or processes is None or process is None:
    raise ConfigError(
      f'no {" and no ".join(missing)} given; several processes need'
      ' --coordinator=HOST:PORT, --processes=N and --process=I'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise ConfigError(
      f'--coordinator={coordinator}: give HOST:PORT, such as 10.0.0.1:8476'
    )
  if process >= processes:
    raise ConfigError(
      f'--process={process} of --processes={processes}: give 0 to'
      f' {processes - 1}'
    )
  return Meeting(seconds, coordinator, processes, process)


@contextlib.contextmanager
def join_others() -> Iterator[None]:
  """Joins the processes for the body of the `with`.

  A failure in one process ends it at once, and the others with it.

  Raises:
    ConfigError: as `read_process_flags`.
  """
  meeting = read_process_flags()
  if meeting is None:
    yield
    return
  from deltanet_jax.runs import processes

  processes.join_processes(*meeting)
  try:
    yield
  except BaseException as error:
    processes.leave_processes(_report(error))


def _report(error):
  """Prints an error; returns its exit status."""
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code
  if isinstance(error, KeyboardInterrupt):
    return 130
  if isinstance(error, ConfigError):
    print(f'error: {error}', file=sys.stderr)
    return 2
  traceback.print_exception(error)
  return 1
