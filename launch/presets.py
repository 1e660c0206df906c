"""Writes the table of all presets, configs/README.md, from their shapes.

python -m launch.presets
"""

import os

from deltanet_jax import preset_names
from launch import cli


def main(taken):
  del taken
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from deltanet_jax import presets_table, workdir

  path = preset_names.find_folder() / 'README.md'
  rows = {}
  for name in preset_names.list_presets():
    rows[name] = presets_table.row(name)
    print(rows[name], flush=True)
  workdir.write(path, presets_table.text(rows))
  print(f'{len(rows)} presets in {path}')
  return 0


if __name__ == '__main__':
  cli.run(main)
