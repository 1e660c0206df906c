"""What a study found: findings, a verdict in words, summary.md, report.html."""

import bisect
import pathlib
from typing import NamedTuple

from deltanet_jax.config.files import write_text
from deltanet_jax.lab.pages import render_page
from deltanet_jax.lab.study import expect, plots, stats
from deltanet_jax.lab.study.config import ARMS, make_model, parse_arm
from deltanet_jax.lab.study.training import count_cache_floats

LONG = 131_072  # tokens at which memory is compared too


class Report(NamedTuple):
  text: str  # to print
  status: int  # 1: a gate failed


def write_report(cfg, size, cells, folder, rows):
  """Draws, judges and writes everything; the cells that `folder` lacks are
  named as missing."""
  done = [cell for cell in cells if folder.done(cell)]
  missing = [cell.name for cell in cells if cell not in done]
  arrays = {(c.task, c.arm): folder.arrays(c) for c in done}
  failed = [f'{t} {a}' for (t, a), scores in arrays.items() if not scores]
  arrays = {key: scores for key, scores in arrays.items() if scores}
  view = plots.View(cfg, rows, arrays)
  arms = {task: view.arms(task) for task, _ in arrays}
  expectations = (
    expect.list_smoke_expectations(cfg)
    if size == 'smoke'
    else expect.list_expectations(cfg, arms)
  )
  findings = expect.judge_all(expectations, arrays, cfg.draws)
  verdict, counts = describe_hybrids(cfg, view), _counts(findings)
  remarks = describe_unlearned(view)
  if failed:
    remarks.append(f'Not finite at any learning rate: {", ".join(failed)}.')
  if missing:
    remarks.append(f'Not trained yet: {", ".join(missing)}.')
  values = {
    'cfg': cfg, 'size': size, 'margin': f'{expect.MARGIN:g}',
    'sentences': verdict, 'remarks': remarks, 'counts': counts,
    'findings': findings, 'show': format_estimate, 'head': HEAD,
    'tables': {task: _table(cfg, view, task) for task in arms},
    'figures': plots.draw_plots(view, folder.plots),
    'sizes': ', '.join(f'{k} {v}' for k, v in vars(cfg).items()),
  }  # fmt: skip
  here = pathlib.Path(__file__)
  for path in folder.text, folder.report:
    template = here.with_name(f'{path.name}.jinja')
    write_text(path, render_page(template, **values))
  lines = [*verdict, *remarks, *counts]
  lines += [
    f'FAILED: {f.expectation.claim}: {format_estimate(f.estimate)}'
    for f in findings
    if f.failed
  ]
  lost = size == 'smoke' and len(findings) < len(expectations) and not missing
  if lost:
    lines.append('FAILED: a model of the gates was not finite')
  status = int(lost or any(f.failed for f in findings))
  return Report('\n'.join([*lines, str(folder.report)]), status)


def format_estimate(e):
  """'0.512 [0.480, 0.541]'."""
  return f'{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]'


def _counts(findings):
  kinds = stats.HOLDS, stats.VIOLATED, stats.OPEN
  number = lambda kind: sum(f.verdict == kind for f in findings)
  counts = ', '.join(f'{number(kind)} {kind}' for kind in kinds)
  return [f'Expectations: {counts}.'] if findings else []


def describe_hybrids(cfg, view):
  """Sentences on what each hybrid gave up and saved against full attention."""
  out = []
  names = {a for _, a in view.arrays if parse_arm(a)[1]}
  for arm in sorted(names, key=ARMS.index):
    tasks = [t for t, a in view.arrays if a == arm and _base(view, t)]
    if tasks:
      out.append(_sentence(cfg, view, arm, tasks))
  return out or ['No hybrid ran beside full attention.']


def describe_unlearned(view):
  """Sentences on the arms that are not shown to bind values to keys, not even
  in the shortest lists: to pick any of the n values shown is right in 1/n."""
  out = []
  for task in ('mqar', 'deep'):
    names = []
    for arm in view.arms(task):
      n = int(view.levels(task, 'pairs').min())
      estimate = view.accuracy(task, arm, {'pairs': (n, n)})
      if estimate.low < 1 / n + expect.MARGIN:
        names.append(arm)
    if names:
      out.append(
        f'Not shown to have learned {task} within the steps, where any of the'
        f' values shown would do as well: {", ".join(names)}. There the numbers'
        ' speak of the training, not of the memory.'
      )
  return out


def _base(view, task):
  """The attention that a task's arms are compared with, or None."""
  names = 'full', 'full-nope'
  return next((a for a in names if (task, a) in view.arrays), None)


def _sentence(cfg, view, arm, tasks):
  clauses = {'gave up': [], 'gained': []}
  equal, open_ = f'was equal within {expect.MARGIN:g} on', 'is not resolved on'
  clauses |= {equal: [], open_: []}
  for task in tasks:
    limits = expect.limit_to_hardest(cfg, task)
    mine, base = (
      stats.make_part(sign, task, view.arrays[task, name], limits)
      for sign, name in ((1, arm), (-1, _base(view, task)))
    )
    e = stats.estimate_sum([mine, base], cfg.draws)
    kind = {stats.HOLDS: 'gained', stats.VIOLATED: 'gave up'}.get(
      e.above(0), open_
    )
    if e.within(expect.MARGIN) == stats.HOLDS:
      kind = equal
    clauses[kind].append(
      f'{task} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}] of'
      f' {base.right.sum() / base.questions.sum():.2f}'
    )
  said = '; '.join(f'{k} {", ".join(x)}' for k, x in clauses.items() if x)
  saved = _saved(cfg, view, arm, tasks[0])
  return f'Against full attention, {arm} {said}. {saved}'


def _saved(cfg, view, arm, task):
  """What decoding keeps, at the length trained on and at LONG tokens."""
  facts = view.facts(task, arm)

  def floats(arm, context):
    model = make_model(cfg, arm, facts['vocab'], facts['layers'], cfg.hidden)
    return count_cache_floats(model, context)

  clauses = []
  for n in (facts['length'], LONG):
    mine, full = floats(arm, n), floats('full', n)
    less = f'{mine / full - 1:+.0%}'
    clauses.append(f'{mine:,} numbers of {n:,} tokens, full {full:,} ({less})')
  meet = find_break_even(lambda n: floats(arm, n) - floats('full', n))
  least = f' It saves from {meet:,} tokens on.' if meet else ''
  return f'It keeps {"; ".join(clauses)}.{least}'


def find_break_even(difference, most=1 << 20):
  """The least context at which difference(context) <= 0; None above most.

  difference: never grows with the context
  """
  saves = lambda n: difference(n) <= 0
  context = bisect.bisect_left(range(1, most + 1), True, key=saves) + 1
  return context if context <= most else None


HEAD = (
  'model', 'parameters', 'numbers kept', 'accuracy', 'hardest size', 'by seed'
)  # fmt: skip


def _table(cfg, view, task):
  """The cells of HEAD of every arm of a task."""
  limits, rows = expect.limit_to_hardest(cfg, task), []
  for arm in view.arms(task):
    facts = view.facts(task, arm)
    sizes = (f'{facts[x]:,}' for x in ('parameters', 'cache_floats'))
    estimates = (view.accuracy(task, arm, x) for x in ({}, limits))
    by_seed = ' '.join(f'{x:.2f}' for x in view.seeds(task, arm, limits))
    rows.append((arm, *sizes, *map(format_estimate, estimates), by_seed))
  return rows
