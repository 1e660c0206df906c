"""Writes the table of all presets, configs/README.md, from their shapes.

python -m launch.presets
"""

import itertools
import os

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import preset_names

LONG = 2**24  # tokens; no window is as long

HEAD = """\
# Presets

One file a family, with a table of its sizes: `--config=qwen3:8b` from anywhere,
or `--config=configs/qwen3.py:8b`. `python -m launch.presets` writes this page.

Of each model: its layers, its parameters and, where experts are chosen, how
many of them work on a token; what the cache of one sequence grows by with a
token, in bfloat16; what it holds beside that whatever the context: states in
float32, inputs of the convolutions, windows. Each slot of an attention layer
also keeps its position, 4 bytes, not counted here. `python -m launch.calc
--preset=NAME` has the rest.
"""
COLUMNS = """\
| preset | layers | parameters | B / token | constant, MiB |
|---|---|---|---|---|
"""


@command.as_main()
def main(_):
  # shapes need no accelerator; set before jax is imported
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from deltanet_jax.config.files import write_text

  path = preset_names.find_folder() / 'README.md'
  rows = {}
  for name in preset_names.list_presets():
    rows[name] = format_row(name)
    print(rows[name], flush=True)
  write_text(path, format_page(rows))
  print(f'{len(rows)} presets in {path}')
  return 0


def format_page(rows: dict[str, str]) -> str:
  """The page of rows by preset, families apart."""
  parts = [HEAD]
  family = lambda name: name.partition(':')[0]
  for name, group in itertools.groupby(rows, family):
    title = f'\n## `{name}`\n\n{preset_names.describe_preset(name)}\n\n'
    parts += [title, COLUMNS, *(f'{rows[preset]}\n' for preset in group)]
  return ''.join(parts)


def format_row(name: str) -> str:
  """The line of a preset."""
  from deltanet_jax.lab.cost import calc, report

  cfg = config.load(name).model
  parameters = calc.count_parameters(cfg)
  active = calc.count_active_parameters(cfg)
  used = '' if active == parameters else f', a token {active:,}'
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
