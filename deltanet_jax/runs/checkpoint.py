"""Checkpoints by Orbax, with checksums.

Orbax restores flipped bits and casts to another dtype silently. Every step
therefore has shape, dtype and a checksum of each array, committed together with
the arrays and compared when they are restored. Several processes write and read
the shards of their devices; the checksum is a sum over elements, so it does not
depend on the sharding.
"""

import itertools
import logging
import pathlib
from collections.abc import Mapping
from typing import Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Params
from deltanet_jax.runs import processes
from deltanet_jax.runs.folder import Workdir

Tree = TypeVar('Tree')  # a pytree of arrays, or of their ShapeDtypeStructs
_log = logging.getLogger(__name__)
_SUMS = 'checksums'
_PIECE = 2**20  # elements


class CheckpointError(RuntimeError):
  """No checkpoint can be read, or it does not fit the program."""


class Checkpoints:
  """The checkpoints of a folder; a context manager.

  Several processes make every call together, on a folder that all share.

  A checkpoint is a dict of items (such as 'params' and 'rest'), each a pytree
  of arrays, which are stored by their paths, whatever their containers. The
  newest `keep` checkpoints are kept.
  """

  def __init__(self, folder: str | pathlib.Path, keep: int = 1):
    self._folder = pathlib.Path(folder).resolve()
    self._keep = keep
    self._damaged: list[int] = []
    self._open()

  def _open(self) -> None:
    # the caller decides which steps are saved
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, save_interval_steps=1
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    try:
      self._manager.close()
    except Exception as error:
      # after another failure this one adds nothing
      if kind is None:
        raise self._cannot_save(error) from error

  def list_steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, items: Mapping[str, object]) -> None:
    """Starts a save; waits only for an earlier save and for a host copy.

    Orbax copies before it returns, so the caller may donate the arrays.

    Raises:
      CheckpointError: the earlier save failed, such as on a full disk.
    """
    self.wait()
    self._set_aside()
    flat = {name: _flatten(tree) for name, tree in items.items()}
    sums = {name: _fingerprints(arrays) for name, arrays in flat.items()}
    args = {k: ocp.args.StandardSave(arrays) for k, arrays in flat.items()}
    args[_SUMS] = ocp.args.JsonSave(sums)
    try:
      accepted = self._manager.save(step, args=ocp.args.Composite(**args))
    except OSError as error:
      raise self._cannot_save(error) from error
    if not accepted:
      raise CheckpointError(
        f'{self._folder} already has step {self._manager.latest_step()}; it'
        f' cannot save step {step}'
      )

  def wait(self) -> None:
    """Waits until the last save is on disk.

    Raises:
      CheckpointError: it failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._cannot_save(error) from error

  def _cannot_save(self, error):
    return CheckpointError(f'cannot save in {self._folder}: {_line(error)}')

  def restore(
    self, abstract: Mapping[str, Tree]
  ) -> tuple[int, dict[str, Tree]] | None:
    """(step, items) of the newest intact checkpoint, or None.

    abstract: dict of items, pytrees of ShapeDtypeStructs with shardings, which
    need not be those of the save; other items are not read. A damaged
    checkpoint is reported and the one before it is used; the next save renames
    it to `damaged-STEP`, or to `damaged-STEP-2`, -3, ...

    Raises:
      CheckpointError: all checkpoints are damaged, or the arrays have other
        names, shapes or dtypes than `abstract`.
    """
    steps = self.list_steps()
    for step in reversed(steps):
      try:
        items = self._whole(step, abstract)
      except _Damaged as error:
        _log.warning('checkpoint %d is damaged: %s', step, error)
        continue
      self._damaged = [other for other in steps if other > step]
      return step, items
    if steps:
      raise CheckpointError(
        f'all checkpoints in {self._folder} are damaged (tried'
        f' {", ".join(map(str, steps))}); remove the folder to start again'
      )
    return None

  def _set_aside(self):
    if not self._damaged:
      return
    for step in self._damaged if processes.is_first() else ():
      (self._folder / str(step)).rename(self._free(f'damaged-{step}'))
    processes.gather_arrays(0)  # the others wait for the first
    self._damaged = []
    self._manager.close()
    self._open()

  def _free(self, name):
    """A path of that name, or name-2, name-3, ..., that does not exist."""
    names = itertools.chain([name], (f'{name}-{i}' for i in itertools.count(2)))
    return next(
      path
      for path in (self._folder / name for name in names)
      if not path.exists()
    )

  def _whole(self, step, abstract):
    """The items of a step, if every process can read its part."""
    read, sums = processes.call_together(
      lambda: self._read(step, abstract), _Damaged
    )
    for name in abstract:
      for path, fingerprint in _fingerprints(read[name]).items():
        if fingerprint != sums[name][path]:
          raise _Damaged(f'{name}/{path} differs from its checksum')
    return {
      name: jax.tree.unflatten(
        jax.tree.structure(tree), [read[name][path] for path in _flatten(tree)]
      )
      for name, tree in abstract.items()
    }

  def _read(self, step, abstract):
    """({item: {path: array}}, stored fingerprints) of this process."""
    folder = self._folder / str(step)
    flat = {name: _flatten(tree) for name, tree in abstract.items()}
    # not by the manager, which would wait for a process that has failed
    try:
      json = ocp.JsonCheckpointHandler()
      sums = json.restore(folder / _SUMS, args=ocp.args.JsonRestore())
      sums = {name: sums[name] for name in abstract}
    except Exception as error:  # whatever Orbax and TensorStore raise
      raise _Damaged(_line(error)) from error
    for name, arrays in flat.items():
      _require_same(sums[name], arrays, f'{folder}/{name}')
    read = {}
    try:
      for name, arrays in flat.items():
        standard = ocp.StandardCheckpointHandler()
        args = ocp.args.StandardRestore(arrays)
        read[name] = standard.restore(folder / name, args=args)
    except Exception as error:
      raise _Damaged(_line(error)) from error
    return read, sums


class _Damaged(Exception):
  pass


def _line(error):
  """The first line of an error."""
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


def _flatten(tree):
  """{'a.b': x} in the order of jax.tree.leaves."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _fingerprints(arrays):
  """{path: [shape, dtype, checksum]}, as JSON returns it."""
  own = np.array([_checksum(x) for x in arrays.values()], np.uint32)
  sums = processes.gather_arrays(own).sum(0, dtype=np.uint32)
  return {
    path: [list(x.shape), str(x.dtype), int(crc)]
    for (path, x), crc in zip(arrays.items(), sums, strict=True)
  }


