"""Compiles a program for a TPU topology on a machine without a TPU.

  python -m launch.dryrun --config=gdn:hybrid_1p3b \\
    --topology=v5p:2x2x2

prints the memory that the training step needs on a device, its collectives with
their bytes, its FLOP, and a lower bound of its time (roofline: compute, memory
bandwidth, network). It needs libtpu (requirements-tpu.txt), best in an
environment of its own. --topology is a chip (v5e, v5p, v6e, tpu7x) and the
sides of a slice; the mesh of the configuration must fill it:

  python -m launch.dryrun --config=gdn:hybrid_1p3b \\
    --topology=v5e:16x16 --slices=2 --config.mesh.replica=2 \\
    --config.mesh.fsdp=256 --config.data.batch=512 --config.optim.accumulate=1

--of=prefill and --of=decode compile what launch.generate runs, for --batch
sequences of --context tokens. Prefill runs in pieces; all are counted as the
last one, which is the most expensive with attention.

Times are lower bounds: they assume perfect overlap and balanced experts.

The program is compiled in a process of its own: a compiler that aborts ends
nothing else.

Exit status: 0 fits; 1 does not fit or the compiler refuses it, and what to
change is printed; 2 bad input.
"""

import dataclasses
import importlib.metadata
import os
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.lab import chips
from deltanet_jax.lab.dryrun import apart

TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Chip and sides of a slice, such as v5p:4x4x8.'
)
SLICES = flags.DEFINE_integer('slices', 1, 'Number of slices.', lower_bound=1)
OF = flags.DEFINE_enum(
  'of', 'train', ['train', 'prefill', 'decode'], 'The program to compile.'
)
CONTEXT = flags.DEFINE_integer(
  'context', None, 'Tokens of the prompt or the cache. Default: data.seq_len.',
  lower_bound=1,
)  # fmt: skip
BATCH = flags.DEFINE_integer(
  'batch', None, 'Sequences of prefill and decoding. Default: 1.', lower_bound=1
)
WEIGHTS = flags.DEFINE_enum(
  'weights', 'float32', ['float32', 'bfloat16'],
  'dtype of the weights of prefill and decoding: float32 for a training run,'
  ' bfloat16 for a release.',
)  # fmt: skip
JSON = flags.DEFINE_string('json', None, 'File to write all numbers to.')

INSTALL = 'python -m pip install -r requirements-tpu.txt'
# libtpu queries a cloud metadata server unless told; two processes may compile
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
      'no --topology given; give a chip and the sides of a slice, such as'
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

  def work(say):
    from deltanet_jax.lab.dryrun import run

    return run.run_dryrun(
      experiment, topology, OF.value, CONTEXT.value or experiment.data.seq_len,
      BATCH.value or 1, WEIGHTS.value, say,
    )  # fmt: skip

  try:
    record = apart.run_apart(work)
  except apart.CompilerError as error:
    print(
      f'error: the compiler for {topology.name} refuses this program: {error};'
      ' try other axes of the mesh (mesh.expert, if it is about an exchange),'
      ' another slice, or a newer jax and libtpu',
      file=sys.stderr,
    )
    return 1
  from deltanet_jax.config.files import format_json, write_text
  from deltanet_jax.lab.dryrun import report

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
        f'--{flag.name} is for prefill and decode; for training give'
        f' --config.{instead[flag.name]}'
      )


def _check_libtpu():
  """Refuses if libtpu is missing or not the version that this jax requires."""
  try:
    have = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(f'libtpu is not installed; {INSTALL}') from None
  needs = [x for x in importlib.metadata.requires('jax') if 'libtpu' in x]
  want = needs[0].split(';')[0].partition('==')[2].strip() if needs else ''
  if not have.startswith(want.rstrip('*')):
    raise ConfigError(
      f'libtpu is {have} and jax {importlib.metadata.version("jax")} requires'
      f' {want}; {INSTALL}'
    )


if __name__ == '__main__':
  main()
