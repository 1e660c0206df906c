"""The results of `launch.calc`: records of models as text, JSON and a plot."""

import collections
import math
import pathlib
from typing import NamedTuple

import jax.numpy as jnp

from deltanet_jax.config import files
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.pages import render_page

TWINS = {'all_attention': 'all attention', 'all_recurrent': 'all recurrent'}


class CostSettings(NamedTuple):
  contexts: tuple[int, ...]  # tokens
  batch: int
  dtype: str  # of keys, values, latents, convolution inputs and weights
  state_dtype: str


def measure_model(name, cfg, settings):
  """The record of a model for JSON.

  A twin is null if the model has no attention or no recurrent layer, and so are
  comparisons with it.
  """
  parameters = calc.count_parameters(cfg)
  record = {
    'name': name,
    'layers': count_kinds(cfg),
    'd_model': cfg.d_model,
    'parameters': parameters,
    'active_parameters': calc.count_active_parameters(cfg),
    'weight_bytes': parameters * jnp.dtype(settings.dtype).itemsize,
    **measure_costs(cfg, settings),
    'all_attention': _twin(cfg, calc.make_attention_twin, settings),
    'all_recurrent': _twin(cfg, calc.make_recurrent_twin, settings),
    'saved': None,
    'saved_in_the_limit': None,
    'break_even': None,
  }
  if record['all_attention']:
    how = settings.batch, settings.dtype, settings.state_dtype
    record |= {
      'saved': [calc.compute_saving(cfg, n, *how) for n in settings.contexts],
      'saved_in_the_limit': calc.compute_saving(cfg, None, *how),
      'break_even': calc.find_break_even(cfg, *how),
    }
  return record


def _twin(cfg, make, settings):
  try:
    twin = make(cfg)
  except ValueError:
    return None
  return measure_costs(twin, settings)


def measure_costs(cfg, settings):
  """Cache bytes, and FLOP per token at every context."""
  return {
    'cache': measure_cache(cfg, settings),
    'flops_per_token': {
      'forward': [calc.count_flops(cfg, n) for n in settings.contexts],
      'decode': [calc.count_decoding_flops(cfg, n) for n in settings.contexts],
    },
  }


def measure_cache(cfg, settings):
  """Bytes of the cache, in total and by mixer and part: per token beyond the
  longest context, constant, and the sum at every context."""
  last = max(settings.contexts)
  sizes = (0, *settings.contexts, last, last + 1)
  how = settings.batch, settings.dtype, settings.state_dtype
  at = [calc.count_cache_parts(cfg, n, *how) for n in sizes]

  def row(of):
    constant, *sums, before, after = (of(sizes) for sizes in at)
    return {'per_token': after - before, 'constant': constant, 'at': sums}

  every = lambda sizes: sum(sum(parts.values()) for parts in sizes.values())
  return {
    'total': row(every),
    'parts': {
      name: {part: row(lambda x, n=name, p=part: x[n][p]) for part in parts}
      for name, parts in at[0].items()
    },
  }


def format_json(records, settings):
  return files.format_json({'settings': settings._asdict(), 'models': records})


def format_text(records, settings):
  """The tables of every model, and of several side by side."""
  parts = [_model(record, settings) for record in records]
  if len(records) > 1:
    parts.append(_beside(records, settings))
  return '\n\n'.join(parts)


