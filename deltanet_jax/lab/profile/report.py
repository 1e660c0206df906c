"""What was measured, as tables, CSV and plots."""

import csv
import io

from deltanet_jax.config.mixers import ATTENTION
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.profile import fit
from deltanet_jax.lab.profile.plan import STEPS

MIB = 2**20


class Table:
  """Records by model, quantity and context."""

  def __init__(self, records):
    self.records = records
    self.models = list(dict.fromkeys(r['model'] for r in records))
    self.contexts = sorted({r['context'] for r in records})
    self._by = {(r['model'], r['what'], r['context']): r for r in records}

  def __getitem__(self, key):
    """The record of (model, what, context), or None where it was not run."""
    record = self._by.get(key)
    return record if record and record['seconds'] else None

  def series(self, model, what):
    """(contexts, median seconds) of the cells that ran."""
    ran = [self[model, what, n] for n in self.contexts]
    ran = [r for r in ran if r]
    return (
      [r['context'] for r in ran],
      [fit.estimate_median(r['seconds']).value for r in ran],
    )


def find_pairs(cfgs):
  """(model, its all-attention twin) for the models whose twin is there."""
  pairs = []
  for name, cfg in cfgs.items():
    try:
      twin = calc.make_attention_twin(cfg)
    except ValueError:
      continue
    # a period of equal layers may be written with another number of repeats
    same = [
      n
      for n, c in cfgs.items()
      if n != name and (c.layers, c.d_model) == (twin.layers, twin.d_model)
    ]
    pairs += [(name, same[0])] if same else []
  return pairs


def format_text(settings, cfgs, records, where):
  """The page to read, in Markdown."""
  t = Table(records)
  first = t.models[0]
  lines = [
    '# Cost against context',
    '',
    f'{where["machine"]}, jax {where["jax"]}, {settings.dtype};'
    f' {settings.rounds} rounds in turns, medians; intervals are of 95%.',
  ]
  if where['platform'] == 'cpu':
    lines.append('On a CPU only ratios between models mean anything.')
  over = f'; below it, over {first}'
  sections = (
    ('Prefill to the first token, ms' + over, 'prefill', _seconds, first),
    (
      f'Decoding, ms a token (the last {STEPS} of the context)' + over,
      'decode', _seconds, first,
    ),
    (
      f'Tokens a second with as many sequences as fit {settings.budget_gib:g}'
      f' GiB with the parameters, at most {settings.max_batch}; below it, how'
      ' many (+: more would fit)',
      'largest', _throughput, None,
    ),
    (
      'Cache of one sequence, MiB: measured, equal to the calculated' + over,
      'restore', lambda r: r['cache_bytes'] / MIB, first,
    ),
    (
      'Peak of the decoding program at batch 1, MiB, with parameters' + over,
      'decode', lambda r: r['program_bytes'] / MIB, first,
    ),
    (
      'Peak of the prefill program, MiB, with parameters' + over,
      'prefill', lambda r: r['program_bytes'] / MIB, first,
    ),
    (
      'A saved cache back to the device, ms; below it, over its prefill',
      'restore', _seconds, None,
    ),
  )  # fmt: skip
  for title, what, value, base in sections:
    lines += ['', f'## {title}', '', *_grid(t, what, value, base)]
  lines += ['', '## Fits', '', *_fits(t), '', *_compared(t, cfgs, settings)]
  skipped = _skipped(records)
  if skipped:
    lines += ['', '## Not run', '', *skipped]
  return '\n'.join(lines) + '\n'


def _seconds(record):
  return fit.estimate_median(record['seconds']).value * 1e3


def _throughput(record):
  return record['batch'] / fit.estimate_median(record['seconds']).value


def _grid(t, what, value, base):
  """Models down, contexts across; a second line a model for what belongs to
  it: the ratio over `base`, the batch, or the ratio over the prefill."""
  head = '| tokens |' + ''.join(f' {n:,} |' for n in t.contexts)
  lines = [head, '|---|' + '---:|' * len(t.contexts)]
  for model in t.models:
    cells, below = [], []
    for n in t.contexts:
      record = t[model, what, n]
      cells.append(_number(value(record)) if record else '-')
      below.append(_below(t, record, value, base))
    lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
    if model != base:
      lines.append('| | ' + ' | '.join(below) + ' |')
  return lines


def _below(t, record, value, base):
  if not record:
    return ''
  what, n = record['what'], record['context']
  if what == 'largest':
    return f'{record["batch"]}{"+" if record["capped"] else ""}'
  other = t[record['model'], 'prefill', n] if base is None else t[base, what, n]
  if not other:
    return ''
  return f'x{_number(value(record) / value(other))}'


