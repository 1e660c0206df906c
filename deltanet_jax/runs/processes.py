"""Several processes that run one program, by jax's distributed runtime.

All processes make the calls here together; a single process returns at once.
"""

import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from deltanet_jax.config import ConfigError
from deltanet_jax.data.rows import HostBatch
from deltanet_jax.parallel.sharding import Batch

T = TypeVar('T')
LINGER = 3  # seconds that process 0 stays after a failure


def join_processes(
  seconds: int,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Joins the other processes; call it before any device is touched.

  seconds: to wait for all, then this process ends with status 1
  coordinator: HOST:PORT of process 0   processes: their number   process: the
  number of this one. Without these jax finds the others through SLURM, Open
  MPI, Kubernetes or Cloud TPU.

  From here on, if one process dies, all others end: at once if the connection
  breaks, else after 100 seconds without a heartbeat.

  Raises:
    ConfigError: the environment is that of no cluster.
  """
  # the runtime would handle SIGTERM, so that a hanging process ignores it
  jax.config.update('jax_enable_preemption_service', False)
  # a timer of ours: the runtime's own would end with a stack trace
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
    f'error: waited {seconds} s for the other processes{where}; not all joined.'
    ' Start all with the same --coordinator, and see in their output why one'
    ' ended',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def leave_processes(status: int) -> NoReturn:
  """Ends this process without the wait of jax for the others, which may be gone
  or wait for this one."""
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first():
    # it serves the runtime; the others first print their own errors
    time.sleep(LINGER)
  os._exit(status)


def is_first() -> bool:
  """Whether this is process 0, which writes the files that all share."""
  return jax.process_index() == 0


def gather_arrays(x: ArrayLike) -> np.ndarray:
  """[P,...]: x of every process, a numpy array or a 32-bit number."""
  return np.asarray(multihost_utils.process_allgather(np.asarray(x)))


def find_largest(number: int) -> int:
  """The largest `number` of all processes."""
  return int(gather_arrays(np.int32(number)).max())


def ask_largest(number: int) -> jax.Array:
  """`find_largest` without a wait: int() of the result waits."""
  mesh = Mesh(
    np.array(jax.devices()).reshape(jax.process_count(), -1),
    ('processes', 'local_devices'),
  )
  with jax.set_mesh(mesh):
    numbers = multihost_utils.host_local_array_to_global_array(
      np.array([number], np.int32), mesh, PartitionSpec('processes')
    )
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jnp.max, out_shardings=whole)(numbers)


def call_together(
  call: Callable[[], T], kind: type[Exception] = ConfigError
) -> T:
  """Returns call() if it succeeds in every process.

  Raises:
    kind: it fails in one of them.
  """
  error = None
  try:
    result = call()
  except kind as raised:
    error = raised
  failed = np.flatnonzero(gather_arrays(np.int32(error is not None)))
  if failed.size:
    raise error or kind(f'process {failed[0]} failed; its output says why')
  return result


def require_same_start(parts: Mapping[str, str]) -> None:
  """Refuses processes that were started differently.

  parts: {name: text}

  Raises:
    ConfigError: in every process; says what differs.
  """
  sums = [zlib.crc32(text.encode()) for text in parts.values()]
  everyone = gather_arrays(np.array(sums, np.uint32))
  for name, column in zip(parts, everyone.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ConfigError(
        f'process {others[0]} has {name} that differs from process 0; start all'
        ' with the same command, code and files'
      )


def require_devices(mesh: Mesh) -> None:
  """Refuses a mesh that lacks the devices of a process.

  Raises:
    ConfigError: says how many processes have devices in it.
  """
  count = len({device.process_index for device in mesh.devices.flat})
  if count < jax.process_count():
    raise ConfigError(
      f'the mesh uses {mesh.devices.size} of {jax.device_count()} devices,'
      f' of {count} of {jax.process_count()} processes; make it larger or start'
      ' fewer processes'
    )


class RowShare(NamedTuple):
  """The rows of batches of arrays [B,T] that this process supplies.

  Several processes supply the same rows if the mesh splits time or weights over
  them.
  """

  sharding: NamedSharding
  shape: tuple[int, int]
  rows: np.ndarray  # row numbers, ascending

  def place(self, batch: HostBatch) -> Batch:
    """The global arrays of a dict of [len(rows), T] arrays."""

    def put(x):
      def part(index):
        rows, times = index
        first, last, _ = rows.indices(self.shape[0])
        at = np.searchsorted(self.rows, first)
        return x[at : at + last - first, times]

      return jax.make_array_from_callback(self.shape, self.sharding, part)

    return {name: put(x) for name, x in batch.items()}


def find_row_share(sharding: NamedSharding, shape: tuple[int, int]) -> RowShare:
  """The `RowShare` of this process in batches [B,T] with this sharding."""
  own = np.zeros(shape[0], bool)
  for index in sharding.addressable_devices_indices_map(shape).values():
    if index is not None:
      own[index[0]] = True
  return RowShare(sharding, shape, np.flatnonzero(own))
