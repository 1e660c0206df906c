"""The files of a study; a job is stored whole or not at all."""

import csv
import io
import json
import os
import pathlib

import numpy as np

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import write_text
from deltanet_jax.runs.folder import require_folder, require_same

COLUMNS = (
  'task', 'model', 'layers', 'parameters', 'cache_floats', 'slice', 'lr',
  'seeds', 'accuracy', 'lowest', 'highest', 'exact', 'nats', 'targets',
)  # fmt: skip


class StudyFolder:
  """The files of a study."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.config = self.path / 'study.json'
    self.jobs = self.path / 'cells'
    self.results = self.path / 'results.jsonl'
    self.summary = self.path / 'summary.csv'
    self.text = self.path / 'summary.md'
    self.plots = self.path / 'plots'
    self.report = self.path / 'report.html'
    self.timing = self.path / 'timing.jsonl'

  def check(self, cfg):
    """Refuses the folder of a study of other sizes.

    Raises:
      ConfigError: names the fields that differ.
    """
    require_folder(self.path)
    if not self.config.is_file():
      return
    stored = config.from_json(self.config.read_text(), classes=(type(cfg),))
    if type(stored) is not type(cfg):
      raise ConfigError(
        f'{self.config} belongs to no study; give another --workdir'
      )
    lines = config.list_differences(stored, cfg)
    require_same(self.path, lines, 'a study of other sizes')

  def make(self, cfg):
    """Creates the folder.

    Raises:
      ConfigError: it cannot be written.
    """
    try:
      self.jobs.mkdir(parents=True, exist_ok=True)
      self.plots.mkdir(exist_ok=True)
      write_text(self.config, config.to_json(cfg) + '\n')
    except OSError as error:
      raise ConfigError(f'--workdir={self.path}: {error.strerror}') from error

  def done(self, job):
    """Whether the job is stored."""
    return (self.jobs / f'{job.name}.json').is_file()

  def keep(self, job, rows, arrays, seconds):
    """Stores a job; the file of its rows is written last and marks it done."""
    path = self.jobs / f'{job.name}.npz'
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'wb') as file:
      np.savez_compressed(file, **arrays)
    os.replace(temporary, path)
    lines = ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
    write_text(self.jobs / f'{job.name}.json', lines)
    with open(self.timing, 'a') as file:
      note = {'cell': job.name, 'seconds': round(seconds, 1)}
      file.write(json.dumps(note) + '\n')

  def rows(self, job):
    """The rows of a job."""
    lines = (self.jobs / f'{job.name}.json').read_text().splitlines()
    return [json.loads(line) for line in lines]

  def arrays(self, job):
    """Final scores of a job; {} if no learning rate stayed finite."""
    with np.load(self.jobs / f'{job.name}.npz') as file:
      return dict(file)

  def collect(self, jobs):
    """Writes results.jsonl and summary.csv of the jobs done; returns rows."""
    done = [job for job in jobs if self.done(job)]
    rows = [row for job in done for row in self.rows(job)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    write_text(self.results, lines)
    write_text(self.summary, format_csv(summarize_rows(rows)))
    return rows


def summarize_rows(rows):
  """A dict of COLUMNS for each task, model and slice: mean, lowest and highest
  of the fresh seeds after the last step."""
  groups = {}
  for row in rows:
    if row['phase'] == 'fresh' and row['step'] == row['steps']:
      key = row['task'], row['model'], row['slice']
      groups.setdefault(key, []).append(row)
  out = []
  for group in groups.values():
    total = lambda name, group=group: sum(row[name] for row in group)
    summary = {name: group[0].get(name) for name in COLUMNS}
    summary |= {'seeds': len(group), 'targets': total('targets')}
    accuracy = [row['accuracy'] for row in group]
    finite = None not in accuracy
    for name in ('accuracy', 'exact', 'nats'):
      summary[name] = total(name) / len(group) if finite else None
    summary['lowest'] = min(accuracy) if finite else None
    summary['highest'] = max(accuracy) if finite else None
    out.append(summary)
  return out


def format_csv(summary):
  """The summary as CSV; values that are not finite are empty."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
  writer.writeheader()
  rounded = lambda name, value: (
    round(value, 6) if isinstance(value, float) and name != 'lr' else value
  )
  for line in summary:
    writer.writerow({name: rounded(name, x) for name, x in line.items()})
  return text.getvalue()
