"""`deltanet NAME ...`, or `python -m deltanet_jax NAME ...`: every command by
its name, the same as launch.NAME."""

import difflib
import importlib
import sys

from deltanet_jax.cli import command

# what measures, reports or draws is imported when it is called, and only then
COMMANDS = {
  'train': ('cli.train', 'trains a model, or continues a run'),
  'generate': ('cli.generate', 'continues a text'),
  'evaluate': ('cli.evaluate', 'scores text'),
  'convert': ('cli.convert', 'released weights to Orbax and back'),
  'quickstart': (
    'lab.quickstart.__main__', 'trains a small model, shows results'
  ),
  'first_steps': ('lab.first_steps.__main__', 'a state by hand, then learned'),
  'calc': ('lab.cost.__main__', 'parameters, cache and operations of a model'),
  'dryrun': ('lab.dryrun.__main__', 'a program compiled for a TPU'),
  'profile': ('lab.profile.__main__', 'cost against context'),
  'study': ('lab.study.__main__', 'recall against memory'),
  'probes': ('lab.probes.__main__', 'what fits into the state of each rule'),
  'bench': ('lab.bench.__main__', 'how fast the forms are'),
  'presets': ('lab.cost.presets', 'writes the table of configs/'),
}  # fmt: skip


def main() -> None:
  """The command that the first argument names, with the others."""
  name, *rest = sys.argv[1:] or ['--help']
  if name in ('--help', '-h', 'help'):
    print('deltanet NAME [--help] [--FLAG=VALUE ...]\n')
    for command_name, (_, about) in COMMANDS.items():
      print(f'  {command_name:12}{about}')
    return
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    there = f'did you mean {close[0]}?' if close else ', '.join(COMMANDS)
    command.refuse_input(f'no command {name!r}; {there}')
  sys.argv = [f'deltanet {name}', *rest]
  module = importlib.import_module(f'deltanet_jax.{COMMANDS[name][0]}')
  module.main()
