"""The plots of a study, each in a light and a dark form."""

import io
import re
import zlib

import numpy as np
from matplotlib import pyplot

from deltanet_jax.config.files import write_text
from deltanet_jax.lab import plots
from deltanet_jax.lab.study import stats
from deltanet_jax.lab.study.config import ARMS, parse_arm
from deltanet_jax.lab.study.expect import limit_to_hardest

STYLES = {0: '-', 1: ':', 3: '--', 7: '-.'}
MARKS = {0: 'o', 1: '^', 3: 's', 7: 'D'}


class View:
  """What the plots draw from.

  rows: of results.jsonl   arrays: {(task, model): of the last scores}
  """

  def __init__(self, cfg, rows, arrays):
    self.cfg, self.rows, self.arrays = cfg, rows, arrays
    self._found = {}

  def arms(self, task):
    """In the order of ARMS."""
    names = {arm for name, arm in self.arrays if name == task}
    return [arm for arm in ARMS if arm in names]

  def accuracy(self, task, arm, limits):
    """The Estimate over the questions in limits."""
    key = task, arm, tuple(sorted(limits.items()))
    if key not in self._found:
      part = stats.make_part(1, task, self.arrays[task, arm], limits)
      self._found[key] = stats.estimate_sum([part], self.cfg.draws)
    return self._found[key]

  def seeds(self, task, arm, limits):
    """The accuracy of each seed over the questions in limits."""
    part = stats.make_part(1, task, self.arrays[task, arm], limits)
    return (part.right.sum(1) / part.questions.sum(1)).tolist()

  def levels(self, task, name):
    """Values of a slice that are asked of."""
    data = self.arrays[task, self.arms(task)[0]]
    labels = data[f'slice.{name}'][data['weights'] > 0]
    # -1: the slice is not about the question
    return np.unique(labels[labels >= 0])

  def scaled(self):
    """{arm: {factor of the log-decay: accuracies of the seeds}}, of 'deep'."""
    return self.group_accuracies('decay', 'scale')

  def group_accuracies(self, phase, name):
    """{arm: {value of `name`: accuracies of the seeds}} in a phase, of 'deep'
    over all questions."""
    accuracies = {}
    for row in self.rows:
      where = row['task'], row['phase'], row['slice']
      if where == ('deep', phase, 'all') and row['accuracy'] is not None:
        by_value = accuracies.setdefault(row['model'], {})
        by_value.setdefault(row[name], []).append(row['accuracy'])
    return accuracies

  def facts(self, task, arm):
    """A row of the cell: its sizes stand in every one."""
    of_cell = lambda row: (row['task'], row['model']) == (task, arm)
    return next(filter(of_cell, self.rows))


def style_arm(arm):
  """Colour, line and marker of an arm, the same in every plot."""
  name, ratio = parse_arm(arm)
  names = [a for a in ARMS if not parse_arm(a)[1]]
  return {
    'color': plots.PALETTE[names.index(name)], 'linestyle': STYLES[ratio],
    'marker': MARKS[ratio], 'label': arm, 'markersize': 4, 'linewidth': 1.4,
  }  # fmt: skip


def _line(axes, view, task, arm, name, limits, scale=1.0):
  xs = view.levels(task, name)
  estimates = [view.accuracy(task, arm, limits | {name: (x, x)}) for x in xs]
  xs = xs * scale
  style = style_arm(arm)
  values, low, high = zip(*estimates, strict=True)
  axes.plot(xs, values, **style)
  color = style['color']
  axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)


def draw_capacity(axes, view):
  """Recall against pairs over key width."""
  for arm in view.arms('mqar'):
    _line(axes, view, 'mqar', arm, 'pairs', {}, 1 / view.cfg.key_dim)
  axes.set(xlabel='pairs / key width of a head', ylabel='accuracy on MQAR')


def draw_memory(axes, view):
  """Recall against what decoding keeps."""
  for arm in view.arms('mqar'):
    estimate = view.accuracy('mqar', arm, limit_to_hardest(view.cfg, 'mqar'))
    x = view.facts('mqar', arm)['cache_floats']
    bars = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    axes.errorbar(x, estimate.value, yerr=bars, **style_arm(arm))
  axes.set(
    xscale='log', ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
    xlabel=f'numbers kept of {view.cfg.length} tokens (state and cache)',
  )  # fmt: skip


def draw_recency(axes, view):
  """Recall by the age of the pair."""
  limits = limit_to_hardest(view.cfg, 'mqar')
  for arm in view.arms('mqar'):
    _line(axes, view, 'mqar', arm, 'position', limits)
  axes.set(
    xlabel='position of the pair in the list (0: the oldest)',
    ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
  )


