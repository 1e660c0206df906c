r"""Converts released weights to an Orbax checkpoint, and back.

  python -m launch.convert --from=Kimi-Linear-48B-A3B --to=weights/kimi
  python -m launch.convert --from=weights/kimi --to=released/kimi

--from is one of
  a released folder (config.json and *.safetensors), or ORG/NAME on the Hugging
  Face hub: converted to Orbax;
  a folder that this command wrote: converted back to released weights;
  the --workdir of a training run: its newest checkpoint is written as released
  weights. A run that was started from a release keeps that release's names.

--to must be new, or hold an unfinished conversion of the same weights, which
is continued. Every file is read back and compared. config.json is written last:
released weights without it are incomplete. Memory holds a few weights of one
layer at a time (for a training run: the whole model).

Exit status: 0 done; 1 what was written does not read back; 2 bad input.
"""

import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.runs.folder import Workdir

FROM = flags.DEFINE_string(
  'from', None, 'Folder to read, or ORG/NAME on the hub.', required=True
)
TO = flags.DEFINE_string('to', None, 'Folder to write.', required=True)


@command.as_main()
def main(_: None) -> int:
  """The command."""
  from deltanet_jax.hf import hub

  source, target = hub.find_folder(FROM.value), pathlib.Path(TO.value)
  if target.resolve() == source.resolve():
    raise ConfigError(f'--to={target} is --from; give another folder')
  from deltanet_jax.hf import convert
  from deltanet_jax.hf.converted import is_converted
  from deltanet_jax.runs.checkpoint import CheckpointError
  from deltanet_jax.runs.release import write_release
  from deltanet_jax.runs.source import is_run

  try:
    if is_converted(source):
      convert.convert_to_released(source, target)
    elif is_run(source):
      write_release(Workdir(source), target)
    else:
      convert.convert_to_orbax(source, target)
  except (convert.ConversionError, CheckpointError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    raise ConfigError(str(error)) from error
  return 0


if __name__ == '__main__':
  main()
