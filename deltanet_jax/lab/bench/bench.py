"""Times programs in turn: the forms of a recurrence and functions of others.

Every program is compiled and run once; then all run in turn, round by round in
one process, so that what slows the machine slows all of them. `models.py` has
the programs of layers and models.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import kernels
from deltanet_jax.ops.description import VALUE
from deltanet_jax.progress import format_span

PASSES = ('forward', 'forward+backward')
# largest relative difference of outputs that counts as rounding
ROUNDING = {'float32': 1e-3, 'bfloat16': 5e-2}
AXES = {'length': 'T', 'batch': 'B', 'heads': 'H'}


class BenchSettings(NamedTuple):
  """What to time; heads are value heads, memory_limit is in GB.

  `axis` is 'length', 'batch' or 'heads', which takes `values` one by one; it is
  replaced by `at`. Key heads are `grouped` times fewer than heads.
  """

  op: str
  forms: tuple
  peers: tuple  # FILE.py:NAME
  values: tuple
  axis: str = 'length'
  length: int = 4096
  batch: int = 1
  heads: int = 16
  grouped: int = 1
  dim: int = 128
  chunk: int = 64
  dtype: str = 'float32'
  rounds: int = 5
  memory_limit: float = 8.0
  what: str = 'rule'
  configs: tuple = ()

  def at(self, value):
    return self._replace(**{self.axis: value})

  def label(self, value):
    return f'{AXES[self.axis]}={value}'


@dataclasses.dataclass
class TimedProgram:
  """A function at one value of the axis: compiled, then run.

  way: what it computes, such as one of PASSES
  lower() -> jax.stages.Lowered   arguments() -> those of the next run
  keep(results): called after a run
  tokens, flops: of a run; flops are the model's own
  devices: that run it
  """

  name: str
  way: str
  value: int
  at: str = ''  # the value in words, such as 'T=4096'
  lower: Callable[[], Any] | None = None
  arguments: Callable[[], tuple] | None = None
  keep: Callable[[Any], None] = lambda results: None
  tokens: int | None = None
  flops: float | None = None
  devices: int = 1
  compile_seconds: float | None = None
  temporary_bytes: int | None = None
  peak_bytes: int | None = None  # XLA's plan, arguments and results included
  seconds: list = dataclasses.field(default_factory=list)
  difference: float | None = None  # of o from that of the first function
  run: Callable | None = None

  def __str__(self):
    return f'{self.name} {self.way} {self.at}'

  def compile(self):
    start = time.perf_counter()
    self.run = self.lower().compile()
    self.compile_seconds = time.perf_counter() - start
    m = self.run.memory_analysis()
    self.temporary_bytes = m.temp_size_in_bytes
    self.peak_bytes = (
      m.argument_size_in_bytes
      + m.output_size_in_bytes
      + m.temp_size_in_bytes
      - m.alias_size_in_bytes
    )

  def record(self):
    """Everything but the compiled program, for JSON; rates are those of the
    fastest run."""
    best = min(self.seconds, default=None)
    rate = lambda x: x / best if x and best else None
    return {
      'name': self.name,
      'pass': self.way,
      'value': self.value,
      'compile_seconds': self.compile_seconds,
      'temporary_bytes': self.temporary_bytes,
      'peak_bytes': self.peak_bytes,
      'seconds': self.seconds,
      'median': statistics.median(self.seconds) if self.seconds else None,
      'minimum': best,
      'tokens_per_second': rate(self.tokens),
      'flops_per_second': rate(self.flops),
      'difference': self.difference,
    }


def _forward(function, inputs, state, d_o):
  del d_o
  return function(*inputs, state=state)


def _both(function, inputs, state, d_o):
  # returns o, which training needs too
  run = lambda inputs, state: function(*inputs, state=state)
  (o, last), pull = jax.vjp(run, inputs, state)
  return o, pull((d_o, jnp.zeros_like(last)))


def find_functions(settings):
  """{name: function} of the forms, then the peers; touches no device.

  Raises:
    ValueError: a form or peer does not exist or does not take the inputs.
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
  # run, not imported: an import would write bytecode beside the file
  try:
    names = runpy.run_path(path, run_name=pathlib.Path(path).stem)
  except Exception as error:  # the file may raise anything
    raise ValueError(f'{path} cannot be loaded: {_line(error)}') from error
  function = names.get(name)
  if not callable(function):
    raise ValueError(f'{path} has no function {name!r}')
  return function


