"""The plots of a study, each in a light and a dark theme."""

import io
import re
import zlib

import numpy as np
from matplotlib import pyplot

from deltanet_jax.config.files import write_text
from deltanet_jax.lab import plots
from deltanet_jax.lab.study import stats
from deltanet_jax.lab.study.config import VARIANTS, parse_variant
from deltanet_jax.lab.study.expect import limit_to_largest

STYLES = {0: '-', 1: ':', 3: '--', 7: '-.'}
MARKS = {0: 'o', 1: '^', 3: 's', 7: 'D'}


class View:
  """The data of the plots.

  rows: of results.jsonl   arrays: {(task, variant): final scores}
  """

  def __init__(self, cfg, rows, arrays):
    self.cfg, self.rows, self.arrays = cfg, rows, arrays
    self._found = {}

  def variants(self, task):
    """The variants of a task, in the order of VARIANTS."""
    names = {variant for name, variant in self.arrays if name == task}
    return [variant for variant in VARIANTS if variant in names]

  def accuracy(self, task, variant, limits):
    """The AccuracyEstimate over the questions in limits."""
    key = task, variant, tuple(sorted(limits.items()))
    if key not in self._found:
      part = stats.make_part(1, task, self.arrays[task, variant], limits)
      self._found[key] = stats.estimate_sum([part], self.cfg.draws)
    return self._found[key]

  def seeds(self, task, variant, limits):
    """The accuracy of each seed over the questions in limits."""
    part = stats.make_part(1, task, self.arrays[task, variant], limits)
    return (part.right.sum(1) / part.questions.sum(1)).tolist()

  def levels(self, task, name):
    """The values of a slice that occur."""
    data = self.arrays[task, self.variants(task)[0]]
    labels = data[f'slice.{name}'][data['weights'] > 0]
    # -1: the slice is not about the question
    return np.unique(labels[labels >= 0])

  def scaled(self):
    """{variant: {factor of the log-decay: accuracy by seed}}, on 'deep'."""
    return self.group_accuracies('decay', 'scale')

  def group_accuracies(self, phase, name):
    """{variant: {value of `name`: accuracy by seed}} of a phase, on 'deep'."""
    accuracies = {}
    for row in self.rows:
      where = row['task'], row['phase'], row['slice']
      if where == ('deep', phase, 'all') and row['accuracy'] is not None:
        by_value = accuracies.setdefault(row['model'], {})
        by_value.setdefault(row[name], []).append(row['accuracy'])
    return accuracies

  def facts(self, task, variant):
    """A row of the job; every row has its sizes."""
    of_job = lambda row: (row['task'], row['model']) == (task, variant)
    return next(filter(of_job, self.rows))


def style_variant(variant):
  """Color, line and marker of a variant, the same in every plot."""
  name, ratio = parse_variant(variant)
  names = [a for a in VARIANTS if not parse_variant(a)[1]]
  return {
    'color': plots.PALETTE[names.index(name)], 'linestyle': STYLES[ratio],
    'marker': MARKS[ratio], 'label': variant, 'markersize': 4, 'linewidth': 1.4,
  }  # fmt: skip


def _line(axes, view, task, variant, name, limits, scale=1.0):
  xs = view.levels(task, name)
  estimates = [
    view.accuracy(task, variant, limits | {name: (x, x)}) for x in xs
  ]
  xs = xs * scale
  style = style_variant(variant)
  values, low, high = zip(*estimates, strict=True)
  axes.plot(xs, values, **style)
  color = style['color']
  axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)


def draw_capacity(axes, view):
  """Recall against pairs over key width."""
  for variant in view.variants('mqar'):
    _line(axes, view, 'mqar', variant, 'pairs', {}, 1 / view.cfg.key_dim)
  axes.set(xlabel='pairs / key width of a head', ylabel='accuracy on MQAR')


def draw_memory(axes, view):
  """Recall against the size of state and KV cache."""
  for variant in view.variants('mqar'):
    estimate = view.accuracy(
      'mqar', variant, limit_to_largest(view.cfg, 'mqar')
    )
    x = view.facts('mqar', variant)['cache_floats']
    bars = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    axes.errorbar(x, estimate.value, yerr=bars, **style_variant(variant))
  axes.set(
    xscale='log', ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
    xlabel=f'scalars in state and KV cache after {view.cfg.length} tokens',
  )  # fmt: skip


