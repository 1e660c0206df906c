"""Advice on what to change if a program does not fit."""

import math

from deltanet_jax.lab.chips import GIB

# share of the memory that a program should fill at most
USABLE = 0.95


def give_advice(experiment, record):
  """Sentences, the most useful first; their sizes are estimates."""
  memory = record['memory']
  if record['of'] == 'train':
    return _train(experiment, memory)
  return _generate(record, memory)


def _gib(x):
  return f'{x / GIB:.1f} GiB'


def _train(experiment, memory):
  held = memory['held']
  have = USABLE * memory['available']
  fixed = memory['total'] - memory['temporaries']
  # gradients take as much as parameters, whatever the batch
  state = held['parameters'] + held['optimizer'] + held['parameters']
  if fixed + held['parameters'] >= have:
    return _split_weights(experiment, state, have)
  left = have - fixed - held['parameters']
  moving = memory['temporaries'] - held['parameters']
  return _split_work(experiment, moving, left)


def _split_weights(experiment, state, have):
  mesh = experiment.mesh
  times = _power(state / (0.7 * have))
  sentence = (
    f'parameters, optimizer state and gradients take {_gib(state)} of'
    f' {_gib(have)} on every device: shard them over {times} times as many'
  )
  copies = mesh.data
  if copies >= times:
    return [
      f'{sentence}, which hold replicas now:'
      f' --config.mesh.data={copies // times}'
      f' --config.mesh.fsdp={mesh.fsdp * times}'
    ]
  rows = mesh.replica * mesh.data * mesh.expert * mesh.fsdp * times
  parts = experiment.optim.accumulate
  batch = experiment.data.batch
  sentence += (
    f' devices: --config.mesh.fsdp={mesh.fsdp * times} on a topology {times}'
    ' times as large'
  )
  if batch % (rows * parts):
    sentence += (
      f', with --config.data.batch a multiple of {rows * parts} (or'
      f' --config.mesh.tensor={mesh.tensor * times} for the batch as it is)'
    )
  return [sentence]


def _split_work(experiment, moving, left):
  mesh, data = experiment.mesh, experiment.data
  parts = experiment.optim.accumulate
  devices = mesh.replica * mesh.data * mesh.fsdp * mesh.expert
  rows = data.batch // devices // parts
  times = moving / left
  sentences = []
  if experiment.model.remat != 'full':
    sentences.append(
      f'--config.model.remat=full: activations are kept for every layer'
      f' (remat is {experiment.model.remat!r}), and temporaries take'
      f' {_gib(moving)} with {_gib(left)} left'
    )
  fewer = [k for k in range(2, rows + 1) if rows % k == 0]
  enough = next((k for k in fewer if k >= times), fewer[-1] if fewer else 1)
  if enough > 1:
    sentences.append(
      f'--config.optim.accumulate={parts * enough}: {rows // enough} rows of'
      f' {data.seq_len:,} tokens on a device at once instead of {rows};'
      f' temporaries then take about {_gib(moving / enough)} with {_gib(left)}'
      ' left'
    )
  spans = _power(times / enough)
  if spans == 1:
    return sentences
  if mesh.fsdp % spans == 0 and data.seq_len % (mesh.seq * spans) == 0:
    # the same devices, moved from fsdp to seq
    sentences.append(
      f'--config.mesh.fsdp={mesh.fsdp // spans}'
      f' --config.mesh.seq={mesh.seq * spans}'
      f' --config.optim.accumulate={parts * enough * spans}: a row of'
      f' {data.seq_len:,} tokens over {spans} devices, about'
      f' {_gib(moving / enough / spans)} of temporaries on each'
    )
  else:
    sentences.append(
      f'rows of {data.seq_len // spans:,} tokens with --config.data.seq_len, or'
      f' {spans} times as many devices along --config.mesh.seq'
    )
  return sentences


def _generate(record, memory):
  held, have = memory['held'], USABLE * memory['available']
  sentences = []
  if held['cache'] > held['parameters']:
    left = have - (memory['total'] - held['cache'])
    if left > 0:
      sentences.append(
        f'the cache takes {_gib(held["cache"])} per device and {_gib(left)} are'
        f' left for it: divide --batch or --context by'
        f' {_power(held["cache"] / left)}'
      )
    else:
      sentences.append('fewer sequences with --batch, or a shorter --context')
  times = _power(memory['total'] / have)
  sentences.append(
    f'parameters take {_gib(held["parameters"])} per device: shard over {times}'
    ' times as many devices with --config.mesh.tensor'
  )
  if record['weights'] == 'float32':
    sentences.append(
      '--weights=bfloat16, the dtype of released weights, halves them'
    )
  return sentences


def _power(x):
  """The least power of two that is at least x and 1."""
  return 1 << max(0, math.ceil(math.log2(x)))
