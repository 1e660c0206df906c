"""Compiled programs that the next start finds again: JAX's cache on disk."""

import os
import pathlib
import tempfile

import jax

VARIABLE = 'JAX_COMPILATION_CACHE_DIR'


def find_folder() -> pathlib.Path:
  """Where compiled programs are kept unless `VARIABLE` is set."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'deltanet_jax' / 'compiled'


def keep_programs() -> str | None:
  """Has JAX keep what it compiles in `find_folder`, unless `VARIABLE` says
  where; set to nothing, it keeps none.

  Returns what to say where the folder cannot be written, else None.
  """
  if VARIABLE in os.environ:
    return None  # JAX reads it
  try:
    folder = find_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # a folder of another user, or on a disk that is read only
    with tempfile.TemporaryFile(dir=folder):
      pass
  except (OSError, RuntimeError) as error:  # a RuntimeError: no home
    reason = getattr(error, 'strerror', None) or error
    return (
      f'compiled programs are not kept, and the next start compiles again:'
      f' {getattr(error, "filename", None) or "~"}: {reason}; {VARIABLE}=DIR'
      ' names another folder'
    )
  jax.config.update('jax_compilation_cache_dir', str(folder))
  return None


def describe_kept() -> str:
  """How long compiling takes, and where what is kept of it lies."""
  folder = jax.config.values['jax_compilation_cache_dir']
  if not folder or not jax.config.values['jax_enable_compilation_cache']:
    return 'up to a minute or two'
  return f'up to a minute or two; less if {folder} has it'