def _check_peer(peer, function, settings):
  """Traces the peer once per length, so that it fails before any timing."""
  names = ', '.join(_rule(settings).DESCRIPTION.inputs)
  for value in settings.values:
    inputs, state, d_o = infer_shapes(settings.at(value))
    try:
      o, last = jax.eval_shape(
        functools.partial(_forward, function), inputs, state, d_o
      )
      given = f'{o.dtype}{[*o.shape]} and {[*last.shape]}'
    except Exception as error:  # the function may raise anything
      raise ValueError(
        f'{peer} fails as NAME({names}, state=...) -> (o, final state) at'
        f' {settings.axis} {value}: {_line(error)}'
      ) from error
    if (o.shape, o.dtype, last.shape) != (d_o.shape, d_o.dtype, state.shape):
      raise ValueError(
        f'{peer} returns o and state of {given}; the inputs ask for'
        f' {d_o.dtype}{[*d_o.shape]} and {[*state.shape]}'
      )


def _line(error):
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:200]}'


def make_inputs(settings, key):
  """Inputs as a mixer makes them: (inputs, state, d_o).

  Keys have norm 1, queries K^-0.5; values are normal; beta is in (0, 1); decays
  are -softplus(normal - 3), in float32. The state is zero, d_o is normal.
  """
  description, s = _rule(settings).DESCRIPTION, settings
  sizes = {
    'B': s.batch, 'T': s.length, 'J': s.heads // s.grouped, 'H': s.heads,
    'K': s.dim, 'V': s.dim,
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


def infer_shapes(settings):
  """The shapes and dtypes of `make_inputs`."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(functools.partial(make_inputs, settings), key)


def list_programs(settings, functions):
  """The TimedPrograms of the `functions` of `find_functions`."""
  make = jax.jit(make_inputs, static_argnums=0)
  at = {value: settings.at(value) for value in settings.values}
  # of one value all programs share the inputs, which are made when one runs
  inputs = functools.cache(lambda value: make(at[value], jax.random.key(0)))

  def program(name, way, value):
    call = _both if way == PASSES[1] else _forward
    function = jax.jit(functools.partial(call, functions[name]))
    s = at[value]
    return TimedProgram(
      name, way, value, settings.label(value), tokens=s.batch * s.length,
      lower=lambda: function.lower(*infer_shapes(s)),
      arguments=lambda: inputs(value),
    )  # fmt: skip

  return [
    program(name, way, value)
    for value in settings.values
    for way in PASSES
    for name in functions
  ]


def measure_programs(settings, programs, progress, reference=None):
  """Compiles and times TimedPrograms.

  reference: the name of those with whose first result that of the others of
  their value is compared; None: nothing is compared
  """
  for i, program in enumerate(programs):
    progress.show(f'compiling {i + 1}/{len(programs)}: {program}')
    program.compile()
  limit = settings.memory_limit * 1e9
  runnable = [p for p in programs if p.temporary_bytes <= limit]
  once = _warm_up(runnable, progress, reference)
  left = settings.rounds * sum(once)
  for i in range(settings.rounds if runnable else 0):
    progress.show(
      f'round {i + 1}/{settings.rounds}, about {format_span(left)} left'
    )
    for program in runnable:
      program.seconds.append(_time(program)[0])
    left -= sum(once)
  progress.clear()


def _warm_up(programs, progress, reference):
  """Runs each once and compares o with that of `reference`; seconds of each."""
  once, first = [], {}
  for i, program in enumerate(programs):
    progress.show(f'first run {i + 1}/{len(programs)}: {program}')
    seconds, o = _time(program)
    once.append(seconds)
    if program.name == reference:
      first.setdefault(program.value, o)
    elif program.value in first:
      program.difference = _difference(o, first[program.value])
  return once


def _time(program):
  """(seconds, first result) of one run."""
  arguments = jax.block_until_ready(program.arguments())
  start = time.perf_counter()
  results = jax.block_until_ready(program.run(*arguments))
  seconds = time.perf_counter() - start
  program.keep(results)
  return seconds, results[0]


def _difference(o, first):
  o, first = o.astype(jnp.float32), first.astype(jnp.float32)
  return float(jnp.max(jnp.abs(o - first)) / jnp.max(jnp.abs(first)))


def is_same(program, settings):
  """Whether o equals that of the first function up to rounding."""
  difference = program.difference
  return difference is None or difference <= ROUNDING[settings.dtype]
