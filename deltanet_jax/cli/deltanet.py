"""`deltanet NAME ...` or `python -m deltanet_jax NAME ...`: runs a command.

In a clone `python -m launch.NAME ...` does the same.
"""

import difflib
import importlib.metadata
import sys

from deltanet_jax.cli import command

# modules of `lab` are named, not imported: the package does not depend on it
COMMANDS = {
  'train': ('cli.train', 'trains a model or continues a run'),
  'generate': ('cli.generate', 'continues a text'),
  'evaluate': ('cli.evaluate', 'measures loss and bits per byte on a text'),
  'convert': ('cli.convert', 'converts released weights to Orbax and back'),
  'quickstart': (
    'lab.quickstart.__main__', 'trains a small model and shows results'
  ),
  'first_steps': ('lab.first_steps.__main__', 'shows what a state does'),
  'calc': ('lab.cost.__main__', 'counts parameters, cache bytes, FLOP'),
  'dryrun': ('lab.dryrun.__main__', 'memory and time on a TPU, without one'),
  'profile': ('lab.profile.__main__', 'measures cost against context length'),
  'study': ('lab.study.__main__', 'trains small models: recall against memory'),
  'probes': ('lab.probes.__main__', 'tests what each recurrence can store'),
  'bench': ('lab.bench.__main__', 'times the forms of each recurrence'),
  'presets': ('lab.cost.presets', 'lists the presets with their sizes'),
}  # fmt: skip


def main() -> None:
  """Runs the command that the first argument names."""
  name, *rest = sys.argv[1:] or ['--help']
  program = command.ENTRY_POINTS[sys.argv[0].endswith('__main__.py')]
  if name in ('--help', '-h', 'help'):
    print(f'{program} NAME [--help] [--FLAG=VALUE ...]')
    print(f'{program} --version\n')
    for command_name, (_, about) in COMMANDS.items():
      print(f'  {command_name:12}{about}')
    return
  if name == '--version':
    try:
      return print(importlib.metadata.version('deltanet_jax'))
    except importlib.metadata.PackageNotFoundError:
      command.refuse_input('a clone that is not installed; see its git log')
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    there = f'there is {", ".join(COMMANDS)}'
    advice = f'did you mean {close[0]}?' if close else there
    command.refuse_input(f'no command {name!r}; {advice}')
  sys.argv = [f'{program} {name}', *rest]
  module = importlib.import_module(f'deltanet_jax.{COMMANDS[name][0]}')
  module.main()
