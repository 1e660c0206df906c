"""The report of a dry run."""

import pathlib

from deltanet_jax.lab.chips import GIB
from deltanet_jax.lab.pages import render_page


def format_text(record, topology):
  """The text of a record of `run.run_dryrun`."""
  return render_page(
    pathlib.Path(__file__).with_name('report.txt.jinja'),
    record=record, topology=topology, gib=GIB,
    mesh=', '.join(f'{axis} {n}' for axis, n in record['mesh'].items()),
    held=', '.join(
      f'{name} {size / GIB:.2f}'
      for name, size in record['memory']['held'].items()
    ),
    peak=topology.chips * topology.chip.flops,
    inputs=sum(record['memory']['held'].values()),
  )  # fmt: skip
