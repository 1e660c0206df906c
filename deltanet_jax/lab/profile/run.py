"""Runs a profile from its settings to its files, one context at a time."""

import json
import time

import jax

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.config.files import replace_nonfinite, write_text
from deltanet_jax.lab.environment import describe_environment, describe_machine
from deltanet_jax.lab.profile import measure, plots, report
from deltanet_jax.lab.profile.plan import ProfileSettings
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.progress import Line, format_span


def run_profile(settings, models, folder):
  """Writes all results into `folder` and returns the text of the report.

  models: {name: (ModelConfig, parameters or None for random ones)}

  Skips contexts that the folder already holds.

  Raises:
    ConfigError: the folder holds another profile, or cannot be written.
  """
  cfgs = {name: cfg for name, (cfg, _) in models.items()}
  where = describe_environment() | {'machine': describe_machine()}
  records = _open_folder(folder, settings, models, where)
  done = {r['context'] for r in records}
  if done != set(settings.contexts):
    _measure(settings, models, folder, records, done)
  text = report.format_text(settings, cfgs, records, where)
  write_text(folder / 'summary.md', text)
  write_text(folder / 'summary.csv', report.format_csv(records))
  plots.draw_panels(settings, records, where, folder)
  return text


def _measure(settings, models, folder, records, done):
  """Measures the missing contexts; appends them to `records` and the file."""
  progress = Line()
  subjects = []
  for name, (cfg, params) in models.items():
    progress.show(f'making the parameters of {name}')
    subjects.append(
      measure.Subject(name, cfg, params or make_random_params(cfg), settings)
    )
  contexts = settings.contexts
  for i, context in enumerate(contexts):
    if context in done:
      continue
    head, start = f'context {context:,} ({i + 1}/{len(contexts)})', time.time()
    before = [r for r in records if i and r['context'] == contexts[i - 1]]
    show = _sparsely(progress, head)
    records += measure.measure_context(subjects, context, before, show)
    lines = ''.join(json.dumps(replace_nonfinite(r)) + '\n' for r in records)
    write_text(folder / 'results.jsonl', lines)
    progress.clear()
    seconds = time.time() - start
    more = len([n for n in contexts[i + 1 :] if n not in done])
    # a context takes about twice as long as the one before it
    left = format_span(seconds * (2 ** (more + 1) - 2))
    progress.show(f'{head} took {format_span(seconds)}; about {left} left')


def _sparsely(progress, head):
  """Limits progress lines to ten a second, in a file to six a minute."""
  shortest = 0.1 if progress.live else 10.0
  last = 0.0

  def show(line, left):
    nonlocal last
    if time.monotonic() - last >= shortest:
      tail = '' if left is None else f', {format_span(left)} left here'
      progress.show(f'{head}, {line}{tail}')
      last = time.monotonic()

  return show


def make_random_params(cfg):
  mesh = sharding.make_mesh(MeshConfig())
  return sharding.init_params(HybridLM(cfg), jax.random.key(0), mesh)


def _open_folder(folder, settings, models, where):
  """The records in the folder, which is made if needed."""
  tree = {
    'settings': json.loads(config.to_json(settings)),
    'models': {
      name: {'given': params is not None, **json.loads(config.to_json(cfg))}
      for name, (cfg, params) in models.items()
    },
    'where': where,
  }
  path, results = folder / 'settings.json', folder / 'results.jsonl'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.is_file() else None
    if stored is None:
      write_text(path, json.dumps(tree, indent=2) + '\n')
  except OSError as error:
    raise ConfigError(f'--out={folder}: {error.strerror}') from error
  if stored is None:
    return []
  classes = config.find_own_classes(tuple(cfg for cfg, _ in models.values()))
  try:
    stored, given = (_read_settings(x, classes) for x in (stored, tree))
  except (ConfigError, KeyError) as error:
    raise ConfigError(f'{path}: {error}; give another folder') from error
  if names := [name for name in given if stored[name] != given[name]]:
    raise ConfigError(
      f'--out={folder} holds a profile of other {", ".join(names)}; give'
      ' another folder'
    )
  if not results.is_file():
    return []
  return [json.loads(line) for line in results.read_text().splitlines()]


def _read_settings(tree, classes):
  """settings.json as values, which compare equal after a class is renamed."""
  read = lambda part: config.from_json(
    json.dumps(part), classes=(ProfileSettings, *classes)
  )
  models = {name: dict(model) for name, model in tree['models'].items()}
  return tree | {
    'settings': read(tree['settings']),
    'models': {
      name: (model.pop('given'), read(model)) for name, model in models.items()
    },
  }
