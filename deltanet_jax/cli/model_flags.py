"""The flags that name a trained model, shared by several commands."""

from typing import TYPE_CHECKING

from absl import flags

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.runs.folder import Workdir

if TYPE_CHECKING:
  from deltanet_jax.runs.source import Source

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
RELEASED = flags.DEFINE_string(
  'released', None, 'Released weights: a folder, or ORG/NAME on the hub.'
)
CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Only for a run with mixers of your own: a file that imports them.',
)


def open_source() -> 'Source':
  """The `Source` that the flags name.

  Raises:
    ConfigError: none or both are given, or the model cannot be opened.
  """
  from deltanet_jax.hf import hub
  from deltanet_jax.runs import source

  workdir, released = WORKDIR.value, RELEASED.value
  if (workdir is None) == (released is None):
    raise ConfigError('give one of --workdir and --released')
  classes = config.find_classes(CONFIG.value) if CONFIG.value else ()
  if workdir is not None:
    return source.open_run(Workdir(workdir), classes)
  assert released is not None
  folder = hub.find_folder(released)
  if source.is_run(folder):
    raise ConfigError(f'{folder} is a training run; give it as --workdir')
  return source.open_model(released)
