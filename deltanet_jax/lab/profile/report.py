"""Tables and CSV of what was measured."""

import csv
import functools
import io
import pathlib

from deltanet_jax.config.mixers import ATTENTION
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.pages import render_page
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
    """(contexts, median seconds) of the contexts that ran."""
    ran = [self[model, what, n] for n in self.contexts]
    ran = [r for r in ran if r]
    return (
      [r['context'] for r in ran],
      [fit.estimate_median(r['seconds']).value for r in ran],
    )


def find_pairs(cfgs):
  """[(model, its all-attention twin)] of the models whose twin was measured."""
  pairs = []
  for name, cfg in cfgs.items():
    try:
      twin = calc.make_attention_twin(cfg)
    except ValueError:
      continue
    # equal layers may be written with another number of repeats
    size = lambda cfg: (cfg.layers, cfg.d_model)
    same = [n for n in cfgs if n != name and size(cfgs[n]) == size(twin)]
    pairs += [(name, same[0])] if same else []
  return pairs


def format_text(settings, cfgs, records, where):
  """The report in Markdown."""
  t = Table(records)
  return render_page(
    pathlib.Path(__file__).with_name('summary.md.jinja'),
    settings=settings, where=where, steps=STEPS, models=t.models,
    contexts=[f'{n:,}' for n in t.contexts],
    cells=functools.partial(_cells, t), below=functools.partial(_below, t),
    fits=functools.partial(_fits, t),
    hybrids=[_compare(t, cfgs, settings, *x) for x in find_pairs(cfgs)],
    milliseconds=compute_milliseconds, throughput=compute_throughput,
    cache_mib=compute_cache_mib, program_mib=compute_program_mib,
    skipped=[r for r in records if r['skipped']],
  )  # fmt: skip


def compute_milliseconds(record):
  return fit.estimate_median(record['seconds']).value * 1e3


def compute_throughput(record):
  return record['batch'] / fit.estimate_median(record['seconds']).value


def compute_cache_mib(record):
  return record['cache_bytes'] / MIB


def compute_program_mib(record):
  return record['program_bytes'] / MIB


def _cells(t, model, what, value):
  ran = (t[model, what, n] for n in t.contexts)
  return [_number(value(r)) if r else '-' for r in ran]


def _below(t, model, what, value, base):
  """The line below a row: the batch size of the largest batch, else the ratio
  to the model `base`, or to the prefill."""
  texts = []
  for n in t.contexts:
    record, text = t[model, what, n], ''
    other = t[base, what, n] if base else t[model, 'prefill', n]
    if record and what == 'largest':
      text = f'{record["batch"]}{"+" if record["capped"] else ""}'
    elif record and other:
      text = f'x{_number(value(record) / value(other))}'
    texts.append(text)
  return texts


def _number(x):
  if x >= 100:
    return f'{x:,.0f}'
  return f'{x:.1f}' if x >= 10 else f'{x:.2g}' if x < 1 else f'{x:.2f}'


def _fit_decoding(t, model):
  """A fit.FittedLine, or None with fewer than two contexts."""
  x, y = t.series(model, 'decode')
  return fit.fit_line(x, y) if len(x) > 1 else None


def _fits(t, model):
  """The row of a model in the table of fits."""
  (x, y), line = t.series(model, 'prefill'), _fit_decoding(t, model)
  cells = ['-'] * 5
  if len(x) > 1:
    powers = fit.fit_power(x, y), fit.fit_power(x[-2:], y[-2:])
    cells[:2] = [power.text() for power in powers]
  if line:
    scaled = lambda e, by: fit.Estimate(*(v * by for v in e)).text('{:.3g}')
    cells[2:] = [scaled(line.w, 1e3), scaled(line.a, 1e6), f'{line.worst:.0%}']
  return cells


def _compare(t, cfgs, settings, name, twin):
  """Compares a hybrid with its all-attention twin."""

  def last(what):
    """[(context, records)] of the longest context that both ran, or []."""
    both = [(n, t[name, what, n], t[twin, what, n]) for n in t.contexts]
    return [(n, mine, full) for n, mine, full in both if mine and full][-1:]

  layers = cfgs[name].layers
  lines = [_fit_decoding(t, model) for model in (twin, name)]
  return {
    'name': name,
    'twin': twin,
    'layers': len(layers),
    'attending': sum(isinstance(x.mixer, ATTENTION) for x in layers),
    'break_even': calc.find_break_even(cfgs[name], 1, settings.dtype),
    'last': {what: last(what) for what in ('decode', 'prefill', 'largest')},
    'resolved': all(lines),
    'slopes': fit.compare_slopes(*lines) if all(lines) else None,
  }


def format_csv(records):
  """A row per record: median seconds of a prompt, a token or a copy."""
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
