"""Lists the presets: layers, parameters and cache bytes of each.

  python -m launch.presets

The first column is what --config and --preset take. B / token: growth of the KV
cache per token; constant: states and windows. In a clone of the repository this
also writes the list to configs/README.md.
"""

import itertools
import os
import sys

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import preset_names
from deltanet_jax.config.files import write_text

LONG = 2**24  # tokens, longer than any window

HEAD = """\
# Presets

Each file here is a family of models with a table of sizes. Use one by name from
any folder, `--config=qwen3:8b`, or by its file, `--config=configs/qwen3.py:8b`.
`python -m launch.presets` writes this page.

Columns: layers by kind; parameters, of mixtures of experts also those active
per token; bytes by which the KV cache of a sequence grows per token, in
bfloat16; memory that does not grow with the context: states in float32, last
inputs of the convolutions, windows of attention. The position of each cached
token, 4 bytes per attention layer, is not counted. `python -m launch.calc
--preset=NAME` shows more.
"""
COLUMNS = """\
| preset | layers | parameters | B / token | constant, MiB |
|---|---|---|---|---|
"""


@command.as_main()
def main(_):
  """The command."""
  # shapes need no accelerator; set before jax is imported
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  print(COLUMNS, end='', flush=True)
  rows = {}
  for name in preset_names.list_presets():
    rows[name] = format_row(name)
    print(rows[name], flush=True)
  write_page(rows)
  return 0


def write_page(rows):
  """Writes the page of rows by preset, unless the package is installed."""
  folder = preset_names.find_folder()
  if preset_names.is_installed():
    return
  write_text(folder / 'README.md', format_page(rows))
  print(f'wrote {folder / "README.md"}', file=sys.stderr)


def format_page(rows: dict[str, str]) -> str:
  """The page of rows {preset: row}, a section per family."""
  parts = [HEAD]
  family = lambda name: name.partition(':')[0]
  for name, group in itertools.groupby(rows, family):
    title = f'\n## `{name}`\n\n{preset_names.describe_preset(name)}\n\n'
    parts += [title, COLUMNS, *(f'{rows[preset]}\n' for preset in group)]
  return ''.join(parts)


def format_row(name: str) -> str:
  """The row of a preset."""
  from deltanet_jax.lab.cost import calc, report

  cfg = config.load(name).model
  parameters = calc.count_parameters(cfg)
  active = calc.count_active_parameters(cfg)
  used = '' if active == parameters else f' ({active:,} active)'
  size, more = (_bytes_without_positions(cfg, n) for n in (LONG, LONG + 1))
  constant = (size - LONG * (more - size)) / 2**20
  kinds = report.format_kinds(report.count_kinds(cfg))
  return (
    f'| `{name}` | {kinds} | {parameters:,}{used} |'
    f' {more - size:,} | {constant:.1f} |'
  )


def _bytes_without_positions(cfg, n):
  from deltanet_jax.lab.cost import calc

  parts = calc.count_cache_parts(cfg, n, 1, 'bfloat16').values()
  return sum(sum(x.values()) - x.get('positions', 0) for x in parts)


if __name__ == '__main__':
  main()
