"""Times the forms of a rule and functions of others, side by side.

Every program is compiled first and run once; then all take turns, round by
round in one process, so that whatever slows the machine slows each of them.
"""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import kernels
from deltanet_jax.ops.description import VALUE
from deltanet_jax.progress import format_span

PASSES = ('forward', 'forward+backward')
# largest difference of outputs, over the largest output, that is rounding
ROUNDING = {'float32': 1e-3, 'bfloat16': 5e-2}


class BenchSettings(NamedTuple):
  """What to time; heads are value heads, memory_limit is in GB."""

  op: str
  forms: tuple
  peers: tuple  # FILE.py:NAME
  lengths: tuple
  batch: int = 1
  heads: int = 16
  key_heads: int = 16
  dim: int = 128
  chunk: int = 64
  dtype: str = 'float32'
  rounds: int = 5
  memory_limit: float = 8.0


@dataclasses.dataclass
class TimedProgram:
  """One function, pass and length: compiled, then run."""

  name: str
  way: str  # of PASSES
  length: int
  compile_seconds: float | None = None
  temporary_bytes: int | None = None
  seconds: list = dataclasses.field(default_factory=list)
  difference: float | None = None  # of o from the first function's
  run: Callable | None = None

  def __str__(self):
    return f'{self.name} {self.way} T={self.length}'

  def compile(self, function, shapes):
    start = time.perf_counter()
    program = _both if self.way == PASSES[1] else _forward
    self.run = jax.jit(functools.partial(program, function)).lower(*shapes)
    self.run = self.run.compile()
    self.compile_seconds = time.perf_counter() - start
    self.temporary_bytes = self.run.memory_analysis().temp_size_in_bytes

  def record(self):
    """All of it but the compiled program, for JSON."""
    return {
      'name': self.name,
      'pass': self.way,
      'length': self.length,
      'compile_seconds': self.compile_seconds,
      'temporary_bytes': self.temporary_bytes,
      'seconds': self.seconds,
      'median': statistics.median(self.seconds) if self.seconds else None,
      'minimum': min(self.seconds, default=None),
      'difference': self.difference,
    }


def _forward(function, inputs, state, d_o):
  del d_o
  return function(*inputs, state=state)


def _both(function, inputs, state, d_o):
  # o is kept, as training keeps it
  run = lambda inputs, state: function(*inputs, state=state)
  (o, last), pull = jax.vjp(run, inputs, state)
  return o, pull((d_o, jnp.zeros_like(last)))


def find_functions(settings):
  """{name: function} of the forms, then the peers. No device is touched.

  ValueError for a form or peer that is not there or does not take the inputs.
  """
  forms = kernels.forms(_rule(settings))
  functions = {}
  for name in settings.forms:
    if name not in forms:
      raise ValueError(
        f'{settings.op} has no form {name!r}; it has {", ".join(forms)}'
      )
    functions[name] = forms[name]
    if 'chunk' in inspect.signature(forms[name]).parameters:
      functions[name] = functools.partial(forms[name], chunk=settings.chunk)
  for peer in settings.peers:
    path, name = peer.rsplit(':', 1)
    function = _load(path, name)
    _check_peer(peer, function, settings)
    functions[name if name not in functions else peer] = function
  return functions


def _rule(settings):
  return importlib.import_module(f'deltanet_jax.ops.{settings.op}')


def _load(path, name):
  # not imported, which would leave a cached copy beside the file
  try:
    names = runpy.run_path(path, run_name=pathlib.Path(path).stem)
  except Exception as error:  # whatever a stranger's file raises
    raise ValueError(f'{path} cannot be loaded: {_line(error)}') from error
  function = names.get(name)
  if not callable(function):
    raise ValueError(f'{path} has no function {name!r}')
  return function