def _checksum(x):
  """The sum modulo 2^32 of hashes of bits and position, over the elements of
  which this process holds the first replica.

  A CRC-32, as in `hf.pieces`, depends on the order of bytes and cannot be added
  up over processes.
  """
  shape, total = x.shape or (1,), 0
  for shard in x.addressable_shards:
    if shard.replica_id:
      continue
    bits = np.asarray(shard.data).reshape(shard.data.shape or (1,))
    bits = bits.view(f'u{bits.itemsize}')
    first, *rest = shard.index or (slice(None),)
    begin, end, _ = first.indices(shape[0])
    # by pieces of the first axis, to bound memory
    count = max(1, _PIECE * len(bits) // bits.size)
    for i in range(begin, end, count):
      at = _positions((slice(i, min(i + count, end)), *rest), shape)
      total += _mixed(bits[i - begin : i - begin + count].astype('u4'), at)
  return total % 2**32


def _positions(index, shape):
  """Flat positions of the elements x[index] of an x of `shape`, mod 2^32."""
  at = np.zeros((), np.uint32)
  for part, size in zip(index, shape, strict=True):
    along = np.arange(*part.indices(size), dtype=np.uint32)
    at = at[..., None] * np.uint32(size % 2**32) + along
  return at


def _mixed(bits, at):
  """Sum of hashes (lowbias32 by Chris Wellons) of bits + position, uint32."""
  x = bits + at * np.uint32(0x9E3779B1)
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x ^= x >> np.uint32(shift)
    x *= np.uint32(factor)
  x ^= x >> np.uint32(16)
  return int(x.sum(dtype=np.uint64))


def _require_same(sums, arrays, where):
  wanted = {k: [list(x.shape), str(x.dtype)] for k, x in arrays.items()}
  for path in [*wanted, *sums]:
    saved = tuple(sums[path][:2]) if path in sums else 'nothing'
    needed = tuple(wanted[path]) if path in wanted else 'nothing'
    if saved != needed:
      raise CheckpointError(
        f'{where} has {saved} for {path}, this version expects {needed}; use'
        ' the version that wrote it'
      )


def load_params(
  workdir: Workdir, cfg: ModelConfig, mesh: Mesh | None = None
) -> Params:
  """The parameters of the newest intact checkpoint, sharded over the mesh, or
  on the first device."""
  model = HybridLM(cfg)
  shapes = sharding.make_abstract_params(model)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda x: device, shapes)
  else:
    shardings = sharding.make_param_shardings(model, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  with Checkpoints(workdir.checkpoints) as checkpoints:
    newest = checkpoints.restore({'params': abstract})
  if newest is None:
    raise CheckpointError(f'no checkpoint in {workdir.path} yet; train first')
  return newest[1]['params']
