"""Compiles the real step for a TPU topology, on a machine without a TPU.

  python -m launch.dryrun --config=configs/gdn.py:hybrid_1p3b \\
    --topology=v5p:2x2x2

prints the memory that a device needs and has, the collectives with their bytes,
the operations, and the least time that compute, memory and network leave. It
needs libtpu (requirements-tpu.txt), and is best installed in an environment of
its own. --topology is a chip (v5e, v5p, v6e, tpu7x) and the sides of a slice;
the mesh of the configuration must fill it:

  python -m launch.dryrun --config=configs/gdn.py:hybrid_1p3b \\
    --topology=v5e:16x16 --slices=2 --config.mesh.replica=2 \\
    --config.mesh.fsdp=256 --config.data.batch=512 --config.optim.accumulate=1

--of=prefill and --of=decode compile what launch.generate runs, for --batch
sequences of --context tokens. Of a prompt the last piece is taken for all; the
earlier ones are cheaper where there is attention.

Times are bounds: everything overlaps, nothing waits, experts are used alike. Of
loops every turn is counted.

Exit status: 0 fits; 1 does not fit, and what to change is printed; 2 bad input.
"""

import dataclasses
import importlib.metadata
import os
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.lab.dryrun import chips

TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Chip and sides of a slice, as v5p:4x4x8.'
)
SLICES = flags.DEFINE_integer('slices', 1, 'Of that topology.', lower_bound=1)
OF = flags.DEFINE_enum(
  'of', 'train', ['train', 'prefill', 'decode'], 'Which program.'
)
CONTEXT = flags.DEFINE_integer(
  'context', None, 'Tokens of the prompt or the cache; else data.seq_len.',
  lower_bound=1,
)  # fmt: skip
BATCH = flags.DEFINE_integer(
  'batch', None, 'Sequences of prefill and decoding; else 1.', lower_bound=1
)
WEIGHTS = flags.DEFINE_enum(
  'weights', 'float32', ['float32', 'bfloat16'],
  "Of prefill and decoding: a run's are float32, released ones bfloat16.",
)  # fmt: skip
JSON = flags.DEFINE_string('json', None, 'File for all the numbers.')

INSTALL = 'python -m pip install -r requirements-tpu.txt'
# libtpu asks a cloud machine what it is unless told; two processes may compile
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'JAX_PLATFORMS': 'cpu',
}


@command.as_main(config.parse_argv)
def main(experiment):
  if TOPOLOGY.value is None:
    raise ConfigError(
      'no --topology given; name a chip and the sides of a slice, as'
      ' --topology=v5p:4x4x8'
    )
  topology = chips.parse_topology(TOPOLOGY.value, SLICES.value)
  _check_flags()
  with command.bad_input():
    mesh = experiment.mesh.fill(topology.devices)
    experiment = dataclasses.replace(experiment, mesh=mesh)
  chips.check_mesh(mesh, topology)
  path = command.check_output(JSON)
  _check_libtpu()
  os.environ.update(ENVIRONMENT)
  from deltanet_jax.config.files import format_json, write_text
  from deltanet_jax.lab.dryrun import report, run

  record = run.run_dryrun(
    experiment, topology, OF.value, CONTEXT.value or experiment.data.seq_len,
    BATCH.value or 1, WEIGHTS.value,
    say=lambda line: print(line, file=sys.stderr, flush=True),
  )  # fmt: skip
  print(report.format_text(record, topology), end='')
  if path:
    write_text(path, format_json(record))
  return 0 if record['fits'] else 1


def _check_flags():
  if OF.value != 'train':
    return
  instead = {'context': 'data.seq_len', 'batch': 'data.batch'}
  for flag in (CONTEXT, BATCH):
    if flag.value is not None:
      raise ConfigError(
        f'--{flag.name} is of prefill and decode; a training step has'
        f' --config.{instead[flag.name]}'
      )


def _check_libtpu():
  """The compiler must be there, and the one that this jax was made with."""
  try:
    have = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(f'no libtpu here; {INSTALL}') from None
  needs = [x for x in importlib.metadata.requires('jax') if 'libtpu' in x]
  want = needs[0].split(';')[0].partition('==')[2].strip() if needs else ''
  if not have.startswith(want.rstrip('*')):
    raise ConfigError(
      f'libtpu {have} beside jax {importlib.metadata.version("jax")}, which'
      f' asks for {want}; {INSTALL}'
    )


if __name__ == '__main__':
  main()
