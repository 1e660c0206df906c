r"""Counts parameters, cache bytes and FLOP of models, from shapes alone.

  python -m launch.calc --preset=qwen3_next:80b_a3b,kimi_linear:48b_a3b \
    --context=4096,32768,1048576

prints parameters, bytes of weights, state and KV cache by kind of layer at each
context, the saving against the same model with attention in every layer, and
FLOP per token; several presets also side by side. A preset is FAMILY:SIZE (see
launch.presets) or a path as for --config.

To change a model:

  python -m launch.calc --preset=qwen3_next:80b_a3b --ratio=7 \
    --attention=kv_heads=4 --recurrent=KDA,heads=32,key_dim=128,value_dim=128

A name without '=' replaces the mixer by one of that kind; fields alone change
the mixer of the model.

  python -m launch.calc --html=calc.html

also writes an interactive page of the cache bytes; it needs no network.
"""

import os
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError, preset_names, ranges
from deltanet_jax.lab.cost import arguments

DTYPES = {
  'bfloat16': 'bfloat16', 'float32': 'float32', 'float8': 'float8_e4m3fn'
}  # fmt: skip

PRESET = flags.DEFINE_list(
  'preset', ['qwen3_next:80b_a3b'], 'Presets, or paths of your own.'
)
CONTEXT = flags.DEFINE_list(
  'context', ['4096', '32768', '1048576'], 'Tokens per sequence.'
)
BATCH = flags.DEFINE_integer(
  'batch',
  1,
  'Number of sequences.',
  lower_bound=1,
  upper_bound=ranges.LARGEST_INT,
)
DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', list(DTYPES), 'dtype of weights and cache.'
)
STATE_DTYPE = flags.DEFINE_enum(
  'state_dtype', 'float32', ['float32', 'bfloat16'],
  'dtype of recurrent states; the models here use float32.',
)  # fmt: skip
LAYERS = flags.DEFINE_integer(
  'layers', None, 'Number of layers. Default: that of the model.', lower_bound=1
)
RATIO = flags.DEFINE_string(
  'ratio',
  None,
  'Recurrent to attention layers: 3, 3:1, 20:7; 0: attention only.',
)
ATTENTION = flags.DEFINE_list(
  'attention', [], 'Fields of attention layers, such as kv_heads=4.'
)
RECURRENT = flags.DEFINE_list(
  'recurrent', [], 'Fields of recurrent layers, such as value_heads=16.'
)
JSON = flags.DEFINE_string('json', None, 'File to write all numbers to.')
PNG = flags.DEFINE_string(
  'png', None, 'File to plot cache bytes against context to.'
)
HTML = flags.DEFINE_string('html', None, 'File to write the page to.')


@command.as_main()
def main(_):
  contexts = command.read_numbers(
    CONTEXT, 1, ranges.LARGEST_INT,  # positions are int32
    f'give numbers of tokens from 1 to {ranges.LARGEST_INT:,}, such as 4096'
    ' or 4096,32768',
  )  # fmt: skip
  ratio = arguments.parse_ratio(RATIO.value)
  given = [(x, config.load(x).model) for x in PRESET.value]
  cfgs = {preset_names.label_preset(x): cfg for x, cfg in given}
  if not cfgs:
    raise ConfigError('--preset= is empty; give presets, such as qwen3:8b')
  changes = {
    name: {
      'layers': LAYERS.value,
      'ratio': ratio,
      'attention': arguments.change_mixer(cfg, ATTENTION.value, 'attention'),
      'recurrent': arguments.change_mixer(cfg, RECURRENT.value, 'recurrent'),
    }
    for name, cfg in cfgs.items()
  }
  paths = {flag.name: command.check_output(flag) for flag in (JSON, PNG, HTML)}
  # shapes need no accelerator, and starting one takes seconds
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.cost import calc, report

  settings = report.CostSettings(
    contexts, BATCH.value, DTYPES[DTYPE.value], STATE_DTYPE.value
  )
  with command.bad_input():
    models = {
      n: calc.resize_model(cfg, **changes[n]) for n, cfg in cfgs.items()
    }
  records = [report.measure_model(*x, settings) for x in models.items()]
  print(report.format_text(records, settings))
  if paths['json']:
    write_text(paths['json'], report.format_json(records, settings))
  if paths['png']:
    report.draw_cache(list(models.items()), settings, paths['png'])
  if paths['html']:
    from deltanet_jax.lab.cost import page

    text = command.spell_command(page.build_page(next(iter(models))))
    write_text(paths['html'], text)
  for path in filter(None, paths.values()):
    print(f'wrote {path}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  main()
