"""Tables, JSON and a plot of what was measured."""

import math
import pathlib
import statistics

from deltanet_jax.config import files
from deltanet_jax.lab.bench.bench import PASSES, is_same
from deltanet_jax.lab.pages import render_page


def compute_growth(programs):
  """How time and temporary bytes grow with the length.

  Returns a dict per function and pass: name, pass, lengths, time and temporary
  (per token, relative to the first length), time_slope and temporary_slope
  (least squares of logarithms; 1 is linear). Slopes need three lengths.
  """
  rows = {}
  for program in programs:
    rows.setdefault((program.name, program.way), []).append(program)
  out = []
  for (name, way), row in rows.items():
    lengths = [p.length for p in row]
    growth = {'name': name, 'pass': way, 'lengths': lengths}
    for what, values in (
      ('time', [min(p.seconds, default=None) for p in row]),
      ('temporary', [p.temporary_bytes for p in row]),
    ):
      growth[what] = _per_token(lengths, values)
      growth[f'{what}_slope'] = _slope(lengths, values)
    out.append(growth)
  return out


def _per_token(lengths, values):
  if not values[0]:
    return [None] * len(values)
  first = values[0] / lengths[0]
  return [
    None if x is None else x / length / first
    for length, x in zip(lengths, values, strict=True)
  ]


def _slope(lengths, values):
  points = [
    (math.log(length), math.log(x))
    for length, x in zip(lengths, values, strict=True)
    if x
  ]
  if len(points) < 3:  # two points make no fit
    return None
  return statistics.linear_regression(*zip(*points, strict=True)).slope


def format_text(settings, programs, where):
  """The tables as text.   where: of `describe_environment`"""
  tables = [
    (n, way, [p for p in programs if (p.length, p.way) == (n, way)])
    for n in settings.lengths
    for way in PASSES
  ]
  growth = compute_growth(programs) if len(settings.lengths) > 1 else []
  labels = [f'{row["name"]} {row["pass"]}' for row in growth]
  return render_page(
    pathlib.Path(__file__).with_name('report.txt.jinja'),
    s=settings, where=where, tables=tables, growth=growth, same=is_same,
    cells=_cells, width=max(len(p.name) for p in programs),
    wide=max(map(len, labels), default=0) + 2,
    numbers=lambda x: ''.join(f'{_number(value):>9}' for value in x),
  ).rstrip('\n')  # fmt: skip


def _cells(program, first):
  """The numbers of a program, each with its ratio to the first program."""
  record, base, cells = program.record(), first.record(), ''
  for key, scale, width in (
    ('median', 1e3, 10), ('minimum', 1e3, 11), ('temporary_bytes', 1e-6, 10)
  ):  # fmt: skip
    value, under = record[key], base[key]
    ratio = value / under if value and under else None
    scaled = None if value is None else value * scale
    cells += f'{_number(scaled):>{width}}{_number(ratio):>7}'
  return cells


def _number(x):
  return '-' if x is None else f'{x:.2f}'


def format_json(settings, programs, where):
  """All measurements as JSON; numbers that are not finite are null."""
  return files.format_json(
    {
      'settings': settings._asdict(),
      **where,
      'programs': [
        p.record() | {'ran': bool(p.seconds), 'same': is_same(p, settings)}
        for p in programs
      ],
      'growth': compute_growth(programs) if len(settings.lengths) > 1 else None,
    }
  )


def draw_growth(settings, programs, where, path):
  """Draws time and temporary bytes against the length, on log scales."""
  from deltanet_jax.lab import plots

  figure, (left, right) = plots.make_figure((12, 4.8), 2)
  names = list(dict.fromkeys(p.name for p in programs))
  for name in names:
    for way, style in zip(PASSES, ('o--', 's-'), strict=True):
      row = [p for p in programs if (p.name, p.way) == (name, way)]
      color, label = plots.PALETTE[names.index(name)], f'{name}, {way}'
      times = [(p.length, min(p.seconds) * 1e3) for p in row if p.seconds]
      sizes = [
        (p.length, p.temporary_bytes / 1e6) for p in row if p.temporary_bytes
      ]
      for axes, points in ((left, times), (right, sizes)):
        if points:
          axes.plot(*zip(*points, strict=True), style, color=color, label=label)
  for axes, label in (
    (left, 'time of a call, minimum (ms)'), (right, 'temporary memory (MB)')
  ):  # fmt: skip
    axes.set(xscale='log', yscale='log', xlabel='tokens', ylabel=label)
    plots.mark_places(axes, settings.lengths, list(map(str, settings.lengths)))
    plots.style_axes(axes)
    if axes.lines:
      _proportional(axes)
  if right.lines:
    figure.legend(
      handles=list(right.lines), loc='outside right upper',
      frameon=False, fontsize=8,
    )  # fmt: skip
  figure.suptitle(
    f'{settings.op}, {settings.dtype}, batch {settings.batch}, '
    f'{settings.heads} heads of {settings.dim} on {where["device"]}',
    fontsize=11,
  )
  plots.save_figure(figure, path)


def _proportional(axes):
  """Draws a line of slope 1, from above the highest first point."""
  lengths = max((line.get_xdata() for line in axes.lines), key=len)
  if len(lengths) < 2:
    return
  start = max(
    line.get_ydata()[0] for line in axes.lines
    if line.get_xdata()[0] == lengths[0]
  )  # fmt: skip
  heights = [2 * start * length / lengths[0] for length in lengths]
  axes.plot(lengths, heights, ':', color='0.5', label='proportional')