def format_size(n):
  """'842.0 MiB'"""
  power = min(4, max(0, (max(n, 1).bit_length() - 1) // 10))
  if not power:
    return f'{n} B'
  unit = 1024**power
  tenths = (20 * n + unit) // (2 * unit)  # rounds half up, as the page does
  return f'{tenths / 10:.1f} {("KiB", "MiB", "GiB", "TiB")[power - 1]}'


def count_kinds(cfg):
  """{'GatedDeltaNet': 36, 'Attention': 12}"""
  return dict(collections.Counter(calc.name_kind(x.mixer) for x in cfg.layers))


def format_kinds(layers):
  """'36 GatedDeltaNet + 12 Attention' of the result of `count_kinds`."""
  return ' + '.join(f'{n} {kind}' for kind, n in layers.items())


def describe_saving(record):
  """A sentence on the saving against attention in every layer."""
  if record['all_attention'] is None:
    return 'No attention layer: the cache does not grow with the context.'
  if record['all_recurrent'] is None:
    return 'No recurrent layer: every layer caches every token.'
  if record['break_even'] is None:
    return 'Never smaller than with attention in every layer.'
  return (
    f'Smaller than with attention in every layer from'
    f' {record["break_even"]:,} tokens on, by up to'
    f' {record["saved_in_the_limit"]:.1%} for long contexts.'
  )


def _model(record, settings):
  known = all(record[key] for key in TWINS)
  return render_page(
    pathlib.Path(__file__).with_name('model.txt.jinja'),
    record=record, settings=settings, line=_line, size=format_size,
    count='{:,}'.format, giga=_giga,
    kinds=format_kinds(record['layers']), saving=describe_saving(record),
    twins=[(label, record[key]) for key, label in TWINS.items() if known],
  ).rstrip('\n')  # fmt: skip


def _giga(n):
  x = n / 1e9
  return f'{x:,.2f}' if x >= 1 else f'{x:.2g}'


def _line(label, values, show, per_token='', constant=''):
  """values: at every context, formatted by `show`"""
  cells = ''.join(f'{show(value):>11}' for value in values)
  return f'  {label:28}{per_token:>10}{constant:>13}{cells}'.rstrip()


def _beside(records, settings):
  width = max(18, *(len(record['name']) + 2 for record in records))
  line = lambda label, values: (
    f'  {label:30}' + ''.join(f'{value:>{width}}' for value in values)
  )
  number = lambda x: '-' if x is None else f'{x:,}'
  share = lambda x: '-' if x is None else f'{x:.1%}'
  lines = ['Side by side', line('', (x['name'] for x in records))]
  add = lambda label, of: lines.append(line(label, map(of, records)))
  add('layers', lambda x: number(sum(x['layers'].values())))
  add('parameters', lambda x: number(x['parameters']))
  add('  active per token', lambda x: number(x['active_parameters']))
  total = lambda x: x['cache']['total']
  add('cache, B / token', lambda x: number(total(x)['per_token']))
  add('cache, constant B', lambda x: number(total(x)['constant']))
  for i, n in enumerate(settings.contexts):
    add(f'cache at {n:,}', lambda x, i=i: format_size(total(x)['at'][i]))
  for i, n in enumerate(settings.contexts):
    of = lambda x, i=i: share(x['saved'] and x['saved'][i])
    add(f'smaller by, at {n:,}', of)
  add('  for long contexts', lambda x: share(x['saved_in_the_limit']))
  add('  from tokens', lambda x: number(x['break_even']))
  for way, name in (('forward', 'prefill'), ('decode', 'decode')):
    for i, n in enumerate(settings.contexts):
      of = lambda x, i=i, way=way: _giga(x['flops_per_token'][way][i])
      add(f'{name} GFLOP/token at {n:,}', of)
  return '\n'.join(lines)


def draw_cache(cfgs, settings, path):
  """Draws the cache against context for every (name, ModelConfig), beside its
  all-attention and all-recurrent twins; marks the break-even."""
  from deltanet_jax.lab import plots

  figure, panels = plots.make_figure(
    (1 + 5.2 * len(cfgs), 4.8), len(cfgs), share_y=True
  )
  how = settings.batch, settings.dtype, settings.state_dtype
  top = max(2**20, *settings.contexts)
  steps = 4 * int(math.log2(top / 64))
  contexts = [round(64 * 2 ** (i / 4)) for i in range(steps + 1)]
  for axes, (name, cfg) in zip(panels, cfgs, strict=True):
    lines = list(list_lines(cfg))
    for label, color, model in lines:
      sizes = [calc.count_total_bytes(model, n, *how) for n in contexts]
      axes.plot(contexts, sizes, color=color, lw=2 if label == 'model' else 1.3)
      axes.annotate(
        label, (contexts[-1], sizes[-1]), (6, 0), textcoords='offset points',
        color=color, va='center', fontsize=9,
      )  # fmt: skip
    cross = len(lines) > 1 and calc.find_break_even(cfg, *how)
    if cross:
      there = cross, calc.count_total_bytes(cfg, cross, *how)
      axes.plot(*there, 'o', color='0.2', ms=5)
      axes.annotate(
        f'{cross:,} tokens', there, (8, -10), textcoords='offset points',
        fontsize=9,
      )  # fmt: skip
    axes.set(title=name, xscale='log', yscale='log', xlabel='tokens')
    axes.set_xlim(contexts[0], contexts[-1])
    plots.style_axes(axes)
  panels[0].set_ylabel('bytes of cache')
  figure.suptitle(
    f'batch {settings.batch}, {settings.dtype}, states {settings.state_dtype}',
    fontsize=10,
  )
  plots.save_figure(figure, path)


def list_lines(cfg):
  """(label, color, ModelConfig) of the lines of a plot."""
  hybrid = all(calc.find_mixer(cfg, recurrent=x) for x in (True, False))
  if hybrid:
    yield 'all attention', '#b3541e', calc.make_attention_twin(cfg)
  yield 'model', '#1f6f78', cfg
  if hybrid:
    yield 'all recurrent', '0.45', calc.make_recurrent_twin(cfg)
