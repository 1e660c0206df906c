"""Plots of time and memory against context, on log scales."""

import math

from matplotlib.ticker import LogLocator, NullLocator

from deltanet_jax.lab import plots
from deltanet_jax.lab.profile import report

PANELS = {
  'ttft.png': (
    'Time to the first token (prefill), ms', 'prefill',
    report.compute_milliseconds,
  ),
  'tpot.png': (
    'Decoding at batch 1, ms per token', 'decode', report.compute_milliseconds
  ),
  'throughput.png': (
    'Decoding at the largest batch, tokens per second', 'largest',
    report.compute_throughput,
  ),
  'cache.png': (
    'State and KV cache of one sequence, MiB', 'restore',
    report.compute_cache_mib,
  ),
  'memory.png': (
    'Peak memory of decoding, MiB', 'decode', report.compute_program_mib
  ),
}  # fmt: skip


def draw_panels(settings, records, where, folder):
  """Writes the PANELS into the folder."""
  table = report.Table(records)
  for file, (title, what, value) in PANELS.items():
    figure, (axes,) = plots.make_figure((7.5, 4.8))
    ends = {}
    for i, model in enumerate(table.models):
      rows = [table[model, what, n] for n in table.contexts]
      points = [(r['context'], value(r)) for r in rows if r]
      if points:
        color = plots.PALETTE[i]
        axes.plot(*zip(*points, strict=True), 'o-', color=color, ms=4)
        ends[model] = (*points[-1], color)
    axes.set(xscale='log', yscale='log', xlabel='context, tokens')
    plots.mark_places(axes, table.contexts, list(map(_short, table.contexts)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f'{y:,g}')
    plots.style_axes(axes)
    _label(axes, ends)
    axes.set_title(title, loc='left', fontsize=11)
    figure.text(
      1, 0, f'{where["machine"]}, {settings.dtype} ', ha='right', va='bottom',
      fontsize=7, color='0.4',
    )  # fmt: skip
    plots.save_figure(figure, folder / file)


def _short(n):
  for size, unit in ((1 << 20, 'M'), (1 << 10, 'k')):
    if n >= size and n % size == 0:
      return f'{n // size}{unit}'
  return str(n)


def _label(axes, ends):
  """Labels the lines at their ends, without overlap."""
  low, high = axes.get_ylim()
  step = math.log(high / low) / 22
  height = -math.inf
  for model, (x, y, color) in sorted(ends.items(), key=lambda e: e[1][1]):
    height = max(math.log(y), height + step)
    axes.annotate(
      model, (x, y), (x * 1.12, math.exp(height)), color=color,
      va='center', fontsize=9,
      arrowprops={'arrowstyle': '-', 'color': color, 'lw': 0.5, 'alpha': 0.5},
    )  # fmt: skip
