"""The results of the probes as tables, JSON and a plot."""

import json
import textwrap

from deltanet_jax.config.files import replace_nonfinite

# (probe, what): (title, what the table shows and means)
NOTES = {
  ('rebinding', 'accuracy'): (
    'Keys with replaced values: accuracy of the newest value',
    'Columns: values that each of 4 keys got in turn. Cells: share of keys that'
    ' return the newest; 1 is best. The delta rule replaces the old value.'
    ' Linear attention returns the sum of all, and softmax attention needs'
    ' positions ("recent first") to prefer the newest.',
  ),
  ('overload', 'accuracy'): (
    'More pairs than the state is wide: accuracy of all',
    'Columns: pairs written into a state of width 16. Cells: share read right;'
    ' 1 is best. Beyond its width every state loses pairs; softmax attention'
    ' keeps all in a cache that grows.',
  ),
  ('overload', 'first quarter'): (
    'More pairs than the state is wide: accuracy of the oldest quarter',
    'The delta rule and decay lose the oldest pairs first, to store new ones.',
  ),
  ('overload', 'last quarter'): (
    'More pairs than the state is wide: accuracy of the newest quarter',
    'The delta rule and decay keep these beyond the width; linear attention'
    ' loses old and new pairs alike.',
  ),
  ('orthonormal keys', 'relative error'): (
    'Orthonormal keys: largest relative error of 16 values',
    '0 is best: as many pairs as the state is wide can be stored exactly.',
  ),
  ('cosine 1/2', 'relative error'): (
    'Keys with a cosine of 1/2: mean relative error of 8 values',
    '0 is best. Correlated keys disturb each other, under the delta rule less.',
  ),
  ('parity', 'first 64'): (
    'Parity: accuracy over the first 64 bits',
    'Share of the bits after which the sign of the state is the parity; 1 is'
    ' best, 0.5 is chance. A bit of 1 multiplies the state by 1 - beta.',
  ),
  ('parity', 'last quarter'): (
    'Parity: accuracy over the last quarter of 4,096 bits',
    'Only beta = 2 still knows the parity: it flips the sign of the state and'
    ' keeps its size.',
  ),
  ('parity', 'accuracy'): (
    'Parity: accuracy over all bits',
    'beta up to 1 cannot flip the sign; between 1 and 2 it flips the sign until'
    ' the state has shrunk to 0.',
  ),
  ('swaps', 'last quarter'): (
    'Swaps of 5 objects: accuracy over the last quarter of 2,000',
    'Share of the swaps after which all places are right; 1 is best. With'
    ' beta = 2 one token swaps two objects.',
  ),
  ('swaps', 'largest error'): (
    'Swaps of 5 objects: largest error of a place, 0 to 4',
    'Below 0.5 it rounds to the right place; near 1e-5 it is float32 rounding.',
  ),
  ('S5', 'last quarter'): (
    'Permutations of 5 objects: accuracy over the last quarter of 500',
    'As for swaps; a permutation is up to four swaps, one token each. Only'
    ' beta = 2 tracks them.',
  ),
  ('S5', 'largest error'): (
    'Permutations of 5 objects: largest error of a place, 0 to 4',
    'At beta = 2 it does not grow with the length.',
  ),
  ('special cases', 'apart from delta'): (
    'Recurrences that equal the delta rule: largest relative difference',
    'Recurrences that are equal in theory should differ by float32 rounding'
    ' alone, below 1e-5.',
  ),
  ('special cases', 'apart from GDN'): (
    'Recurrences that equal Gated DeltaNet: largest relative difference',
    'KDA with the same decay for all channels is Gated DeltaNet.',
  ),
  ('cache', 'bytes'): (
    'Cache of a tiny mixer of each kind: bytes in float32',
    'Columns: tokens. States do not grow; the cache of attention doubles. The'
    ' tiny configurations differ, so compare growth, not size.',
  ),
}


def format_text(results):
  """A table for every probe and quantity, with what it shows."""
  lines = []
  for probe, what in _distinct((f.probe, f.what) for f in results):
    rows = [f for f in results if (f.probe, f.what) == (probe, what)]
    sizes = _distinct(f.at for f in rows)
    width = max(len(f.rule) for f in rows) + 2
    title, note = NOTES[probe, what]
    lines += ['', title]
    if len(sizes) > 1:
      lines.append(f'  {"":{width}}' + ''.join(f'{n:>10}' for n in sizes))
    for rule in _distinct(f.rule for f in rows):
      values = {f.at: f.value for f in rows if f.rule == rule}
      cells = ''.join(f'{_show(values[n])}' for n in sizes if n in values)
      lines.append(f'  {rule:{width}}{cells}')
    lines += textwrap.wrap(note, 79)
  return '\n'.join(lines[1:])


def _show(value):
  if value == int(value):
    return f'{int(value):>10,}'
  return f'{value:>10.3f}' if value >= 1e-3 else f'{value:>10.1e}'


def _distinct(values):
  return list(dict.fromkeys(values))


def format_json(results, where):
  """One record per result; `where`: form, version and device."""
  records = [
    f._asdict() | {'at': int(f.at), 'value': float(f.value)} for f in results
  ]
  tree = replace_nonfinite({**where, 'findings': records})
  return json.dumps(tree, indent=1) + '\n'


def draw_results(results, path):
  """Draws recall of pairs, recall by age and recall of replaced values."""
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
    (capacity, 'all pairs', 'pairs (state of width 16)'),
    (recency, 'newest quarter (solid), oldest (dashed)', 'pairs'),
    (again, 'newest of m values of a key', 'm'),
  ):
    axes.set(title=title, xlabel=label, xscale='log', ylim=(-0.03, 1.03))
    ticks = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.minorticks_off()
    plots.mark_places(axes, ticks, list(map(str, ticks)))
    plots.style_axes(axes)
  capacity.set_ylabel('share read right')
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
