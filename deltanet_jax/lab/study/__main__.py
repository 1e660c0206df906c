"""Recall against memory: trains the models side by side and writes a report.

  python -m launch.study --size=study --workdir=runs/study

Sizes: smoke (exit status 1 when an expectation fails), study (CPUs), gpu (one
large GPU); an estimate of the time is printed first. Every number of a size is
set by its name, as deltanet_jax/lab/study/config.py has them:

  --config.d_model=64 --config.pairs=32 --config.length=128 --config.seeds=5
  --config.lrs.0=1e-3

--models and --tasks choose; every model given then runs on every task given.

The folder gets results.jsonl, summary.csv, summary.md, plots/ and report.html.
Killed and started again, the study goes on after the cells that were done.
"""

import os
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra

SIZE = flags.DEFINE_enum(
  'size', 'study', ['smoke', 'study', 'gpu'], 'Which study.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the study: made, or continued.', required=True
)
MODELS = flags.DEFINE_list('models', [], 'Only these, as full,gdn,gdn-3:1.')
TASKS = flags.DEFINE_list('tasks', [], 'Only these, as mqar,copy.')
JOBS = flags.DEFINE_integer(
  'jobs', 0, 'Cells at a time; 0: one for each CPU core, one on a GPU or TPU.',
  lower_bound=0,
)  # fmt: skip
MINUTES = flags.DEFINE_float(
  'minutes', 0, 'After these no cell is begun, and what there is is reported;'
  ' 0: no limit.', lower_bound=0,
)  # fmt: skip


def take_changes(argv):
  path, changes, rest = config.split_argv(argv)
  if path:
    raise ConfigError('--config=FILE: the sizes are --size and --config.NAME')
  return changes, rest


@command.as_main(take_changes)
def main(changes):
  from deltanet_jax.lab.study import matrix, results

  size = SIZE.value
  with command.bad_input():
    cfg = config.override_fields(matrix.SIZES[size], changes)
    cells = matrix.list_cells(cfg, size, MODELS.value, TASKS.value)
  folder = results.StudyFolder(WORKDIR.value)
  folder.check(cfg)
  require_extra('matplotlib', 'study')
  # a cell is too small for two cores: XLA gets one, and each core a cell
  old = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{old} --xla_cpu_multi_thread_eigen=false'
  return _study(cfg, cells, folder)


def _study(cfg, cells, folder):
  import jax

  from deltanet_jax.lab.study import matrix, report, runner
  from deltanet_jax.progress import format_span

  cores = os.cpu_count() if jax.default_backend() == 'cpu' else 1
  jobs = JOBS.value or cores
  todo = [cell for cell in cells if not folder.done(cell)]
  guess = sum(matrix.estimate_seconds(cfg, cell) for cell in todo) / jobs
  print(
    f'{len(cells)} cells, {len(cells) - len(todo)} of them done before,'
    f' {jobs} at a time; on 2 cores of an AMD EPYC the rest would take about'
    f' {format_span(guess)}',
    file=sys.stderr,
  )
  folder.make(cfg)
  errors = runner.run_cells(cfg, cells, folder, jobs, 60 * MINUTES.value)
  rows = folder.collect(cells)
  summary = report.write_report(cfg, SIZE.value, cells, folder, rows)
  print(summary.text)
  return 1 if errors else summary.status


if __name__ == '__main__':
  main()
