"""Trains attention, recurrent models and hybrids; compares recall and memory.

  python -m launch.study --size=study --workdir=runs/study

Sizes: smoke (minutes on 2 cores; exit status 1 if a check fails), study (under
an hour on 2 cores), gpu (one large GPU). A job is one model on one task: the
best of several learning rates, then several seeds. An estimate of the time is
printed first.

Flags set the numbers of a size (deltanet_jax/lab/study/config.py):

  --config.d_model=64 --config.pairs=32 --config.length=128 --config.seeds=5
  --config.lrs.0=1e-3

--models and --tasks choose: every model given runs on every task given.

Read report.html in the folder first; summary.md has its text, summary.csv and
results.jsonl the numbers, plots/ the figures. Started again, a stopped study
runs the jobs that are left.
"""

import os
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra

SIZE = flags.DEFINE_enum(
  'size', 'study', ['smoke', 'study', 'gpu'], 'Size of the study.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the study, new or to be continued.', required=True
)
MODELS = flags.DEFINE_list(
  'models', [], 'Only these, such as full,gdn,gdn-3:1.'
)
TASKS = flags.DEFINE_list('tasks', [], 'Only these, such as mqar,copy.')
JOBS = flags.DEFINE_integer(
  'jobs', 0, 'Jobs in parallel; 0: one per CPU core, one on a GPU or TPU.',
  lower_bound=0,
)  # fmt: skip
MINUTES = flags.DEFINE_float(
  'minutes', 0, 'Start no job after this time and report what is done; 0: no'
  ' limit.', lower_bound=0,
)  # fmt: skip


def take_changes(argv):
  path, changes, rest = config.split_argv(argv)
  if path:
    raise ConfigError(
      'a study takes no --config=FILE; give --size and --config.NAME'
    )
  return changes, rest


@command.as_main(take_changes)
def main(changes):
  from deltanet_jax.lab.study import matrix, results

  size = SIZE.value
  with command.bad_input():
    cfg = config.override_fields(matrix.SIZES[size], changes)
    jobs = matrix.list_jobs(cfg, size, MODELS.value, TASKS.value)
  folder = results.StudyFolder(WORKDIR.value)
  folder.check(cfg)
  require_extra('matplotlib', 'study')
  # a job is too small for two cores: each gets one core
  old = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{old} --xla_cpu_multi_thread_eigen=false'
  return _study(cfg, jobs, folder)


def _study(cfg, jobs, folder):
  import jax

  from deltanet_jax.lab.study import matrix, report, runner
  from deltanet_jax.progress import format_span

  cores = os.cpu_count() if jax.default_backend() == 'cpu' else 1
  parallel = JOBS.value or cores
  todo = [job for job in jobs if not folder.done(job)]
  guess = sum(matrix.estimate_seconds(cfg, job) for job in todo) / parallel
  print(
    f'{len(jobs)} jobs, {len(jobs) - len(todo)} of them done before, {parallel}'
    f' in parallel; about {format_span(guess)} on as many cores of an AMD EPYC',
    file=sys.stderr,
  )
  folder.make(cfg)
  errors = runner.run_jobs(cfg, jobs, folder, parallel, 60 * MINUTES.value)
  rows = folder.collect(jobs)
  summary = report.write_report(cfg, SIZE.value, jobs, folder, rows)
  print(summary.text)
  return 1 if errors else summary.status


if __name__ == '__main__':
  main()
