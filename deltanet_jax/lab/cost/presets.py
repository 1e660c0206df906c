"""Writes the table of all presets, configs/README.md, from their shapes.

python -m launch.presets
"""

import os

from deltanet_jax.cli import command
from deltanet_jax.config import preset_names


def main():
  """The command."""
  command.run_command(_main)


def _main(taken):
  del taken
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from deltanet_jax.config.files import write_text
  from deltanet_jax.lab.cost import presets_table

  path = preset_names.find_folder() / 'README.md'
  rows = {}
  for name in preset_names.list_presets():
    rows[name] = presets_table.row(name)
    print(rows[name], flush=True)
  write_text(path, presets_table.text(rows))
  print(f'{len(rows)} presets in {path}')
  return 0


if __name__ == '__main__':
  main()
