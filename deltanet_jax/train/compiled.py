"""JAX's persistent compilation cache, so that the next start is faster."""

import os
import pathlib
import tempfile

import jax

VARIABLE = 'JAX_COMPILATION_CACHE_DIR'


def find_folder() -> pathlib.Path:
  """The cache's folder, unless the environment sets `VARIABLE`."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'deltanet_jax' / 'compiled'


def keep_programs() -> str | None:
  """Turns the cache on, in `find_folder`; a `VARIABLE` that is set names
  another folder, or none if it is empty.

  Returns a message if the folder cannot be written, else None.
  """
  if VARIABLE in os.environ:
    return None  # JAX reads it
  try:
    folder = find_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # it may be another user's, or on a read-only disk
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
  """A text for progress lines: how long compiling takes, and the cache."""
  folder = jax.config.values['jax_compilation_cache_dir']
  if not folder or not jax.config.values['jax_enable_compilation_cache']:
    return 'up to a minute or two'
  return f'up to a minute or two; less if {folder} has it'
