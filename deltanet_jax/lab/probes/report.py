"""The findings of the probes, as a table, as JSON and as plots."""

import json
import textwrap

from deltanet_jax.config.files import replace_nonfinite

# (probe, what): what the columns are, what is good, what to conclude
NOTES = {
  ('rebinding', 'accuracy'): (
    'Columns: how many values each of 4 keys got in turn; cells: the share of'
    ' keys that give the newest one back, 1 is best. The delta rule writes a'
    ' new value in the place of the old one; linear attention adds them up and'
    ' confuses them, and softmax needs positions to prefer the newest.'
  ),
  ('overload', 'accuracy'): (
    'Columns: pairs written into a state 16 wide, each once; cells: the share'
    ' read back right, 1 is best. Beyond its width every state loses pairs;'
    ' softmax attention keeps them all, in a cache that grows.'
  ),
  ('overload', 'first quarter'): (
    'The same of the oldest quarter of the pairs. The delta rule and decay give'
    ' them up first: that is the price of keeping new ones.'
  ),
  ('overload', 'last quarter'): (
    'The same of the newest quarter. The delta rule and decay keep these beyond'
    ' the width; linear attention loses old and new alike.'
  ),
  ('orthonormal keys', 'relative error'): (
    'Of 16 keys at right angles, the largest error over the length of the'
    ' value; 0 is best. As many pairs as the state is wide can be exact.'
  ),
  ('cosine 1/2', 'relative error'): (
    'Of 8 keys with a cosine of 1/2, the mean error; 0 is best. Keys that are'
    ' alike disturb each other, and the delta rule less.'
  ),
  ('parity', 'first 64'): (
    'The share of the first 64 bits after which the parity is right, 1 is best'
    ' and 0.5 a guess; 1 - beta is what a 1 multiplies the state by.'
  ),
  ('parity', 'last quarter'): (
    'The same of the last quarter of 4,096 bits. Only beta = 2, which turns the'
    ' sign and keeps the size, still knows the parity.'
  ),
  ('parity', 'accuracy'): (
    'The same of all bits: a beta up to 1 cannot turn the sign, and one between'
    ' 1 and 2 turns it until the state has shrunk to 0.'
  ),
  ('swaps', 'last quarter'): (
    'The share of the last quarter of 2,000 swaps of 5 objects after which all'
    ' places are right, 1 is best: beta = 2 swaps two objects in one token.'
  ),
  ('swaps', 'largest error'): (
    'The largest error of a place, 0 to 4; below 0.5 it rounds to the right'
    ' one, and near 1e-5 it is the rounding of float32.'
  ),
  ('S5', 'last quarter'): (
    'The same of arbitrary permutations of 5 objects, four tokens each: what is'
    ' a product of swaps can be tracked with beta = 2, and not below.'
  ),
  ('S5', 'largest error'): (
    'The largest error of a place, as for the swaps: it does not grow with the'
    ' length at beta = 2.'
  ),
  ('special cases', 'apart from delta'): (
    'The largest difference over the largest value: rules that are equal on'
    ' paper should differ by the rounding of float32 alone, below 1e-5.'
  ),
  ('special cases', 'apart from GDN'): (
    'The same: with one decay for all channels KDA is Gated DeltaNet.'
  ),
  ('cache', 'bytes'): (
    'Columns: tokens; cells: bytes that a tiny mixer keeps of them in float32.'
    ' The states stay as they are, what attention keeps doubles; kinds are not'
    ' comparable in size, as their tiny configurations differ.'
  ),
}


def format_text(results):
  """A table for every probe and quantity: rules down, sizes across; under each
  what it says."""
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
    lines += textwrap.wrap(NOTES[probe, what], 79)
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
