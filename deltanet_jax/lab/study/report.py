"""The report of a study: findings in words, summary.md, report.html."""

import bisect
import pathlib
from typing import NamedTuple

from deltanet_jax.config.files import write_text
from deltanet_jax.lab.pages import render_page
from deltanet_jax.lab.study import expect, plots, stats
from deltanet_jax.lab.study.config import (
  TASKS,
  VARIANT_LEGEND,
  VARIANTS,
  make_model,
  parse_variant,
)
from deltanet_jax.lab.study.training import count_cache_floats

LONG = 131_072  # tokens; memory is also compared at this context


class Report(NamedTuple):
  text: str  # to print
  status: int  # 1: a gate failed


def write_report(cfg, size, jobs, folder, rows):
  """Writes plots, summary.md and report.html; names the jobs not yet done."""
  done = [job for job in jobs if folder.done(job)]
  missing = [job.name for job in jobs if job not in done]
  arrays = {(c.task, c.variant): folder.arrays(c) for c in done}
  failed = [f'{t} {a}' for (t, a), scores in arrays.items() if not scores]
  arrays = {key: scores for key, scores in arrays.items() if scores}
  view = plots.View(cfg, rows, arrays)
  variants = {task: view.variants(task) for task, _ in arrays}
  expectations = (
    expect.list_smoke_expectations(cfg)
    if size == 'smoke'
    else expect.list_expectations(cfg, variants)
  )
  untrained = find_untrained(view)
  findings = expect.judge_all(expectations, arrays, cfg.draws, untrained)
  verdict, counts = describe_hybrids(cfg, view), _counts(findings)
  remarks = describe_untrained(untrained)
  if failed:
    remarks.append(f'Not finite at any learning rate: {", ".join(failed)}.')
  if missing:
    remarks.append(f'Not trained yet: {", ".join(missing)}.')
  values = {
    'cfg': cfg, 'size': size, 'margin': f'{expect.MARGIN:g}',
    'sentences': verdict, 'remarks': remarks, 'counts': counts,
    'findings': findings, 'show': format_estimate, 'head': HEAD,
    'tables': {task: _table(cfg, view, task) for task in variants},
    'overview': _overview(cfg, view, variants, untrained), 'about': TASKS,
    'legend': VARIANT_LEGEND,
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
    lines.append('FAILED: the loss of a gated model was not finite')
  status = int(lost or any(f.failed for f in findings))
  return Report('\n'.join([*lines, str(folder.report)]), status)


def format_estimate(e):
  """'0.512 [0.480, 0.541]'."""
  return f'{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]'


def _counts(findings):
  kinds = stats.HOLDS, stats.VIOLATED, stats.OPEN, stats.UNTRAINED
  number = lambda kind: sum(f.verdict == kind for f in findings)
  counts = ', '.join(f'{number(kind)} {kind}' for kind in kinds)
  return [f'{len(findings)} expectations: {counts}.'] if findings else []


def describe_hybrids(cfg, view):
  """Sentences on the accuracy and memory of each hybrid against attention."""
  out = []
  names = {a for _, a in view.arrays if parse_variant(a)[1]}
  for variant in sorted(names, key=VARIANTS.index):
    tasks = [t for t, a in view.arrays if a == variant and _base(view, t)]
    if tasks:
      out.append(_sentence(cfg, view, variant, tasks))
  return out or ['No hybrid was trained beside full attention.']


def find_untrained(view):
  """[(task, variant)] of the recall models that may still guess among the n
  values shown, which is right in 1/n, even with the fewest pairs."""
  out = []
  for task in ('mqar', 'deep'):
    for variant in view.variants(task):
      n = int(view.levels(task, 'pairs').min())
      estimate = view.accuracy(task, variant, {'pairs': (n, n)})
      if estimate.low < 1 / n + expect.MARGIN:
        out.append((task, variant))
  return out


def describe_untrained(untrained):
  """A sentence for each task with untrained models."""
  out = []
  for task in dict.fromkeys(task for task, _ in untrained):
    names = ', '.join(variant for name, variant in untrained if name == task)
    out.append(
      f'Not shown to have learned {task}: {names}. Within the steps they did no'
      ' better than guess among the values shown, even with the fewest pairs;'
      ' their scores need not show what they could store.'
    )
  return out


def _base(view, task):
  """The attention that a task is compared with, or None."""
  names = 'full', 'full-nope'
  return next((a for a in names if (task, a) in view.arrays), None)


def _sentence(cfg, view, variant, tasks):
  worse, better, open_ = 'worse on', 'better on', 'undecided on'
  equal = f'equal within {expect.MARGIN:g} on'
  clauses = {worse: [], better: [], equal: [], open_: []}
  for task in tasks:
    limits = expect.limit_to_largest(cfg, task)
    mine, base = (
      stats.make_part(sign, task, view.arrays[task, name], limits)
      for sign, name in ((1, variant), (-1, _base(view, task)))
    )
    e = stats.estimate_sum([mine, base], cfg.draws)
    kind = {stats.HOLDS: better, stats.VIOLATED: worse}.get(e.above(0), open_)
    if e.within(expect.MARGIN) == stats.HOLDS:
      kind = equal
    clauses[kind].append(
      f'{task} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}] (full:'
      f' {base.right.sum() / base.questions.sum():.2f})'
    )
  compared = '; '.join(
    f'{kind} {", ".join(x)}' for kind, x in clauses.items() if x
  )
  memory = _compare_memory(cfg, view, variant, tasks[0])
  return f'{variant} against full attention: {compared}. {memory}'


def _compare_memory(cfg, view, variant, task):
  """Scalars in state and KV cache, at the length trained on and at LONG."""
  facts = view.facts(task, variant)

  def floats(variant, context):
    model = make_model(
      cfg, variant, facts['vocab'], facts['layers'], cfg.hidden
    )
    return count_cache_floats(model, context)

  clauses = []
  for n in (facts['length'], LONG):
    mine, full = floats(variant, n), floats('full', n)
    less = f'{mine / full - 1:+.0%}'
    clauses.append(f'{mine:,} after {n:,} tokens (full: {full:,}, {less})')
  meet = find_break_even(lambda n: floats(variant, n) - floats('full', n))
  least = f'; fewer from {meet:,} tokens on' if meet else ''
  return f'Scalars in state and KV cache: {", ".join(clauses)}{least}.'


def find_break_even(difference, most=1 << 20):
  """The least context with difference(context) <= 0; None if above most.

  difference: does not increase with the context
  """
  saves = lambda n: difference(n) <= 0
  context = bisect.bisect_left(range(1, most + 1), True, key=saves) + 1
  return context if context <= most else None


HEAD = (
  'model', 'parameters', 'scalars in state and KV cache', 'accuracy',
  'largest size', 'largest size, by seed',
)  # fmt: skip


def _overview(cfg, view, variants, untrained):
  """Rows of accuracies at the largest size: a variant, then all tasks; * marks
  the untrained."""
  rows = [('model', *variants)]

  def cell(task, variant):
    if variant not in variants[task]:
      return ''
    limits = expect.limit_to_largest(cfg, task)
    mark = '*' if (task, variant) in untrained else ''
    return f'{view.accuracy(task, variant, limits).value:.2f}{mark}'

  for variant in VARIANTS:
    cells = [cell(task, variant) for task in variants]
    if any(cells):
      rows.append((variant, *cells))
  return rows


def _table(cfg, view, task):
  """Rows of the columns HEAD, one for each variant of a task."""
  limits, rows = expect.limit_to_largest(cfg, task), []
  for variant in view.variants(task):
    facts = view.facts(task, variant)
    sizes = (f'{facts[x]:,}' for x in ('parameters', 'cache_floats'))
    estimates = (view.accuracy(task, variant, x) for x in ({}, limits))
    by_seed = ' '.join(f'{x:.2f}' for x in view.seeds(task, variant, limits))
    rows.append((variant, *sizes, *map(format_estimate, estimates), by_seed))
  return rows
