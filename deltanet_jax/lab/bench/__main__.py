"""Times the forms of a recurrence, forward and with backward.

  python -m launch.bench --op=delta_rule --length=4096

Every program is compiled and run once; then all run in turn. Columns "x" are
ratios to the first form. Temporary bytes are those of the compiled program; a
program that needs more than --memory_limit is not run.

  --peer=FILE.py:NAME

also times a function of your own (repeatable) and compares its output o with
that of the first form: NAME(q, k, v, beta, g, state=None) -> (o, final state),
without beta for linear_attention; q, k [B,T,J,K]   v [B,T,H,V]   beta, g
[B,T,H], for kda g [B,T,H,K].

Several lengths (--length=4096,8192,16384) show how time and temporary bytes
grow; --plot draws it.
"""

import difflib
import pathlib
import sys

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError, forms

OP = flags.DEFINE_string(
  'op', 'delta_rule', f'The recurrence: {", ".join(forms.FORMS)}.'
)
FORMS = flags.DEFINE_list(
  'forms', ['chunked', 'associative', 'recurrent'],
  'Forms to time.',
)  # fmt: skip
PEER = flags.DEFINE_multi_string(
  'peer', [], 'FILE.py:NAME of your own function to time; repeatable.'
)
LENGTH = flags.DEFINE_list('length', ['4096'], 'Tokens; one or more numbers.')
BATCH = flags.DEFINE_integer('batch', 1, 'Sequences.', lower_bound=1)
HEADS = flags.DEFINE_integer('heads', 16, 'Value heads.', lower_bound=1)
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
PLOT = flags.DEFINE_string('plot', None, 'PNG of time and memory by length.')

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
  different = 'give different numbers of tokens, such as 4096 or 4096,8192'
  lengths = command.read_numbers(LENGTH, 1, sys.maxsize, different)
  if len(lengths) < len(LENGTH.value):
    raise ConfigError(f'--length={",".join(LENGTH.value)}: {different}')
  _check_flags()
  for peer in PEER.value:
    _check_peer(peer)
  json_path = command.check_output(JSON)
  plot_path = command.check_output(PLOT, '.png')
  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.bench import bench, report
  from deltanet_jax.lab.environment import describe_environment
  from deltanet_jax.progress import Line

  settings = bench.BenchSettings(
    op=OP.value, forms=tuple(FORMS.value), peers=tuple(PEER.value),
    lengths=lengths, batch=BATCH.value, heads=HEADS.value,
    key_heads=KEY_HEADS.value or HEADS.value, dim=DIM.value,
    chunk=CHUNK.value, dtype=DTYPE.value, rounds=ROUNDS.value,
    memory_limit=MEMORY_LIMIT.value,
  )  # fmt: skip
  with command.bad_input():
    functions = bench.find_functions(settings)
  programs = bench.measure_programs(settings, functions, Line())
  where = describe_environment()
  print(report.format_text(settings, programs, where))
  if json_path:
    write_text(json_path, report.format_json(settings, programs, where))
  if plot_path:
    report.draw_growth(settings, programs, where, plot_path)
  return 0


def _check_flags():
  op = OP.value
  if op not in forms.FORMS:
    names = {name: name for name in forms.FORMS} | OTHER_NAMES
    close = difflib.get_close_matches(op.lower(), names, n=1)
    advice = f'did you mean {names[close[0]]}? ' if close else ''
    advice += f'Recurrences: {", ".join(forms.FORMS)}'
    raise ConfigError(f'--op={op}: {advice}')
  if KEY_HEADS.value and HEADS.value % KEY_HEADS.value:
    raise ConfigError(
      f'{HEADS.value} heads are no multiple of {KEY_HEADS.value} key heads'
    )
  blocks = CHUNK.value // 16
  if CHUNK.value % 16 or blocks < 1 or blocks & (blocks - 1):
    raise ConfigError(
      f'chunk is {CHUNK.value}; give 16, 32, 64, 128 or another 16 * 2^n'
    )
  # find_functions checks the names
  if not FORMS.value or len(set(FORMS.value)) < len(FORMS.value):
    raise ConfigError(
      f'--forms={",".join(FORMS.value)}: name at least one, none twice'
    )


def _check_peer(peer):
  path, _, name = peer.rpartition(':')
  if not (path and name.isidentifier()):
    raise ConfigError(f'--peer={peer}: give FILE.py:NAME')
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'--peer={peer}: no file {path}')


if __name__ == '__main__':
  main()
