"""What can each recurrence hold? Seconds, no training.

  python -m launch.probes --json=probes.json --png=probes.png

writes random pairs into the states of the rules (16 wide), reads them back and
prints how many come out right: keys written again, more pairs than the state
is wide, by age; the parity of 4096 bits and products of 2000 permutations by
hand-set weights, at several beta; rules that must agree; bytes of the caches.
"""

import sys
import time

from absl import flags

from deltanet_jax.mixers.config import FORMS
from launch import cli

FORM = flags.DEFINE_enum(
  'form', 'recurrent', FORMS, 'Of the rules: the step, or what trains.'
)
JSON = flags.DEFINE_string('json', None, 'File for all the numbers.')
PNG = flags.DEFINE_string('png', None, 'Plot of capacity and recency.')


def main(taken):
  del taken
  paths = {flag.name: cli.output(flag) for flag in (JSON, PNG)}
  import jax

  from deltanet_jax import workdir
  from deltanet_jax.evals import probe_report, probes

  start = time.monotonic()

  def tell(name):
    spent = time.monotonic() - start
    print(f'{spent:5.1f} s  {name}', file=sys.stderr, flush=True)

  found = probes.find(FORM.value, tell)
  tell('done')
  print(probe_report.text(found))
  if paths['json']:
    where = {
      'form': FORM.value,
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    }
    workdir.write(paths['json'], probe_report.as_json(found, where))
  if paths['png']:
    probe_report.plot(found, paths['png'])
  return 0


if __name__ == '__main__':
  cli.run(main)
