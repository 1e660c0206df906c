"""The findings of the probes, as a table, as JSON and as plots."""

import json

from deltanet_jax.config.files import replace_nonfinite


def format_text(results):
  """A table for every probe and quantity: rules down, sizes across."""
  lines = []
  for probe, what in _distinct((f.probe, f.what) for f in results):
    rows = [f for f in results if (f.probe, f.what) == (probe, what)]
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


def format_json(results, where):
  """One record a finding; `where`: the form, versions and device."""
  records = [
    f._asdict() | {'at': int(f.at), 'value': float(f.value)} for f in results
  ]
  tree = replace_nonfinite({**where, 'findings': records})
  return json.dumps(tree, indent=1) + '\n'


def draw_results(results, path):
  """Capacity, recency under overload and overwriting, side by side."""
  from deltanet_jax.lab import plots

  figure, panels = plots.make_figure((13, 4), 3, share_y=True)
  capacity, recency, again = panels
  rules = _distinct(
    f.rule for f in results if f.probe in ('overload', 'rebinding')
  )
  colors = dict(zip(rules, plots.PALETTE, strict=False))
  _lines(capacity, results, 'overload', 'accuracy', colors, 'o-')
  _lines(recency, results, 'overload', 'first quarter', colors, 'o--')
  _lines(recency, results, 'overload', 'last quarter', colors, 'o-')
  _lines(again, results, 'rebinding', 'accuracy', colors, 'o-')
  for axes, title, label in (
    (capacity, 'pairs written once', 'pairs, 16 wide'),
    (recency, 'last quarter (solid), first (dashed)', 'pairs, 16 wide'),
    (again, '4 keys, each given m values', 'm'),
  ):
    axes.set(title=title, xlabel=label, xscale='log', ylim=(-0.03, 1.03))
    ticks = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.minorticks_off()
    plots.mark_places(axes, ticks, list(map(str, ticks)))
    plots.style_axes(axes)
  capacity.set_ylabel('share right')
  handles = [h for h in again.lines if h.get_label() in colors]
  figure.legend(handles=handles, loc='outside right upper', frameon=False)
  plots.save_figure(figure, path)


def _lines(axes, results, probe, what, colors, style):
  for rule in colors:
    points = [
      (f.at, f.value)
      for f in results
      if (f.probe, f.what, f.rule) == (probe, what, rule)
    ]
    if points:
      axes.plot(*zip(*points, strict=True), style, ms=4, color=colors[rule],
                label=rule)  # fmt: skip
