"""Tests what the state of each recurrence can store, without training.

  python -m launch.probes --json=probes.json --png=probes.png

Keys and values are random vectors of width 16, weights are set by hand. The
probes: keys whose values are replaced; more pairs than the state is wide;
orthogonal and correlated keys; parity of 4096 bits and products of 2000
permutations at several beta; recurrences that must agree; bytes of the caches.
Under each table stands what it shows. Takes seconds.
"""

import sys
import time

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config.forms import OWN

FORM = flags.DEFINE_enum('form', 'recurrent', OWN, 'Form of the recurrences.')
JSON = flags.DEFINE_string('json', None, 'File to write all numbers to.')
PNG = flags.DEFINE_string('png', None, 'File to plot recall to.')


@command.as_main()
def main(_):
  paths = {flag.name: command.check_output(flag) for flag in (JSON, PNG)}
  import jax

  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.probes import probes, report

  start = time.monotonic()

  def show(name):
    spent = time.monotonic() - start
    print(f'{spent:5.1f} s  {name}', file=sys.stderr, flush=True)

  results = probes.run_probes(FORM.value, show)
  show('done')
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
