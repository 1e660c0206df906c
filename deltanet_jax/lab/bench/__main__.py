"""Times the forms of a recurrence, layers, training steps and generation.

  python -m launch.bench --op=delta_rule --length=4096

Every program is compiled and run once; then all run in turn. Columns "x" are
ratios to the first program. Temporary bytes are those of the compiled program;
a program that needs more than --memory_limit is not run.

  --peer=FILE.py:NAME

also times a function of your own (repeatable) and compares its output o with
that of the first form: NAME(q, k, v, beta, g, state=None) -> (o, final state),
without beta for linear_attention; q, k [B,T,J,K]   v [B,T,H,V]   beta, g
[B,T,H], for kda g [B,T,H,K].

Models, by --config (repeatable), in each of --forms:

  python -m launch.bench --what=step --config=small:gdn --length=512 --batch=8

--what=layer times every mixer of a model alone, forward and with gradients;
step a training step on all devices; prefill a prompt up to the first token;
decode one token of each sequence in a cache of --length tokens. The tables say
tokens per second, FLOP per second of the model's own products (three times
those forward for gradients, without recomputation), their share of the devices'
peak where it is known (MFU), and the memory of a program as XLA plans it.

Several numbers for one of --length, --batch and --heads show how time and
temporary bytes grow; --plot draws it.
"""

import difflib
import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError, forms

WHAT = flags.DEFINE_enum(
  'what', 'rule', ['rule', 'layer', 'step', 'prefill', 'decode'],
  'What to time.',
)  # fmt: skip
CONFIG = flags.DEFINE_multi_string(
  'config', [], 'Preset or file of a model, for all but rule; repeatable.'
)
OP = flags.DEFINE_string(
  'op', 'delta_rule', f'The recurrence: {", ".join(forms.FORMS)}.'
)
FORMS = flags.DEFINE_list(
  'forms', None,
  'Forms to time. Default: chunked,associative,recurrent, and auto for models.',
)  # fmt: skip
PEER = flags.DEFINE_multi_string(
  'peer', [], 'FILE.py:NAME of your own function to time; repeatable.'
)
LENGTH = flags.DEFINE_list('length', ['4096'], 'Tokens; one or more numbers.')
BATCH = flags.DEFINE_list('batch', ['1'], 'Sequences; one or more numbers.')
HEADS = flags.DEFINE_list(
  'heads', ['16'], 'Value heads of a rule; one or more numbers.'
)
KEY_HEADS = flags.DEFINE_integer(
  'key_heads', 0, 'Key heads; 0: as many as --heads.', lower_bound=0
)
DIM = flags.DEFINE_integer(
  'dim', 128, 'Width of a key and of a value.', lower_bound=1
)
CHUNK = flags.DEFINE_integer('chunk', 64, 'Tokens per chunk: 16, 32, 64, ...')
DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'dtype of all inputs but g and the state.',
)
ROUNDS = flags.DEFINE_integer(
  'rounds', 5, 'Timed runs of each program.', lower_bound=1
)
MEMORY_LIMIT = flags.DEFINE_float(
  'memory_limit', 8.0, 'Most GB of temporaries of a program that is run.',
  lower_bound=0.0,
)  # fmt: skip
JSON = flags.DEFINE_string('json', None, 'File to write all measurements to.')
PLOT = flags.DEFINE_string(
  'plot', None, 'PNG of time and memory by length, batch or heads.'
)

# names in papers and in flash-linear-attention
OTHER_NAMES = {
  'gdn': 'delta_rule (with g)',
  'gated_delta_rule': 'delta_rule (with g)',
  'gated_deltanet': 'delta_rule (with g)',
  'gated_delta_net': 'delta_rule (with g)',
  'deltanet': 'delta_rule',
  'kimi_delta_attention': 'kda',
  'simple_gla': 'linear_attention (with g)',
  'lightning_attention': 'linear_attention (with g)',
}


