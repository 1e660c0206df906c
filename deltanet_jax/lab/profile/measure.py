"""Time and memory of prefill and decoding at a context.

All models are compiled and run once; then they run in turn, round by round, so
that what slows the machine slows all of them.
"""

import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config.sampling import Sampling
from deltanet_jax.infer import cache_growth
from deltanet_jax.infer.generate import make_advance
from deltanet_jax.lab import full_cache
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.profile.plan import STEPS, WARM
from deltanet_jax.model import init_cache

GREEDY = Sampling(temperature=0.0)
# what is timed, in this order
WHATS = 'prefill', 'decode', 'largest', 'restore'


class Skip(Exception):
  """Why a measurement is not run."""


class Subject:
  """A model to measure, with its programs compiled once per shape."""

  def __init__(self, name, cfg, params, settings):
    self.name = name
    self.cfg = cfg
    self.settings = settings
    self.dtype = jnp.dtype(settings.dtype)
    self.params = params
    self.parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    self._programs = {}
    self._makers = {}

  def shapes(self, batch, slots):
    return jax.eval_shape(
      lambda: init_cache(self.cfg, batch, slots, self.dtype)
    )

  def program(self, batch, tokens, slots):
    """(params, cache (donated), tokens, key) -> (token, cache), compiled."""
    cache = self.shapes(batch, slots)
    key = batch, tokens, *(x.shape for x in jax.tree.leaves(cache))
    if key not in self._programs:
      advance = make_advance(self.cfg, self.dtype, GREEDY, self.cfg.vocab)
      ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
      self._programs[key] = advance.lower(
        self.params, cache, ids, jax.random.key(0)
      ).compile()
    return self._programs[key]

  def make(self, function, batch, slots):
    """The cache of `function`, which is compiled for its shape."""
    key = function, batch, slots
    if key not in self._makers:
      self._makers[key] = jax.jit(lambda: function(self, batch, slots))
    return self._makers[key]()

  def largest_batch(self, context):
    """(sequences whose caches fit beside the parameters, whether max_batch is
    the limit)."""
    size = lambda n: calc.count_total_bytes(self.cfg, context, n, self.dtype)
    each = size(2) - size(1)
    shared = self.parameter_bytes + size(1) - each
    left = self.settings.budget_gib * 2**30 - shared
    fits = int(max(0, left // each))
    return min(fits, self.settings.max_batch), fits > self.settings.max_batch


def make_empty_cache(subject, batch, slots):
  """An empty cache."""
  return init_cache(subject.cfg, batch, slots, subject.dtype)


def make_nearly_full_cache(subject, batch, slots):
  """A cache with room for STEPS + WARM more tokens."""
  length = slots - STEPS - WARM
  return full_cache.make_cache(subject.cfg, batch, slots, length, subject.dtype)


class Measurement:
  """One model, context and quantity: `run` measures it once.

  prefill: a prompt of `context` tokens up to the first token. decode: one
  token, the mean of the last STEPS of the context. largest: the same with as
  many sequences as fit the budget. restore: copy of the cache from host to
  device.
  """

  def __init__(self, subject, what, context):
    self.subject = subject
    self.what = what
    self.context = context
    self.batch, self.capped = 1, None
    if what == 'largest':
      self.batch, self.capped = subject.largest_batch(context)
    self.program_bytes = self.cache_bytes = self.device_peak_bytes = None
    self.once = None  # seconds of a run, with its untimed parts
    self.rounds = 0
    self.seconds = []
    self.skipped = None
    self._programs = []

  def __str__(self):
    return f'{self.subject.name} {self.what}'

  def attempt(self, action):
    """Runs `action`; if memory is short, notes why this is skipped."""
    if self.skipped:
      return
    try:
      action()
    except Skip as skip:
      self.skipped = str(skip)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      self.skipped = 'out of memory'

  def compile(self):
    if not self.batch:
      raise Skip(
        f'one sequence does not fit in {self.subject.settings.budget_gib:g} GiB'
      )
    if self.what == 'restore':
      return
    length = self.context if self.what == 'prefill' else 1
    tokens = jnp.zeros((self.batch, length), jnp.int32)
    self._programs = [
      (part, self.subject.program(self.batch, part.shape[1], self.context))
      for part in cache_growth.split_prompt(tokens)
    ]
    self.program_bytes = max(_peak(p) for _, p in self._programs)
    limit = find_memory_limit()
    if self.program_bytes > limit:
      raise Skip(
        f'needs {self.program_bytes / 2**30:.1f} of {limit / 2**30:.1f} GiB'
      )

  def expect(self, before):
    """Skips what would take too long.   before: the record of the same at a
    shorter context, or None"""
    if before is None or not before['seconds']:
      # a batch gets smaller with the context, a prompt does not
      if before is not None and self.what != 'largest':
        raise Skip(f'not at {before["context"]}: {before["skipped"]}')
      return
    grows = self.context / before['context']
    seconds = statistics.median(before['seconds'])
    seconds *= self.batch / before['batch']
    attends = calc.find_mixer(self.subject.cfg, recurrent=False) is not None
    self._check(seconds * grows ** (attends + (self.what == 'prefill')))

  def _check(self, seconds):
    """seconds: of one timing, as recorded."""
    seconds *= STEPS if self.what in ('decode', 'largest') else 1
    limit = self.subject.settings.seconds
    if seconds > limit:
      raise Skip(f'would take about {seconds:.0f} s; the limit is {limit:g}')

  def warm_up(self):
    start = time.perf_counter()
    self.run(first=True)
    self.once = time.perf_counter() - start
    self.rounds = int(self.subject.settings.seconds / self.once)
    self.rounds = min(self.subject.settings.rounds, max(1, self.rounds))
    if self.rounds > 1:
      self.seconds = []  # the first run is slower

  def run(self, first=False):
    getattr(self, f'_{self.what}')(first)

  def _prefill(self, first):
    del first
    subject, key = self.subject, jax.random.key(0)
    start = time.perf_counter()
    cache = subject.make(make_empty_cache, 1, self.context)
    for tokens, program in self._programs:
      token, cache = program(subject.params, cache, tokens, key)
    int(token[0])
    self._measured(time.perf_counter() - start, cache)

  def _decode(self, first):
    cache = self.subject.make(make_nearly_full_cache, self.batch, self.context)
    ((tokens, program),) = self._programs
    key = jax.random.key(0)

    def advance(cache, tokens, steps):
      start = time.perf_counter()
      for _ in range(steps):
        token, cache = program(self.subject.params, cache, tokens, key)
        tokens = token[:, None]
      jax.block_until_ready(tokens)
      return (time.perf_counter() - start) / steps, cache, tokens

    seconds, cache, tokens = advance(cache, tokens, WARM)
    if first:
      self._check(seconds)
    seconds, cache, _ = advance(cache, tokens, STEPS)
    self._measured(seconds, cache)

  _largest = _decode

  def _restore(self, first):
    del first
    cache = self.subject.make(make_nearly_full_cache, 1, self.context)
    saved = jax.tree.map(lambda x: np.array(x), cache)
    del cache
    start = time.perf_counter()
    cache = jax.device_put(saved, jax.devices()[0], may_alias=False)
    jax.block_until_ready(cache)
    self._measured(time.perf_counter() - start, cache)

  def _measured(self, seconds, cache):
    """Notes the time and the bytes of the cache in memory."""
    layers = cache.prefix, cache.period, cache.suffix
    self.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(layers))
    calculated = calc.count_total_bytes(
      self.subject.cfg, self.context, self.batch, self.subject.dtype
    )
    if self.cache_bytes != calculated:
      raise AssertionError(
        f'{self}: the cache of {self.context} tokens has {self.cache_bytes}'
        f' bytes and the calculator says {calculated}'
      )
    stats = jax.devices()[0].memory_stats()
    if stats:
      self.device_peak_bytes = stats['peak_bytes_in_use']
    self.seconds.append(seconds)

  def record(self):
    """The record for JSON; seconds are those of a prompt, token or copy."""
    names = (
      'what', 'context', 'batch', 'capped', 'skipped', 'seconds',
      'cache_bytes', 'program_bytes', 'device_peak_bytes',
    )  # fmt: skip
    return {'model': self.subject.name, **{n: getattr(self, n) for n in names}}


def _peak(program):
  """Peak bytes of the program as XLA plans it: arguments (parameters and cache
  included), results and temporaries."""
  m = program.memory_analysis()
  return (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    + m.temp_size_in_bytes
    - m.alias_size_in_bytes
  )


def find_memory_limit():
  """Bytes available to a program: those of the device, or free on a CPU."""
  stats = jax.devices()[0].memory_stats()
  if stats:
    return stats['bytes_limit']
  return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def measure_context(subjects, context, before, show):
  """Measures every subject at a context; returns the records.

  before: the records of the context before, or []
  show: called with a progress line and the seconds left here, or None
  """
  runs = [Measurement(s, what, context) for what in WHATS for s in subjects]
  before = {(r['model'], r['what']): r for r in before}
  for i, run in enumerate(runs):
    show(f'compiling {i + 1}/{len(runs)}: {run}', None)
    past = before.get((run.subject.name, run.what))
    run.attempt(functools.partial(run.expect, past))
    run.attempt(run.compile)
  for i, run in enumerate(runs):
    show(f'first run {i + 1}/{len(runs)}: {run}', None)
    run.attempt(run.warm_up)
  turns = [
    (i, run)
    for i in range(subjects[0].settings.rounds)
    for run in runs
    if not run.skipped and len(run.seconds) + i < run.rounds
  ]
  left = sum(run.once for _, run in turns)
  for i, run in turns:
    show(f'round {i + 1}: {run}', left)
    run.attempt(run.run)
    left -= run.once
  return [run.record() for run in runs]
