"""Checkpoints: Orbax behind one file, with what it leaves unchecked.

Orbax restores flipped bits without a word and casts to another type in
silence. Each step therefore carries shape, type and CRC-32 of every array,
committed together with the arrays and compared when they are read back.
"""

import logging
import pathlib
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

_log = logging.getLogger(__name__)
_SUMS = 'checksums'


class CheckpointError(RuntimeError):
  """No checkpoint can be read, or it does not fit the program."""


class Checkpoints:
  """The checkpoints of one folder, newest last; a context manager.

  A checkpoint is a dict of named items (say 'params' and 'rest'), each a
  pytree of arrays. It is kept as arrays named by their path, whatever the
  containers around them. The newest `keep` are kept.
  """

  def __init__(self, folder, keep=1):
    self._folder = pathlib.Path(folder).resolve()
    self._keep = keep
    self._damaged = []
    self._open()

  def _open(self):
    # step 1 is saved as well as step 1000: the caller decides when
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, save_interval_steps=1
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._manager.close()

  def steps(self):
    """Steps on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step, items):
    """Starts to save; waits only for an earlier save and for a host copy.

    Orbax copies before it returns: the caller may donate the arrays at once.

    Raises:
      CheckpointError: the earlier save failed, as on a full disk.
    """
    self.wait()
    self._set_aside()
    flat = {name: _flatten(tree, np.asarray) for name, tree in items.items()}
    sums = {name: _fingerprints(arrays) for name, arrays in flat.items()}
    args = {k: ocp.args.StandardSave(arrays) for k, arrays in flat.items()}
    args[_SUMS] = ocp.args.JsonSave(sums)
    if not self._manager.save(step, args=ocp.args.Composite(**args)):
      raise CheckpointError(
        f'{self._folder} has step {self._manager.latest_step()} and takes no'
        f' step {step}'
      )

  def wait(self):
    """Returns when the last save is on disk.

    Raises:
      CheckpointError: it failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise CheckpointError(
        f'cannot save in {self._folder}: {_line(error)}'
      ) from error

  def restore(self, abstract):
    """(step, items) of the newest checkpoint that is whole, or None.

    abstract: dict of items, pytrees of ShapeDtypeStructs with shardings, which
    need not be those of the save. Items left out are not read. A damaged
    checkpoint is reported, and the one before it is taken; the next save puts
    it aside as `damaged-STEP`.

    Raises:
      CheckpointError: there are checkpoints and none is whole, or the arrays
        have other names, shapes or types than `abstract`.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        items = self._read(step, abstract)
      except _Damaged as error:
        _log.warning('checkpoint %d is damaged: %s', step, error)
        continue
      self._damaged = [other for other in steps if other > step]
      return step, items
    if steps:
      raise CheckpointError(
        f'no checkpoint in {self._folder} is whole (tried'
        f' {", ".join(map(str, steps))}); remove the folder to start again'
      )
    return None

  def _set_aside(self):
    for step in self._damaged:
      (self._folder / str(step)).rename(self._folder / f'damaged-{step}')
    if self._damaged:
      self._damaged = []
      self._manager.close()
      self._open()

  def _read(self, step, abstract):
    try:
      args = ocp.args.Composite(**{_SUMS: ocp.args.JsonRestore()})
      sums = self._manager.restore(step, args=args)[_SUMS]
      sums = {name: sums[name] for name in abstract}
    except Exception as error:  # whatever Orbax and TensorStore raise
      raise _Damaged(_line(error)) from error
    flat = {name: _flatten(tree, _same) for name, tree in abstract.items()}
    for name, arrays in flat.items():
      _require_same(sums[name], arrays, f'{self._folder}/{step}/{name}')
    try:
      args = {k: ocp.args.StandardRestore(arrays) for k, arrays in flat.items()}
      read = self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:
      raise _Damaged(_line(error)) from error
    for name in abstract:
      for path, found in _fingerprints(read[name]).items():
        if found != sums[name][path]:
          raise _Damaged(f'{name}/{path} differs from its checksum')
    return {
      name: jax.tree.unflatten(
        jax.tree.structure(tree), [read[name][path] for path in flat[name]]
      )
      for name, tree in abstract.items()
    }


class _Damaged(Exception):
  pass


def _line(error):
  """The first line of an error that may be long."""
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


def _same(x):
  return x


def _flatten(tree, leaf):
  """{'a.b': leaf(x)} in the order of jax.tree.leaves."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _fingerprints(arrays):
  """{path: [shape, type, CRC-32 of the bytes]}, as JSON gives it back."""
  sums = {}
  for path, x in arrays.items():
    x = np.ascontiguousarray(x)
    crc = zlib.crc32(x.reshape(-1).view(np.uint8))
    sums[path] = [list(np.shape(arrays[path])), str(x.dtype), crc]
  return sums


def _require_same(sums, arrays, where):
  wanted = {k: [list(x.shape), str(x.dtype)] for k, x in arrays.items()}
  for path in [*wanted, *sums]:
    saved = tuple(sums[path][:2]) if path in sums else 'nothing'
    needed = tuple(wanted[path]) if path in wanted else 'nothing'
    if saved != needed:
      raise CheckpointError(
        f'{where} holds {saved} as {path}, the program needs {needed}; use the'
        ' version of the program that wrote it'
      )