def _number(x):
  if x >= 100:
    return f'{x:,.0f}'
  return f'{x:.1f}' if x >= 10 else f'{x:.2g}' if x < 1 else f'{x:.2f}'


def fit_lines(t):
  """{model: fit.FittedLine} of decoding, with two contexts or more."""
  series = {model: t.series(model, 'decode') for model in t.models}
  return {m: fit.fit_line(*s) for m, s in series.items() if len(s[0]) > 1}


def _fits(t):
  rows = [
    '| | prefill ~ tokens^e: e | e, last two contexts | decoding: w, ms |'
    ' a, ms / 1,000 tokens | off the line by |',
    '|---|---|---|---|---|---|',
  ]
  decode = fit_lines(t)
  for model in t.models:
    x, y = t.series(model, 'prefill')
    cells = ['-', '-']
    if len(x) > 1:
      cells = [
        f.text() for f in (fit.fit_power(x, y), fit.fit_power(x[-2:], y[-2:]))
      ]
    if model in decode:
      f = decode[model]
      scaled = lambda e, by: fit.Estimate(*(v * by for v in e))
      cells += [
        scaled(f.w, 1e3).text('{:.3g}'),
        scaled(f.a, 1e6).text('{:.3g}'),
        f'{f.worst:.0%}',
      ]
    else:
      cells += ['-'] * 3
    rows.append(f'| {model} | ' + ' | '.join(cells) + ' |')
  return [
    *rows,
    '',
    'Decoding time is w + a x context: w reads the weights and the states, a'
    ' the cache of a token. Time in milliseconds.',
  ]


def _compared(t, cfgs, settings):
  """What each hybrid saves beside the same model with attention alone."""
  out, decode = [], fit_lines(t)
  for name, twin in find_pairs(cfgs):
    layers = cfgs[name].layers
    attending = sum(isinstance(x.mixer, ATTENTION) for x in layers)
    out += [
      f'**{name} beside {twin}** ({attending} of {len(layers)} layers attend)'
    ]
    n = calc.find_break_even(cfgs[name], 1, settings.dtype)
    where = f'from {n:,} tokens on' if n else 'at no context'
    out.append(f'- The cache is smaller {where}.')
    for what, label in (('decode', 'a token'), ('prefill', 'the first token')):
      both = [n for n in t.contexts if t[name, what, n] and t[twin, what, n]]
      if both:
        speed = _seconds(t[twin, what, both[-1]])
        speed /= _seconds(t[name, what, both[-1]])
        out.append(
          f'- At {both[-1]:,} tokens {label} comes {speed:.2f} times as fast.'
        )
    both = [
      n for n in t.contexts if t[name, 'largest', n] and t[twin, 'largest', n]
    ]
    if both:
      mine, other = t[name, 'largest', both[-1]], t[twin, 'largest', both[-1]]
      out.append(
        f'- At {both[-1]:,} tokens and the largest batches ({mine["batch"]} and'
        f' {other["batch"]}) it makes'
        f' {_throughput(mine) / _throughput(other):.2f} times the tokens.'
      )
    out.append(
      _slopes(decode.get(twin), decode.get(name), len(layers) / attending)
    )
    out.append('')
  return out


def _slopes(twin, hybrid, layers):
  if twin is None or hybrid is None:
    return '- Slopes of decoding: not resolved, with fewer than two contexts.'
  slopes = fit.compare_slopes(twin, hybrid)
  if slopes is None:
    return '- Slopes of decoding: not resolved; one is within its error of 0.'
  return (
    f'- A token of context costs {slopes.text()} times less to decode; the'
    f' ratio of the layers that attend is {layers:.2f}.'
  )


def _skipped(records):
  return [
    f'- {r["model"]} {r["what"]} at {r["context"]:,}: {r["skipped"]}'
    for r in records
    if r['skipped']
  ]


def format_csv(records):
  """A row a cell: medians in seconds of a prompt, a token or a copy."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  names = (
    'model', 'what', 'context', 'batch', 'capped', 'cache_bytes',
    'program_bytes', 'device_peak_bytes', 'skipped',
  )  # fmt: skip
  writer.writerow((*names, 'rounds', 'median', 'low', 'high'))
  for r in records:
    samples = r['seconds']
    estimate = fit.estimate_median(samples) if samples else ('', '', '')
    writer.writerow((*(r[n] for n in names), len(samples), *estimate))
  return file.getvalue()
