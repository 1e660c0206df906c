"""The findings of the probes, as a table, as JSON and as plots."""

import json
import math


def format_text(found):
  """A table for every probe and quantity: rules down, sizes across."""
  lines = []
  for probe, what in _distinct((f.probe, f.what) for f in found):
    rows = [f for f in found if (f.probe, f.what) == (probe, what)]
    sizes = _distinct(f.at for f in rows)
    width = max(len(f.rule) for f in rows) + 2
    lines += ['', f'{probe}: {what}']
    if len(sizes) > 1:
      lines.append(f'  {"":{width}}' + ''.join(f'{n:>10}' for n in sizes))
    for rule in _distinct(f.rule for f in rows):
      values = {f.at: f.value for f in rows if f.rule == rule}
      cells = ''.join(f'{_show(values[n])}' for n in sizes if n in values)
      lines.append(f'  {rule:{width}}{cells}')
  return '\n'.join(lines[1:])


def _show(value):
  if value == int(value):
    return f'{int(value):>10,}'
  return f'{value:>10.3f}' if value >= 1e-3 else f'{value:>10.1e}'


def _distinct(values):
  return list(dict.fromkeys(values))


def format_json(found, where):
  """One record a finding; `where`: the form, versions and device."""
  records = [
    f._asdict() | {'at': int(f.at), 'value': _finite(f.value)} for f in found
  ]
  return json.dumps({**where, 'findings': records}, indent=1) + '\n'


def _finite(value):
  return float(value) if math.isfinite(value) else None


def draw_results(found, path):
  """Capacity, recency under overload and overwriting, side by side."""
  from deltanet_jax.lab import plots

  figure, panels = plots.make_figure((13, 4), 3, share_y=True)
  capacity, recency, again = panels
  rules = _distinct(
    f.rule for f in found if f.probe in ('overload', 'rebinding')
  )
  colour = dict(zip(rules, plots.PALETTE, strict=False))
  _lines(capacity, found, 'overload', 'accuracy', colour, 'o-')
  _lines(recency, found, 'overload', 'first quarter', colour, 'o--')
  _lines(recency, found, 'overload', 'last quarter', colour, 'o-')
  _lines(again, found, 'rebinding', 'accuracy', colour, 'o-')
  for ax, title, label in (
    (capacity, 'pairs written once', 'pairs, 16 wide'),
    (recency, 'last quarter (solid), first (dashed)', 'pairs, 16 wide'),
    (again, '4 keys, each given m values', 'm'),
  ):
    ax.set(title=title, xlabel=label, xscale='log', ylim=(-0.03, 1.03))
    ticks = sorted({int(x) for line in ax.lines for x in line.get_xdata()})
    ax.minorticks_off()
    plots.mark_places(ax, ticks, list(map(str, ticks)))
    plots.style_axes(ax)
  capacity.set_ylabel('share right')
  handles = [h for h in again.lines if h.get_label() in colour]
  figure.legend(handles=handles, loc='outside right upper', frameon=False)
  plots.save_figure(figure, path)


def _lines(axes, found, probe, what, colour, style):
  for rule in colour:
    points = [
      (f.at, f.value)
      for f in found
      if (f.probe, f.what, f.rule) == (probe, what, rule)
    ]
    if points:
      axes.plot(*zip(*points, strict=True), style, ms=4, color=colour[rule],
                label=rule)  # fmt: skip
