"""Compiles the training step of every preset for a slice that it fits.

  python -m deltanet_jax.lab.dryrun.presets
  python -m deltanet_jax.lab.dryrun.presets quickstart kimi_linear:48b_a3b

Writes presets.md beside this file, row by row; the rows of other presets stay.
One program takes from a minute to ten, and up to 10 GiB.
"""

import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import write_text
from deltanet_jax.config.preset_names import list_presets

PAGE = pathlib.Path(__file__).with_name('presets.md')
HEAD = """\
# Presets and a slice that each fits

Memory of the training step on one device, compiled without a TPU:
`python -m deltanet_jax.lab.dryrun.presets` writes this page; with names after
it, only their rows.

| preset | slice | settings | GiB | there is | jax, libtpu | date |
|---|---|---|---|---|---|---|
"""
_EIGHT, _MANY = 'v5e:2x4 mesh.fsdp=8', 'v5e:8x8 mesh.fsdp=64'
_EXPERTS = 'v5p:4x4x8 mesh.fsdp=16 mesh.expert=8 data.batch=128'
# by the preset or its family: slice and settings, chosen by the size of the
# model; only those with a row in presets.md have been compiled
SLICES = {
  'small': 'v5e:2x2 mesh.fsdp=4',
  'quickstart': 'v5e:2x2 mesh.fsdp=4',
  'gdn': _EIGHT,
  'olmo_hybrid': _MANY,
  'qwen3': _MANY,
  'qwen3:0p6b': _EIGHT,
  'qwen3:1p7b': _EIGHT,
  'qwen3:30b_a3b': 'v6e:8x8 mesh.fsdp=8 mesh.expert=8',
  'qwen3:235b_a22b': _EXPERTS,
  'qwen3_5': _EXPERTS,
  'qwen3_5:0p8b': _EIGHT,
  'qwen3_5:2b': _EIGHT,
  'qwen3_5:4b': _MANY,
  'qwen3_5:9b': _MANY,
  'qwen3_5:27b': 'v6e:8x8 mesh.fsdp=64',
  'qwen3_5:35b_a3b': 'v6e:8x8 mesh.fsdp=8 mesh.expert=8',
  'qwen3_next': _EXPERTS,
  'kimi_linear':
    'v5e:16x16 mesh.fsdp=16 mesh.expert=16 data.batch=256',
  'minimax': 'v5p:8x8x8 mesh.fsdp=64 mesh.expert=8 data.batch=512',
  'minimax:m2': _EXPERTS,
  'deepseek': 'v5p:8x8x8 mesh.fsdp=64 mesh.expert=8 data.batch=512',
}  # fmt: skip


@command.as_main(lambda argv: (argv[1:], argv[:1]))
def main(names):
  """The command."""
  known = list_presets()
  if wrong := [name for name in names if name not in known]:
    raise ConfigError(f'no preset {wrong[0]}; there is {", ".join(known)}')
  rows = read_rows(PAGE.read_text() if PAGE.exists() else '')
  for name in names or known:
    rows[name] = _compile(name)
    print(rows[name], flush=True)
    order = sorted(rows, key=known.index)
    write_text(PAGE, HEAD + ''.join(f'{rows[x]}\n' for x in order))
  return 0


def read_rows(page):
  """{preset: row} of a page."""
  rows = [line for line in page.splitlines() if line.startswith('| `')]
  return {row.split('`')[1]: row for row in rows}


def _compile(name):
  family = name.partition(':')[0]
  topology, *settings = SLICES.get(name, SLICES[family]).split()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'record.json')
    done = subprocess.run(
      [
        sys.executable, '-m', 'deltanet_jax.lab.dryrun', f'--config={name}',
        f'--topology={topology}', f'--json={path}',
        *(f'--config.{x}' for x in settings),
      ],
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    record = json.loads(path.read_text()) if path.exists() else None
  return format_row(name, topology, settings, record, done.stderr)


def format_row(name, topology, settings, record, errors):
  """A row of the page; `record` of `run.run_dryrun`, or None with errors."""
  if record is None:
    size, have, versions = errors.strip().splitlines()[-1], '', ''
  else:
    memory = record['memory']
    size, have = (f'{memory[x] / 2**30:.1f}' for x in ('total', 'available'))
    versions = f'{record["jax"]}, {record["libtpu"]}'
    if not record['fits']:
      size += ', does not fit'
  cells = (
    f'`{name}`', topology, f'`{" ".join(settings)}`', size, have, versions,
    datetime.date.today().isoformat(),
  )  # fmt: skip
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  main()
