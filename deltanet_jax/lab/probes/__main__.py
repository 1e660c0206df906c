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

from deltanet_jax.cli import command
from deltanet_jax.config.forms import OWN

FORM = flags.DEFINE_enum(
  'form', 'recurrent', OWN, 'Of the rules: the step, or what trains.'
)
JSON = flags.DEFINE_string('json', None, 'File for all the numbers.')
PNG = flags.DEFINE_string('png', None, 'Plot of capacity and recency.')


@command.as_main()
def main(_):
  paths = {flag.name: command.check_output(flag) for flag in (JSON, PNG)}
  import jax

  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.probes import probes, report

  start = time.monotonic()

  def tell(name):
    spent = time.monotonic() - start
    print(f'{spent:5.1f} s  {name}', file=sys.stderr, flush=True)

  results = probes.run_probes(FORM.value, tell)
  tell('done')
  print(report.format_text(results))
  if paths['json']:
    where = {
      'form': FORM.value,
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    }
    write_text(paths['json'], report.format_json(results, where))
  if paths['png']:
    report.draw_results(results, paths['png'])
  return 0


if __name__ == '__main__':
  main()