@command.as_main()
def main(_):
  sizes = {flag.name: _read_sizes(flag) for flag in (LENGTH, BATCH, HEADS)}
  many = [name for name, values in sizes.items() if len(values) > 1]
  if len(many) > 1:
    raise ConfigError(
      f'--{many[0]} and --{many[1]} have several numbers; give several to one'
    )
  axis = many[0] if many else 'length'
  names = _read_forms()
  _check_flags()
  for peer in PEER.value:
    _check_peer(peer)
  json_path = command.check_output(JSON)
  plot_path = command.check_output(PLOT, '.png')
  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.bench import bench, report
  from deltanet_jax.lab.environment import (
    describe_environment,
    find_peak_flops,
  )
  from deltanet_jax.progress import Line

  settings = bench.BenchSettings(
    what=WHAT.value, op=OP.value, forms=names, peers=tuple(PEER.value),
    configs=tuple(CONFIG.value), axis=axis, values=sizes[axis],
    **{name: values[0] for name, values in sizes.items()},
    grouped=sizes['heads'][0] // KEY_HEADS.value if KEY_HEADS.value else 1,
    dim=DIM.value, chunk=CHUNK.value, dtype=DTYPE.value, rounds=ROUNDS.value,
    memory_limit=MEMORY_LIMIT.value,
  )  # fmt: skip
  with command.bad_input():
    programs, reference = _list_programs(settings)
  bench.measure_programs(settings, programs, Line(), reference)
  where = describe_environment() | {'peak_flops': find_peak_flops()}
  print(report.format_text(settings, programs, where))
  if json_path:
    write_text(json_path, report.format_json(settings, programs, where))
  if plot_path:
    report.draw_growth(settings, programs, where, plot_path)
  return 0


def _list_programs(settings):
  """(programs, the name of those that others are compared with or None)."""
  from deltanet_jax.lab.bench import bench, models

  if settings.what != 'rule':
    return models.list_programs(settings), None
  functions = bench.find_functions(settings)
  return bench.list_programs(settings, functions), next(iter(functions))


def _read_sizes(flag):
  different = 'give different numbers, such as 4096 or 4096,8192'
  numbers = command.read_numbers(flag, 1, sys.maxsize, different)
  if len(numbers) < len(flag.value):
    raise ConfigError(f'--{flag.name}={",".join(flag.value)}: {different}')
  return numbers


def _read_forms():
  """--forms, or what it is by default."""
  rule = WHAT.value == 'rule'
  if rule == bool(CONFIG.value):
    what = '--config is' if rule else 'no --config given,'
    raise ConfigError(
      f'--what={WHAT.value}: {what} the model of layer, step, prefill or decode'
    )
  for flag in (OP, PEER, HEADS, KEY_HEADS, DIM, CHUNK, DTYPE):
    if flag.present and not rule:
      raise ConfigError(
        f'--{flag.name} is for --what=rule; a model has its own, leave it out'
      )
  names = FORMS.value
  if names is None:
    names = [*forms.OWN[::-1]] if rule else ['auto']
  # find_functions and the configurations check the names
  if not names or len(set(names)) < len(names):
    raise ConfigError(
      f'--forms={",".join(names)}: name at least one, none twice'
    )
  return tuple(names)


def _check_flags():
  op = OP.value
  if op not in forms.FORMS:
    names = {name: name for name in forms.FORMS} | OTHER_NAMES
    close = difflib.get_close_matches(op.lower(), names, n=1)
    advice = f'did you mean {names[close[0]]}? ' if close else ''
    advice += f'Recurrences: {", ".join(forms.FORMS)}'
    raise ConfigError(f'--op={op}: {advice}')
  for heads in map(int, HEADS.value) if KEY_HEADS.value else ():
    if heads % KEY_HEADS.value or len(HEADS.value) > 1:
      raise ConfigError(
        f'{",".join(HEADS.value)} heads are no multiple of'
        f' {KEY_HEADS.value} key heads; give one number that is'
      )
  blocks = CHUNK.value // 16
  if CHUNK.value % 16 or blocks < 1 or blocks & (blocks - 1):
    raise ConfigError(
      f'chunk is {CHUNK.value}; give 16, 32, 64, 128 or another 16 * 2^n'
    )


def _check_peer(peer):
  path, _, name = peer.rpartition(':')
  if not (path and name.isidentifier()):
    raise ConfigError(f'--peer={peer}: give FILE.py:NAME')
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'--peer={peer}: no file {path}')


if __name__ == '__main__':
  main()
