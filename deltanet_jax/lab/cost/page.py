"""The calculator as one HTML file: no network, no library.

Its script multiplies and adds the axes of cache arrays, which come from here.
Each axis of each mixer's arrays is traced to a configuration field, the batch
or the context by giving these distinct values and looking at the shapes.
"""

import dataclasses
import fractions
import itertools
import json
import pathlib

from deltanet_jax import config
from deltanet_jax.config import preset_names
from deltanet_jax.lab.cost import arguments, calc

FOLDER = pathlib.Path(__file__).parent / 'page'
SCRIPTS = 'model.js', 'controls.js', 'draw.js'  # in this order

# fields that sizes depend on: (label, largest value on the page, a value that
# no other axis has)
FIELDS = {
  'heads': ('Heads', 256, 6000),
  'kv_heads': ('Key-value heads', 256, 3000),
  'head_dim': ('Head width', 512, 1000),
  'key_heads': ('Key heads', 256, 1500),
  'value_heads': ('Value heads', 256, 4500),
  'key_dim': ('Key width', 512, 2000),
  'value_dim': ('Value width', 512, 2500),
  'latent': ('Latent width', 2048, 3500),
  'shared_dim': ('Shared key width', 256, 400),
  'index_dim': ('Indexer key width', 512, 700),
}
CONTEXT, BATCH = 100_000, 17

# the first must divide the second
DIVIDES = {'kv_heads': 'heads', 'key_heads': 'value_heads'}

# a recurrent mixer of each kind, for models that have none
NEW = {
  'GatedDeltaNet': {
    'key_heads': 16, 'value_heads': 32, 'key_dim': 128, 'value_dim': 128
  },
  'KDA': {'heads': 32, 'key_dim': 128, 'value_dim': 128},
  'DeltaNet': {'heads': 32, 'key_dim': 128, 'value_dim': 128},
  'Lightning': {'heads': 32, 'head_dim': 128},
  'LinearAttention': {'heads': 32, 'key_dim': 128, 'value_dim': 128},
}  # fmt: skip


def build_page(start):
  """The text of the page; it opens at the preset `start` if it can show it."""
  data = {
    'start': start,
    'presets': list_models(),
    'former': preset_names.list_former(),
    'new': {
      name: describe_mixer(arguments.KINDS[name](**fields))
      for name, fields in NEW.items()
    },
    'fields': {
      name: {'label': label, 'divides': DIVIDES.get(name)}
      for name, (label, _, _) in FIELDS.items()
    },
  }
  if start not in data['presets']:
    data['start'] = next(iter(data['presets']))
  read = lambda name: (FOLDER / name).read_text()
  text = read('page.html')
  for mark, content in (
    ('/* style */', read('style.css')),
    ('/* data */', json.dumps(data, separators=(',', ':'))),
    ('/* script */', '\n'.join(map(read, SCRIPTS))),
  ):
    text = text.replace(mark, content, 1)
  return text


def list_models():
  """The presets that the page can show, hybrids first: one kind of attention
  without a window, at most one kind of recurrent layer."""
  models = {}
  for name in preset_names.list_presets():
    cfg = config.load(name).model
    mixers = dict.fromkeys(layer.mixer for layer in cfg.layers)
    attention = calc.find_mixer(cfg, recurrent=False)
    recurrent = calc.find_mixer(cfg, recurrent=True)
    known = {attention, recurrent}
    window = getattr(attention, 'window', None)
    if attention is None or set(mixers) - known or window:
      continue
    attends = sum(layer.mixer == attention for layer in cfg.layers)
    ratio = fractions.Fraction(len(cfg.layers) - attends, attends)
    models[name] = {
      'about': preset_names.describe_preset(name),
      'layers': len(cfg.layers),
      'ratio': list(ratio.as_integer_ratio()),
      'attention': describe_mixer(attention),
      'recurrent': recurrent and describe_mixer(recurrent),
    }
  hybrid = lambda name: models[name]['recurrent'] is None
  return {name: models[name] for name in sorted(models, key=hybrid)}


def describe_mixer(mixer):
  """The kind of a mixer, its cache arrays, and the fields they depend on.

  An array: its part (`calc.count_cache_parts`) and its axes, each a number or
  [name, number to add]. A field: its value and its range.
  """
  parts = zip(calc.list_cache_parts(mixer), _axes(mixer), strict=True)
  arrays = [{'part': part, 'axes': axes} for part, axes in parts]
  _check(mixer, arrays)
  used = {x[0] for array in arrays for x in array['axes'] if type(x) is list}
  used |= {DIVIDES[name] for name in used if name in DIVIDES}
  fields = {name: getattr(mixer, name) for name in FIELDS if name in used}
  return {
    'kind': calc.name_kind(mixer),
    'fields': fields,
    'ranges': _ranges(mixer, fields),
    'arrays': arrays,
  }


def _ranges(mixer, fields):
  """[least, most, step] of each field, whatever the other fields are; the page
  keeps those of DIVIDES multiples of each other."""
  ranges, free = {}, {*DIVIDES, *DIVIDES.values()}
  for name in fields:
    values = range(1, FIELDS[name][1] + 1)
    if name not in free:
      values = [x for x in values if _takes(mixer, **{name: x})]
    ranges[name] = [values[0], values[-1], values[1] - values[0]]
  for low, high in itertools.permutations(fields.keys() - free, 2):
    ends = {low: ranges[low][0], high: ranges[high][1]}
    if not _takes(mixer, **ends):
      ranges[high][1] = fields[high]
  return ranges


def _takes(mixer, **changes):
  try:
    dataclasses.replace(mixer, **changes)
  except ValueError:
    return False
  return True


def _axes(mixer):
  probes = {name: FIELDS[name][2] for name in FIELDS if hasattr(mixer, name)}
  probe = dataclasses.replace(mixer, **probes)
  probes |= {'context': CONTEXT, 'batch': BATCH}

  def name(size):
    close = [x for x, value in probes.items() if abs(value - size) <= 1]
    return [close[0], size - probes[close[0]]] if close else size

  shapes = calc.infer_cache_shapes(probe, CONTEXT, BATCH)
  return [[name(size) for size in x.shape] for x in shapes]


def _check(mixer, arrays):
  """Checks that the axes give the shapes of the cache."""
  values = {name: getattr(mixer, name, None) for name in FIELDS}
  values |= {'context': 4099, 'batch': 5}
  size = lambda x: x if isinstance(x, int) else values[x[0]] + x[1]
  shapes = calc.infer_cache_shapes(mixer, values['context'], values['batch'])
  for array, x in zip(arrays, shapes, strict=True):
    if tuple(map(size, array['axes'])) != x.shape:
      raise ValueError(
        f'{calc.name_kind(mixer)}: the axes {array["axes"]} are not those of'
        f' its cache {x.shape}; add the field that they depend on to FIELDS'
      )
