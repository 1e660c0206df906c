"""Compiles a program for a topology and analyzes it."""

import importlib.metadata
import re
import time

import jax
from jax.experimental import topologies

from deltanet_jax.cli import command
from deltanet_jax.lab.dryrun import advice, apart, bound, hlo, programs, traffic
from deltanet_jax.parallel import sharding


def run_dryrun(experiment, topology, of, context, batch, weights, say):
  """What `launch.dryrun` prints, as a dict for JSON.

  of: 'train', 'prefill' or 'decode'   context, batch, weights: of prefill and
  decode   say: called with progress lines

  Raises:
    ConfigError: the mesh does not fit the topology or the model.
    CompilerError: the compiler refuses the program, not for its memory.
  """
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology.name, num_slices=topology.slices
  ).devices
  with command.bad_input():
    mesh = sharding.make_mesh(experiment.mesh, devices)
  clock = time.monotonic()
  how = experiment, mesh, context, batch, weights
  lowered = {
    'train': lambda: programs.lower_training(experiment, mesh),
    'prefill': lambda: programs.lower_prefill(*how),
    'decode': lambda: programs.lower_decoding(*how),
  }[of]()
  lower = time.monotonic() - clock
  say(f'{lowered.what}: lowered in {lower:.1f} s, compiling for {topology}')
  clock = time.monotonic()
  compiled, refused = _compile(lowered.lowered)
  seconds = {'lower': lower, 'compile': time.monotonic() - clock}
  say(f'compiled in {seconds["compile"]:.1f} s')
  record = {
    'program': lowered.what,
    'of': of,
    'weights': None if of == 'train' else weights,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.chips,
    'devices': topology.devices,
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'jax': jax.__version__,
    'libtpu': importlib.metadata.version('libtpu'),
    'seconds': seconds,
    'memory': _memory(compiled, refused, lowered, topology),
    'collectives': None,
    'bound': None,
  }
  if compiled is not None:
    _work(record, compiled, lowered, topology, mesh)
  record['fits'] = record['memory']['total'] <= record['memory']['available']
  record['advice'] = (
    [] if record['fits'] else advice.give_advice(experiment, record)
  )
  return record


def _compile(lowered):
  """(program, None), or (None, message) if it exceeds the memory."""
  try:
    return lowered.compile(), None
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith('RESOURCE_EXHAUSTED'):
      # the rest is its place in the program, a page or more
      raise apart.CompilerError(str(error).splitlines()[0]) from None
    return None, str(error)


_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def parse_refused_bytes(text, arguments):
  """The bytes that a program needs by the compiler's out-of-memory message,
  which names those of temporaries or of everything."""
  size = r'([\d.]+)([KMGT]?)'
  of = lambda x: int(float(x[1]) * _UNITS[x[2]])
  if match := re.search(rf'temporaries \({size}\)', text):
    return arguments + of(match)
  if match := re.search(rf'(?:Used|hbm requirement) {size}', text):
    return max(arguments, of(match))
  raise ValueError(f'no size in {text!r}')


def _memory(compiled, refused, lowered, topology):
  """Bytes on a device."""
  chip = topology.chip
  sizes = {'available': chip.hbm / chip.devices, 'held': lowered.held}
  if compiled is None:
    arguments = sum(lowered.held.values())
    total = parse_refused_bytes(refused, arguments)
    return sizes | {
      'arguments': arguments,
      'temporaries': total - arguments,
      'total': total,
      'refused': refused.splitlines()[0],
    }
  m = compiled.memory_analysis()
  parts = {
    'arguments': m.argument_size_in_bytes,
    'outputs': m.output_size_in_bytes,
    'aliased': m.alias_size_in_bytes,
    'temporaries': m.temp_size_in_bytes,
    'program': m.generated_code_size_in_bytes,
  }
  total = sum(parts.values()) - 2 * parts['aliased']
  return sizes | parts | {'total': total}


def _work(record, compiled, lowered, topology, mesh):
  text = compiled.as_text()
  per_slice = topology.devices // topology.slices
  coordinates = [tuple(d.coords) for d in mesh.devices.flat][:per_slice]
  networks = bound.time_networks(
    hlo.find_collectives(text), topology, coordinates
  )
  moved = traffic.count_bytes(text, lowered.filled)
  least = bound.compute_bound(topology, lowered.flops, moved, networks)
  peak = topology.chips * topology.chip.flops
  record |= {
    'collectives': [vars(x) for x in networks],
    'flops': {'model': lowered.model_flops, 'program': lowered.flops},
    'hbm_bytes': moved,
    'unknown_loops': hlo.find_unknown_loops(text),
    'runs': lowered.runs,
    'tokens': lowered.tokens,
    'bound': vars(least) | {'limit': least.limit},
    'step_seconds': least.seconds,
    'mfu': lowered.model_flops / (peak * least.seconds),
  }
