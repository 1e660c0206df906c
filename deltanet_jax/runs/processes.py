"""Several processes that run one program together, by jax's own runtime.

All of them call every function here alike. A process that runs alone gets its
answer at once.
"""

import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from deltanet_jax.config import ConfigError
from deltanet_jax.data.rows import HostBatch
from deltanet_jax.parallel.sharding import Batch

T = TypeVar('T')
LINGER = 3  # seconds that process 0 outlives a failure


def join_processes(
  seconds: int,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Meets the other processes; before any device is touched.

  seconds: in which all have to come, or this process ends with status 1
  coordinator: HOST:PORT of process 0   processes: how many   process: which one
  this is. Without them jax finds the others by SLURM, Open MPI, Kubernetes or
  Cloud TPU.

  From here on the death of one process ends all others: at once where the
  network tells, and after 100 seconds without a heartbeat where it does not.

  Raises:
    ConfigError: the environment names no cluster.
  """
  # the runtime would take SIGTERM for itself, and a process that hangs could
  # only be killed
  jax.config.update('jax_enable_preemption_service', False)
  # it would end the process with a stack trace
  late = threading.Timer(seconds, _give_up, (seconds, coordinator, process))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      coordinator, processes, process, initialization_timeout=seconds + 60
    )
  except ValueError as error:
    raise ConfigError(
      '--distributed: the environment is not that of SLURM, Open MPI,'
      ' Kubernetes or Cloud TPU; give --coordinator=HOST:PORT, --processes=N'
      f' and --process=I ({" ".join(str(error).split())})'
    ) from error
  finally:
    late.cancel()


def _give_up(seconds, coordinator, process):
  where = f' at {coordinator}, as process {process}' if coordinator else ''
  print(
    f'error: waited {seconds} s for the other processes{where}; not all came.'
    ' Start every one with the same coordinator, and look why one ended',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def leave_processes(status: int) -> NoReturn:
  """Ends this process at once, without the wait for others that jax has at the
  end: they may be gone, or wait for this one."""
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first():
    # it serves the runtime: the others shall end by their own words
    time.sleep(LINGER)
  os._exit(status)


def is_first() -> bool:
  """Whether this process is the one that writes what all have in common."""
  return jax.process_index() == 0


def gather_arrays(x: ArrayLike) -> np.ndarray:
  """[P, ...] of every process's x, a numpy array or a number of 32 bits."""
  return np.asarray(multihost_utils.process_allgather(np.asarray(x)))


def find_largest(number: int) -> int:
  """The largest of the processes' whole numbers."""
  return int(gather_arrays(np.int32(number)).max())


def call_together(
  call: Callable[[], T], kind: type[Exception] = ConfigError
) -> T:
  """What call() returns, when it succeeds in every process.

  Raises:
    kind: it does in one of them.
  """
  error = None
  try:
    result = call()
  except kind as raised:
    error = raised
  failed = np.flatnonzero(gather_arrays(np.int32(error is not None)))
  if failed.size:
    raise error or kind(f'process {failed[0]} failed; its own output says why')
  return result


def require_same_start(parts: Mapping[str, str]) -> None:
  """Refuses processes that were started differently.

  parts: {what it is: text}

  Raises:
    ConfigError: in every process, with what differs.
  """
  sums = [zlib.crc32(text.encode()) for text in parts.values()]
  everyone = gather_arrays(np.array(sums, np.uint32))
  for name, column in zip(parts, everyone.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ConfigError(
        f'process {others[0]} has {name} other than that of process 0; start'
        ' all with the same command, code and files'
      )


def require_devices(mesh: Mesh) -> None:
  """Refuses a mesh without a device of every process.

  Raises:
    ConfigError: with how many processes have one.
  """
  count = len({device.process_index for device in mesh.devices.flat})
  if count < jax.process_count():
    raise ConfigError(
      f'the mesh takes {mesh.devices.size} of {jax.device_count()} devices,'
      f' those of {count} of {jax.process_count()} processes; make it larger or'
      ' start fewer'
    )


class RowShare(NamedTuple):
  """This process's part of batches of arrays [B,T].

  Several processes bring the same rows where the mesh splits time or weights
  over them.
  """

  home: NamedSharding
  shape: tuple[int, int]
  rows: np.ndarray  # numbers of the rows to bring, ascending

  def place(self, batch: HostBatch) -> Batch:
    """The global arrays of a dict of [len(rows), T] arrays."""

    def put(x):
      def part(index):
        rows, times = index
        first, last, _ = rows.indices(self.shape[0])
        at = np.searchsorted(self.rows, first)
        return x[at : at + last - first, times]

      return jax.make_array_from_callback(self.shape, self.home, part)

    return {name: put(x) for name, x in batch.items()}


def find_row_share(home: NamedSharding, shape: tuple[int, int]) -> RowShare:
  """The `RowShare` of this process in batches [B,T] laid out by `home`."""
  own = np.zeros(shape[0], bool)
  for index in home.addressable_devices_indices_map(shape).values():
    if index is not None:
      own[index[0]] = True
  return RowShare(home, shape, np.flatnonzero(own))
