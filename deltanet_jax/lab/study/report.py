"""What a study found: findings, a verdict in words, summary.md, report.html."""

import dataclasses
import pathlib
from typing import NamedTuple

import jinja2

from deltanet_jax.config.files import write_text
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.study import expect, plots, stats
from deltanet_jax.lab.study.config import ARMS, parse_arm

LONG = 131_072  # tokens at which memory is compared too


class Report(NamedTuple):
  text: str  # to print
  status: int  # 1: a gate failed


def write_report(cfg, size, cells, folder, rows):
  """Draws, judges and writes everything; the cells that `folder` lacks are
  named as missing."""
  done = [cell for cell in cells if folder.done(cell)]
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
  verdict = describe_hybrids(cfg, view)
  missing = [cell.name for cell in cells if cell not in done]
  remarks = describe_unlearned(view)
  if failed:
    remarks.append(f'Not finite at any learning rate: {", ".join(failed)}.')
  if missing:
    remarks.append(f'Not trained yet: {", ".join(missing)}.')
  text = format_markdown(cfg, view, findings, [*verdict, *remarks])
  write_text(folder.text, text)
  images = plots.draw_plots(view, folder.plots)
  sentences = [*verdict, *_counts(findings)]
  page = _page(cfg, size, view, findings, sentences, remarks, images)
  write_text(folder.report, page)
  gates = [f for f in findings if f.failed]
  lines = [*verdict, *remarks, *_counts(findings)]
  lines += [f'FAILED: {f.claim}: {format_estimate(f.estimate)}' for f in gates]
  lost = size == 'smoke' and len(findings) < len(expectations) and not missing
  if lost:
    lines.append('FAILED: a model of the gates was not finite')
  lines.append(str(folder.report))
  return Report('\n'.join(lines), int(bool(gates) or lost))


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
  lost, equal, gained, open_ = [], [], [], []
  for task in tasks:
    limits = expect.limit_to_hardest(cfg, task)
    parts = []
    for sign, name in ((1, arm), (-1, _base(view, task))):
      data = view.arrays[task, name]
      chosen = stats.choose_questions(data, limits)
      parts.append(stats.make_part(sign, task, data, chosen))
    e = stats.estimate_sum(parts, cfg.draws)
    base = parts[1].right.sum() / parts[1].questions.sum()
    clause = f'{task} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]'
    clause += f' of {base:.2f}'
    if e.within(expect.MARGIN) == stats.HOLDS:
      equal.append(clause)
    elif e.above(0) == stats.HOLDS:
      gained.append(clause)
    elif e.above(0) == stats.VIOLATED:
      lost.append(clause)
    else:
      open_.append(clause)
  kinds = (
    ('gave up', lost), ('gained', gained),
    (f'was equal within {expect.MARGIN:g} on', equal),
    ('is not resolved on', open_),
  )  # fmt: skip
  clauses = '; '.join(f'{k} {", ".join(x)}' for k, x in kinds if x)
  saved = _saved(cfg, view, arm, tasks[0])
  return f'Against full attention, {arm} {clauses}. {saved}'


def _saved(cfg, view, arm, task):
  """What decoding keeps, at the length trained on and at LONG tokens."""
  cell = next(
    {'layers': r['layers'], 'vocab': r['vocab'], 'length': r['length']}
    for r in view.rows
    if (r['task'], r['model']) == (task, arm)
  )
  floats = lambda name, n: count_cache_floats(cfg, name, cell, n)
  clauses = []
  for n in (cell['length'], LONG):
    mine, full = floats(arm, n), floats('full', n)
    less = f'{mine / full - 1:+.0%}'
    clauses.append(f'{mine:,} numbers of {n:,} tokens, full {full:,} ({less})')
  meet = find_break_even(lambda n: floats(arm, n) - floats('full', n))
  least = f' It saves from {meet:,} tokens on.' if meet else ''
  return f'It keeps {"; ".join(clauses)}.{least}'


def count_cache_floats(cfg, arm, cell, context):
  """Numbers that decoding keeps of `context` tokens."""
  from deltanet_jax.lab.study import config

  built = config.make_model(cfg, arm, cell['vocab'], cell['layers'], cfg.hidden)
  return sum(calc.count_cache_bytes(built, context, 1, 'float32').values()) // 4


def find_break_even(difference, most=1 << 20):
  """The least context at which difference(context) <= 0; None above most."""
  low, high = 0, 1
  while difference(high) > 0:
    low, high = high, high * 2
    if high > most:
      return None
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if difference(middle) > 0 else (low, middle)
  return high


def list_results(cfg, view, task):
  """[(model, parameters, numbers kept, Estimate all, Estimate hardest, its
  accuracy by seed)]."""
  limits = expect.limit_to_hardest(cfg, task)
  return [
    (
      arm, view.fact(task, arm, 'parameters'),
      view.fact(task, arm, 'cache_floats'),
      view.accuracy(task, arm, {}), view.accuracy(task, arm, limits),
      view.seeds(task, arm, limits),
    )
    for arm in view.arms(task)
  ]  # fmt: skip


HEAD = (
  'model', 'parameters', 'numbers kept', 'accuracy', 'hardest size', 'by seed'
)  # fmt: skip


def _cells(row):
  by_seed = ' '.join(f'{x:.2f}' for x in row[5])
  estimates = format_estimate(row[3]), format_estimate(row[4]), by_seed
  return row[0], f'{row[1]:,}', f'{row[2]:,}', *estimates


def _tables(cfg, view):
  """{task: rows of HEAD's cells}"""
  tasks = dict.fromkeys(task for task, _ in view.arrays)
  return {
    task: [_cells(row) for row in list_results(cfg, view, task)]
    for task in tasks
  }


def format_markdown(cfg, view, findings, sentences):
  """summary.md."""
  lines = ['# Recall against memory', '']
  lines += [f'{s}\n' for s in sentences] + _counts(findings)
  lines += ['', '| expectation | value [95 %] | verdict |', '|---|---|---|']
  lines += [
    f'| {f.claim} | {format_estimate(f.estimate)} | {f.verdict} |'
    for f in findings
  ]
  for task, rows in _tables(cfg, view).items():
    lines += ['', f'## {task}', '']
    lines += [f'| {" | ".join(HEAD)} |', '|---' * len(HEAD) + '|']
    lines += [f'| {" | ".join(cells)} |' for cells in rows]
  return '\n'.join(lines) + '\n'


def _page(cfg, size, view, findings, sentences, remarks, figures):
  """report.html, from the template beside this file."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
  )  # fmt: skip
  environment.filters['show'] = format_estimate
  sizes = ', '.join(
    f'{f.name} {getattr(cfg, f.name)}' for f in dataclasses.fields(cfg)
  )
  return environment.get_template('report.html.jinja').render(
    cfg=cfg, size=size, sentences=sentences, remarks=remarks,
    findings=findings, figures=figures, head=HEAD, tables=_tables(cfg, view),
    sizes=sizes, margin=f'{expect.MARGIN:g}',
  )  # fmt: skip