def draw_recency(axes, view):
  """Recall by the position of the pair."""
  limits = limit_to_largest(view.cfg, 'mqar')
  for variant in view.variants('mqar'):
    _line(axes, view, 'mqar', variant, 'position', limits)
  axes.set(
    xlabel='position of the pair in the list (0: the oldest)',
    ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
  )


def draw_ratios(axes, view):
  """Recall against the share of attention layers."""
  limits, names = limit_to_largest(view.cfg, 'deep'), view.variants('deep')
  for pure in names:
    if parse_variant(pure)[1] or pure == 'full':
      continue
    family = [a for a in names if parse_variant(a)[0] == pure]
    share = lambda a: (
      1 / (parse_variant(a)[1] + 1) if parse_variant(a)[1] else 0
    )
    points = [(share(a), *view.accuracy('deep', a, limits)) for a in family]
    points.append((1, *view.accuracy('deep', 'full', limits)))
    xs, values, low, high = np.array(sorted(points)).T
    bars = [values - low, high - values]
    axes.errorbar(xs, values, yerr=bars, **style_variant(pure))
  axes.set(
    xlabel=f'share of attention in {view.cfg.deep} layers (0: none, 1: all)',
    ylabel=f'accuracy on MQAR, {view.cfg.pairs} pairs',
  )


def draw_budget(axes, view):
  """Accuracy below full attention over the training steps."""
  curves = view.group_accuracies('fresh', 'step')
  for variant in view.variants('deep'):
    if variant == 'full':
      continue
    steps = sorted(set(curves[variant]) & set(curves['full']))
    gap = [
      np.mean(curves['full'][s]) - np.mean(curves[variant][s]) for s in steps
    ]
    axes.plot(steps, gap, **style_variant(variant) | {'marker': ''})
  axes.axhline(0, color='0.5', linewidth=0.8)
  axes.set(
    xlabel='training steps',
    ylabel=f'accuracy behind full (MQAR, {view.cfg.deep} layers)',
  )


def draw_gates(axes, view):
  """Recall when the learned log-decay is scaled after training."""
  for variant, accuracies in view.scaled().items():
    xs = sorted(accuracies)
    axes.plot(
      xs, [np.mean(accuracies[x]) for x in xs], **style_variant(variant)
    )
  axes.set(
    xlabel='factor of the learned log-decay, after training',
    ylabel=f'accuracy on MQAR, {view.cfg.deep} layers',
  )


def draw_document(axes, view):
  """Accuracy by the line that is quoted; the topic as dots at the right."""
  lines = view.levels('quote', 'line')
  end = lines.max() + 1
  for variant in view.variants('quote'):
    _line(axes, view, 'quote', variant, 'line', {'kind': (1, 1)})
    gist = view.accuracy('quote', variant, {'kind': (0, 0)})
    axes.plot([end], [gist.value], **style_variant(variant) | {'label': None})
  axes.set(
    xlabel=f'line that is quoted ({end}: the topic instead)',
    ylabel='accuracy of a word',
  )


# file name -> (title, function, (task, variant or '') that it needs)
ALL = {
  'capacity': ('Recall against number of pairs', draw_capacity, ('mqar', '')),
  'memory': ('Recall against memory', draw_memory, ('mqar', '')),
  'recency': (
    'Recall by position: what is forgotten first',
    draw_recency,
    ('mqar', ''),
  ),
  'ratio': (
    'Recall against the share of attention layers',
    draw_ratios,
    ('deep', 'full'),
  ),
  'budget': (
    'Gap to full attention during training',
    draw_budget,
    ('deep', 'full'),
  ),
  'gates': (
    'Recall when the learned decay is scaled',
    draw_gates,
    ('deep', ''),
  ),
  'document': (
    'Quote of a line and topic of the document',
    draw_document,
    ('quote', ''),
  ),
}


def draw_plots(view, folder):
  """[(name, title, {theme: svg})] of the plots that have data; writes each as
  PNG and SVG too."""
  figures = []
  for name, (title, paint, need) in ALL.items():
    task, variant = need
    if (
      not view.variants(task) or variant and variant not in view.variants(task)
    ):
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
  """Writes a plot as PNG and SVG; returns the SVG."""
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
  """The <svg> element with ids that differ from those of the other plots."""
  svg = svg[svg.index('<svg') :]
  mark = f'{zlib.crc32(svg.encode())}{theme}'
  svg = re.sub(r'id="([^"]+)"', rf'id="{mark}\1"', svg)
  svg = re.sub(r'url\(#([^)]+)\)', rf'url(#{mark}\1)', svg)
  return re.sub(r'href="#([^"]+)"', rf'href="#{mark}\1"', svg)
