"""Sizes and work of models, from their shapes: nothing is allocated.

  python -m launch.calc --preset=qwen3_next:80b_a3b,kimi_linear:48b_a3b \
    --context=4096,32768,1048576

prints parameters, bytes of weights, the decoding cache by layer kind at each
context, what it saves against the same model with attention in every layer and
from how many tokens on, and the operations of a token; several presets also
side by side. A preset is FAMILY:SIZE of configs/, or a path as for --config.

A model with other numbers:

  python -m launch.calc --preset=qwen3_next:80b_a3b --ratio=7 \
    --attention=kv_heads=4 --recurrent=KDA,heads=32,key_dim=128,value_dim=128

A word without '=' replaces the mixer by one of that kind; fields alone change
the model's own.

  python -m launch.calc --html=calc.html

also writes a page with sliders for all of this; it needs no network.
"""

import os

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError, preset_names, ranges
from deltanet_jax.lab.cost import arguments

DTYPES = {
  'bfloat16': 'bfloat16', 'float32': 'float32', 'float8': 'float8_e4m3fn'
}  # fmt: skip

PRESET = flags.DEFINE_list(
  'preset', ['qwen3_next:80b_a3b'], 'Names in configs/, or paths.'
)
CONTEXT = flags.DEFINE_list(
  'context', ['4096', '32768', '1048576'], 'Tokens of a sequence.'
)
BATCH = flags.DEFINE_integer(
  'batch', 1, 'Sequences.', lower_bound=1, upper_bound=ranges.LARGEST_INT
)
DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', list(DTYPES), 'Of the weights and the cache.'
)
STATE_DTYPE = flags.DEFINE_enum(
  'state_dtype', 'float32', ['float32', 'bfloat16'],
  'Of the recurrent states; the models here keep float32.',
)  # fmt: skip
LAYERS = flags.DEFINE_integer(
  'layers', None, 'Another number of layers.', lower_bound=1
)
RATIO = flags.DEFINE_string(
  'ratio', None, 'Recurrent layers to attention: 3, 3:1, 20:7; 0: attention.'
)
ATTENTION = flags.DEFINE_list(
  'attention', [], 'Fields of the attention layers, as kv_heads=4.'
)
RECURRENT = flags.DEFINE_list(
  'recurrent', [], 'Fields of the recurrent layers, as value_heads=16.'
)
JSON = flags.DEFINE_string('json', None, 'File for all the numbers.')
PNG = flags.DEFINE_string('png', None, 'Plot of the cache against context.')
HTML = flags.DEFINE_string('html', None, 'Interactive page.')


@command.as_main()
def main(_):
  contexts = command.read_numbers(
    CONTEXT, 1, ranges.LARGEST_INT,  # positions are numbers of a device
    f'give numbers of tokens from 1 to {ranges.LARGEST_INT:,}, as 4096 or'
    ' 4096,32768',
  )  # fmt: skip
  ratio = arguments.parse_ratio(RATIO.value)
  given = [(x, config.load(x).model) for x in PRESET.value]
  cfgs = {preset_names.label_preset(x): cfg for x, cfg in given}
  if not cfgs:
    raise ConfigError('--preset= names nothing; give names, as qwen3:8b')
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

    write_text(paths['html'], page.build_page(next(iter(models))))
  return 0


if __name__ == '__main__':
  main()
