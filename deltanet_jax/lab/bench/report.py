"""Tables, JSON and a plot of what was measured."""

import math
import pathlib
import statistics

from deltanet_jax.config import files
from deltanet_jax.lab.bench.bench import is_same
from deltanet_jax.lab.pages import render_page


def compute_growth(programs):
  """How time and temporary bytes grow with the axis.

  Returns a dict per function and pass: name, pass, values, time and temporary
  (per unit of the axis, relative to its first value), time_slope and
  temporary_slope (least squares of logarithms; 1 is linear). Slopes need three
  values.
  """
  rows = {}
  for program in programs:
    rows.setdefault((program.name, program.way), []).append(program)
  out = []
  for (name, way), row in rows.items():
    places = [p.value for p in row]
    growth = {'name': name, 'pass': way, 'values': places}
    for what, values in (
      ('time', [min(p.seconds, default=None) for p in row]),
      ('temporary', [p.temporary_bytes for p in row]),
    ):
      growth[what] = _per_unit(places, values)
      growth[f'{what}_slope'] = _slope(places, values)
    out.append(growth)
  return out


def _per_unit(places, values):
  if not values[0]:
    return [None] * len(values)
  first = values[0] / places[0]
  return [
    None if x is None else x / place / first
    for place, x in zip(places, values, strict=True)
  ]


def _slope(places, values):
  points = [
    (math.log(place), math.log(x))
    for place, x in zip(places, values, strict=True)
    if x
  ]
  if len(points) < 3:  # two points make no fit
    return None
  return statistics.linear_regression(*zip(*points, strict=True)).slope


def format_text(settings, programs, where):
  """The tables as text.   where: of `describe_environment`"""
  groups = {}
  for program in programs:
    groups.setdefault((program.value, program.way), []).append(program)
  growth = compute_growth(programs) if len(settings.values) > 1 else []
  labels = [f'{row["name"]} {row["pass"]}' for row in growth]
  rule = settings.what == 'rule'
  return render_page(
    pathlib.Path(__file__).with_name('report.txt.jinja'),
    s=settings, what=describe(settings), where=where, same=is_same,
    growth=growth,
    tables=[(f'{x[0].at}, {x[0].way}', x) for x in groups.values()],
    head=''.join(f'{name:>{w}}' for _, _, name, w in _columns(rule)),
    cells=lambda program, first: _cells(program, first, rule, where),
    width=max(len(p.name) for p in programs),
    wide=max(map(len, labels), default=0) + 2,
    numbers=lambda x: ''.join(f'{_number(value):>9}' for value in x),
  ).rstrip('\n')  # fmt: skip


def _columns(rule):
  """(of `TimedProgram.record`, scale, heading, width): the columns of a table;
  None: the ratio of the one before to that of the first program."""
  times = [
    ('median', 1e3, 'median ms', 10), (None, 1, 'x', 7),
    ('minimum', 1e3, 'minimum ms', 11), (None, 1, 'x', 7),
  ]  # fmt: skip
  temporary = [('temporary_bytes', 1e-6, 'temp MB', 10), (None, 1, 'x', 7)]
  seconds = [('compile_seconds', 1, 'compile s', 11)]
  if rule:
    return times + temporary + seconds
  return [
    *times,
    ('tokens_per_second', 1, 'tokens/s', 12),
    ('flops_per_second', 1e-9, 'GFLOP/s', 11),
    ('mfu', 100, 'MFU %', 7),
    ('peak_bytes', 1e-6, 'peak MB', 11),
    *seconds,
  ]


def _cells(program, first, rule, where):
  """The numbers of a program."""
  record, base, cells, last = _record(program, where), first.record(), '', None
  for key, scale, _, width in _columns(rule):
    value = record[key or last]
    if key is None:
      value = value / base[last] if value and base[last] else None
    last = key or last
    cells += f'{_number(None if value is None else value * scale):>{width}}'
  return cells


def _record(program, where):
  """The record of a program with its MFU: the model's own FLOP per second over
  the bfloat16 peak of its devices, None where that is not known."""
  record, peak = program.record(), where.get('peak_flops')
  rate = record['flops_per_second']
  mfu = rate / (peak * program.devices) if rate and peak else None
  return record | {'devices': program.devices, 'mfu': mfu}


def _number(x):
  return '-' if x is None else f'{x:.2f}'


def format_json(settings, programs, where):
  """All measurements as JSON; numbers that are not finite are null."""
  return files.format_json(
    {
      'settings': settings._asdict(),
      **where,
      'programs': [
        _record(p, where)
        | {'ran': bool(p.seconds), 'same': is_same(p, settings)}
        for p in programs
      ],
      'growth': compute_growth(programs) if len(settings.values) > 1 else None,
    }
  )


def describe(settings):
  """What was timed, in a line."""
  s, axis = settings, settings.axis
  show = lambda name, words: f', {words}' if name != axis else ''
  sizes = show('length', f'T {s.length}') + show('batch', f'batch {s.batch}')
  if s.what != 'rule':
    return f'{s.what}{sizes}'
  heads = f'{s.heads} heads' if axis != 'heads' else 'heads'
  heads += f' (a key head for {s.grouped})' if s.grouped > 1 else ''
  return f'{s.op}: {s.dtype}{sizes}, {heads} of {s.dim}, chunk {s.chunk}'


def draw_growth(settings, programs, where, path):
  """Draws time and temporary bytes against the axis, on log scales."""
  from deltanet_jax.lab import plots

  figure, (left, right) = plots.make_figure((12, 4.8), 2)
  names = list(dict.fromkeys(p.name for p in programs))
  what = {'length': 'tokens', 'batch': 'sequences'}.get(settings.axis, 'heads')
  for name in names:
    ways = dict.fromkeys(p.way for p in programs)
    for way, style in zip(ways, ('o--', 's-'), strict=False):
      row = [p for p in programs if (p.name, p.way) == (name, way)]
      color, label = plots.PALETTE[names.index(name)], f'{name}, {way}'
      times = [(p.value, min(p.seconds) * 1e3) for p in row if p.seconds]
      sizes = [
        (p.value, p.temporary_bytes / 1e6) for p in row if p.temporary_bytes
      ]
      for axes, points in ((left, times), (right, sizes)):
        if points:
          axes.plot(*zip(*points, strict=True), style, color=color, label=label)
  for axes, label in (
    (left, 'time of a call, minimum (ms)'), (right, 'temporary memory (MB)')
  ):  # fmt: skip
    axes.set(xscale='log', yscale='log', xlabel=what, ylabel=label)
    plots.mark_places(axes, settings.values, list(map(str, settings.values)))
    plots.style_axes(axes)
    if axes.lines:
      _proportional(axes)
  if right.lines:
    figure.legend(
      handles=list(right.lines), loc='outside right upper',
      frameon=False, fontsize=8,
    )  # fmt: skip
  figure.suptitle(
    f'{describe(settings)} on {where["device"]}',
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