def _check_peer(peer, function, settings):
  """One trace per length: a peer that fails, fails before the first timing."""
  names = ', '.join(_rule(settings).DESCRIPTION.inputs)
  for length in settings.lengths:
    inputs, state, d_o = infer_shapes(settings, length)
    try:
      o, last = jax.eval_shape(
        functools.partial(_forward, function), inputs, state, d_o
      )
      given = f'{o.dtype}{[*o.shape]} and {[*last.shape]}'
    except Exception as error:  # whatever a stranger's function raises
      raise ValueError(
        f'{peer} fails as NAME({names}, state=...) -> (o, last state) at'
        f' length {length}: {_line(error)}'
      ) from error
    if (o.shape, o.dtype, last.shape) != (d_o.shape, d_o.dtype, state.shape):
      raise ValueError(
        f'{peer} returns o and state of {given}; the inputs ask for'
        f' {d_o.dtype}{[*d_o.shape]} and {[*state.shape]}'
      )


def _line(error):
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:200]}'


def make_inputs(settings, length, key):
  """What a mixer gives: (inputs, state, d_o).

  inputs as the rule describes them: a key has norm 1, a query K^-0.5; values
  are normal; gates in (0, 1); decays -softplus(normal - 3), in float32. The
  state is zero, d_o is normal.
  """
  description, s = _rule(settings).DESCRIPTION, settings
  sizes = {
    'B': s.batch, 'T': length, 'J': s.key_heads, 'H': s.heads, 'K': s.dim,
    'V': s.dim,
  }  # fmt: skip
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  low = lambda x: x.astype(settings.dtype)
  of_kind = {
    'query': lambda x: low(unit(x) * settings.dim**-0.5),
    'key': lambda x: low(unit(x)),
    'value': low,
    'gate': lambda x: low(jax.nn.sigmoid(x)),
    'decay': lambda x: -jax.nn.softplus(x - 3),
  }
  described = (*description.inputs.values(), VALUE)
  keys = jax.random.split(key, len(described))
  *inputs, d_o = (
    of_kind[x.kind](
      jax.random.normal(key, [sizes[n] for n in x.axes.split('|')[0]])
    )
    for x, key in zip(described, keys, strict=True)
  )
  return tuple(inputs), description.zero_state(sizes), d_o


def infer_shapes(settings, length):
  """`make_inputs` without the numbers."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda key: make_inputs(settings, length, key), key)


def measure_programs(settings, functions, progress):
  """The programs of `functions` (see `find_functions`), compiled and timed."""
  programs = [
    TimedProgram(name, way, length)
    for length in settings.lengths
    for way in PASSES
    for name in functions
  ]
  for i, program in enumerate(programs):
    progress.show(f'compiling {i + 1}/{len(programs)}: {program}')
    program.compile(
      functions[program.name], infer_shapes(settings, program.length)
    )
  limit = settings.memory_limit * 1e9
  runnable = [p for p in programs if p.temporary_bytes <= limit]
  make = jax.jit(make_inputs, static_argnums=(0, 1))
  inputs = {
    length: make(settings, length, jax.random.key(0))
    for length in {p.length for p in runnable}
  }
  once = _warm_up(next(iter(functions)), runnable, inputs, progress)
  left = settings.rounds * sum(once)
  for i in range(settings.rounds):
    for program, seconds in zip(runnable, once, strict=True):
      progress.show(
        f'round {i + 1}/{settings.rounds}: {program}, about'
        f' {format_span(left)} left'
      )
      program.seconds.append(_time(program, inputs)[0])
      left -= seconds
  progress.clear()
  return programs


def _warm_up(reference, programs, inputs, progress):
  """Runs each once, compares o with that of `reference`; seconds of each."""
  once, first = [], {}
  for i, program in enumerate(programs):
    progress.show(f'first run {i + 1}/{len(programs)}: {program}')
    seconds, o = _time(program, inputs)
    once.append(seconds)
    if program.name == reference:
      first.setdefault(program.length, o)
    elif program.length in first:
      program.difference = _difference(o, first[program.length])
  return once


def _time(program, inputs):
  """(seconds, o) of one run."""
  start = time.perf_counter()
  o, *_ = jax.block_until_ready(program.run(*inputs[program.length]))
  return time.perf_counter() - start, o


def _difference(o, first):
  o, first = o.astype(jnp.float32), first.astype(jnp.float32)
  return float(jnp.max(jnp.abs(o - first)) / jnp.max(jnp.abs(first)))


def is_same(program, settings):
  """False where o differs by more than rounding; a nan differs."""
  difference = program.difference
  return difference is None or difference <= ROUNDING[settings.dtype]
