r"""Converts released weights to Orbax, and back.

  python -m launch.convert --from=Kimi-Linear-48B-A3B --to=weights/kimi
  python -m launch.convert --from=weights/kimi --to=released/kimi

--from is a released folder (config.json and *.safetensors) or ORG/NAME on the
Hugging Face hub, a folder that this command made, or the --workdir of a
training run, whose newest checkpoint is written as released weights: under the
names of those it began with, if it did. Memory stays at a few weights of one
layer (for a training run: the whole model). Started again, it goes on where it
was stopped; every piece is read back and compared. Nothing is written outside
--to, which must hold nothing else; released weights that have no config.json
there are not finished.

Exit status: 0 done; 1 what was written does not read back; 2 bad input.
"""

import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.runs.folder import Workdir

FROM = flags.DEFINE_string('from', None, 'Folder to read.', required=True)
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
