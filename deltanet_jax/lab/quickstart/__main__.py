"""Trains a small model on Python's own sources and shows the results.

  python -m launch.quickstart

About five minutes on a CPU. Ctrl-C saves; the same command continues.
Takes the flags of launch.train. Default --workdir: runs/quickstart. In a clone
launch/quickstart.sh first makes an environment.
"""

import math

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command, process_flags, train
from deltanet_jax.config import ConfigError
from deltanet_jax.config.files import format_json, read_json, write_text
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.runs.folder import Workdir

PROMPT = 'def read_lines('
SAMPLING = Sampling(temperature=0.7, top_p=0.95)
CONTEXTS = (1024, 32768, 262144)

flags.set_default(train.WORKDIR, 'runs/quickstart')
flags.adopt_module_key_flags(train)


def _parse_flags(argv):
  (path, changes), rest = train.split_flags(argv)
  return config.read_experiment(path or 'quickstart', changes), rest


@command.as_main(_parse_flags)
def main(experiment):
  if train.RELEASED.value is not None:
    raise ConfigError('--released is not for the quickstart; use launch.train')
  if process_flags.read_process_flags():
    raise ConfigError('the quickstart runs in one process; use launch.train')
  workdir = Workdir(train.WORKDIR.value)
  result = train.train_run(experiment, workdir)
  if isinstance(result, int):
    return 128 + result
  _show_bits(result, _baselines(experiment, workdir))
  _show_text(experiment, workdir)
  _show_cache(experiment)
  print(f'\nFiles in {workdir.path}')
  for path in (workdir.plot, workdir.metrics, workdir.checkpoints):
    if path.exists():  # a plot only where matplotlib is installed
      print(f'  {path}')
  if workdir.tensorboard.exists():
    print(f'  {workdir.tensorboard} (tensorboard --logdir)')
  return 0


def _baselines(experiment, workdir):
  """Bits per byte of order-2 and order-3 n-gram models, computed once."""
  path = workdir.path / 'baselines.json'
  # a run may have continued with another text
  newer = lambda a, b: a.stat().st_mtime > b.stat().st_mtime
  corpus, there = workdir.corpus, path.is_file()
  if not there or corpus.is_file() and newer(corpus, path):
    from deltanet_jax.data.text import TextData
    from deltanet_jax.lab.quickstart import ngram

    data = TextData(experiment.data)
    bits = {}
    for order in (2, 3):
      bits[f'order-{order} n-gram'] = ngram.measure_bits_per_byte(
        data.train_documents, data.heldout_documents, order
      )
    write_text(path, format_json(bits))
  return read_json(path)


def _show_bits(result, baselines):
  number = lambda name: math.nan if result[name] is None else result[name]
  model = number('heldout_bits_per_byte')
  print(f'\nBits per byte on {result["heldout_bytes"]:,} held-out bytes')
  print(f'  {"this model":16} {model:.3f}')
  for name, bits in baselines.items():
    print(
      f'  {name:16} {bits:.3f}   this model: {100 * (model / bits - 1):+.0f}%'
    )
  print(
    f'  {result["parameters"]:,} parameters, trained on {result["tokens"]:,}'
    f' tokens, {number("tokens_per_second"):,.0f} per second'
  )


def _show_text(experiment, workdir):
  from deltanet_jax.infer.text import continue_text
  from deltanet_jax.runs.source import open_run

  source = open_run(workdir, config.find_own_classes(experiment))
  print('\nA continuation\n' + '-' * 72 + f'\n{PROMPT}', end='')
  for part in continue_text(
    source, PROMPT, max_tokens=300, sampling=SAMPLING, seed=0
  ):
    print(part, end='', flush=True)
  print('\n' + '-' * 72)


def _show_cache(experiment):
  from deltanet_jax.lab.cost import calc

  own = experiment.model
  twin = calc.make_attention_twin(own)
  print('\nState and KV cache of one sequence in bfloat16, MiB')
  print(f'  {"tokens":16}' + ''.join(f'{n:>12,}' for n in CONTEXTS))
  for name, model in (('this model', own), ('all attention', twin)):
    sizes = [calc.count_total_bytes(model, n, 1, 'bfloat16') for n in CONTEXTS]
    print(f'  {name:16}' + ''.join(f'{s / 2**20:12.2f}' for s in sizes))


if __name__ == '__main__':
  main()