def draw_ratios(axes, view):
  """Recall against the share of attention layers."""
  limits, names = limit_to_hardest(view.cfg, 'deep'), view.arms('deep')
  for pure in names:
    if parse_arm(pure)[1] or pure == 'full':
      continue
    family = [a for a in names if parse_arm(a)[0] == pure]
    share = lambda a: 1 / (parse_arm(a)[1] + 1) if parse_arm(a)[1] else 0
    points = [(share(a), *view.accuracy('deep', a, limits)) for a in family]
    points.append((1, *view.accuracy('deep', 'full', limits)))
    xs, values, low, high = np.array(sorted(points)).T
    bars = [values - low, high - values]
    axes.errorbar(xs, values, yerr=bars, **style_arm(pure))
  axes.set(
    xlabel=f'share of attention in {view.cfg.deep} layers (0: none, 1: all)',
    ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
  )


def draw_budget(axes, view):
  """How far an arm is behind full attention while training goes on."""
  curves = view.group_accuracies('fresh', 'step')
  for arm in view.arms('deep'):
    if arm == 'full':
      continue
    steps = sorted(set(curves[arm]) & set(curves['full']))
    gap = [np.mean(curves['full'][s]) - np.mean(curves[arm][s]) for s in steps]
    axes.plot(steps, gap, **style_arm(arm) | {'marker': ''})
  axes.axhline(0, color='0.5', linewidth=0.8)
  axes.set(
    xlabel='training steps',
    ylabel=f'accuracy behind full (MQAR, {view.cfg.deep} layers)',
  )


def draw_gates(axes, view):
  """Recall when the learned log-decay is scaled after training."""
  for arm, accuracies in view.scaled().items():
    xs = sorted(accuracies)
    axes.plot(xs, [np.mean(accuracies[x]) for x in xs], **style_arm(arm))
  axes.set(
    xlabel='factor of the learned log-decay, after training',
    ylabel=f'accuracy on MQAR, {view.cfg.deep} layers',
  )


def draw_document(axes, view):
  """The exact quote by the line's place; the gist as dots at the right."""
  lines = view.levels('quote', 'line')
  end = lines.max() + 1
  for arm in view.arms('quote'):
    _line(axes, view, 'quote', arm, 'line', {'kind': (1, 1)})
    gist = view.accuracy('quote', arm, {'kind': (0, 0)})
    axes.plot([end], [gist.value], **style_arm(arm) | {'label': None})
  axes.set(
    xlabel=f'line that is quoted ({end}: the gist instead)',
    ylabel='accuracy of a word',
  )


# file name -> (title, function, the task and arm it cannot do without)
ALL = {
  'capacity': ('Recall against load', draw_capacity, ('mqar', '')),
  'memory': ('Recall against memory', draw_memory, ('mqar', '')),
  'recency': ('What is forgotten first', draw_recency, ('mqar', '')),
  'ratio': ('How many attention layers', draw_ratios, ('deep', 'full')),
  'budget': ('Gap to full against training', draw_budget, ('deep', 'full')),
  'gates': ('How much hangs on the learned decay', draw_gates, ('deep', '')),
  'document': ('Exact quote and gist', draw_document, ('quote', '')),
}


def draw_plots(view, folder):
  """[(name, title, {theme: svg})] of the plots whose data are there; writes
  each as PNG and SVG too."""
  figures = []
  for name, (title, paint, need) in ALL.items():
    task, arm = need
    if not view.arms(task) or arm and arm not in view.arms(task):
      continue
    if paint is draw_gates and not view.scaled():
      continue
    images = {
      theme: _render(paint, view, theme, folder / f'{name}-{theme}.png')
      for theme in plots.THEMES
    }
    figures.append((name, title, images))
  return figures


def _render(paint, view, theme, path):
  """Writes the picture as PNG and SVG; returns the SVG."""
  style = plots.make_theme(theme) | {
    'svg.fonttype': 'none', 'font.size': 9, 'svg.hashsalt': 'study'
  }  # fmt: skip
  with pyplot.rc_context(style):
    figure, (axes,) = plots.make_figure((8.2, 4.2))
    paint(axes, view)
    plots.style_axes(axes)
    if paint is not draw_budget:
      axes.set_ylim(-0.02, 1.02)
    if axes.get_legend_handles_labels()[0]:
      figure.legend(loc='outside right upper', frameon=False, fontsize=8)
    text = io.StringIO()
    plain = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
    figure.savefig(text, format='svg', transparent=True, metadata=plain)
    plots.save_figure(figure, path, plots.THEMES[theme]['back'])
  svg = _inline(text.getvalue(), theme)
  write_text(path.with_suffix('.svg'), svg)
  return svg


def _inline(svg, theme):
  """The <svg> alone, its ids unlike those of the other pictures."""
  svg = svg[svg.index('<svg') :]
  mark = f'{zlib.crc32(svg.encode())}{theme}'
  svg = re.sub(r'id="([^"]+)"', rf'id="{mark}\1"', svg)
  svg = re.sub(r'url\(#([^)]+)\)', rf'url(#{mark}\1)', svg)
  return re.sub(r'href="#([^"]+)"', rf'href="#{mark}\1"', svg)
