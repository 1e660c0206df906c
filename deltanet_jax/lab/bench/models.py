"""The programs of layers and models that `bench` times: a mixer, a training
step, a prompt, a token."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import config, flops
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Experiment, MeshConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.infer.cache_growth import split_prompt
from deltanet_jax.infer.generate import make_advance
from deltanet_jax.lab import full_cache
from deltanet_jax.lab.bench.bench import PASSES, TimedProgram
from deltanet_jax.lab.cost import calc
from deltanet_jax.mixers.base import Context
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding
from deltanet_jax.train.program import BATCH, make_program

GREEDY = Sampling(temperature=0.0)
STEPS = 64  # decoded tokens, the last of a context


class _Model(NamedTuple):
  """A configuration in one form, and what its programs share: `held`."""

  name: str
  experiment: Experiment
  held: dict

  @property
  def dtype(self):
    return jnp.dtype(self.experiment.train.dtype)

  @property
  def params(self):
    """Random weights, made when the first program runs."""
    if 'params' not in self.held:
      model = HybridLM(self.experiment.model, self.dtype)
      mesh = sharding.make_mesh(MeshConfig())
      key = jax.random.key(0)
      self.held['params'] = sharding.init_params(model, key, mesh)
    return self.held['params']

  @property
  def shapes(self):
    """Those of `params`."""
    return sharding.make_abstract_params(
      HybridLM(self.experiment.model, self.dtype)
    )


def list_programs(settings):
  """The TimedPrograms of `settings.what` of every configuration and form.

  Raises:
    ConfigError: a configuration is wrong, or has no program of these sizes.
  """
  make = {
    'layer': _list_layers,
    'step': _make_step,
    'prefill': _make_prefill,
    'decode': _make_decoding,
  }[settings.what]
  models = [
    _Model(
      name if settings.forms == ('auto',) else f'{name} {form}',
      _with_form(config.load(name), form),
      {},
    )
    for name in settings.configs
    for form in settings.forms
  ]
  return [
    program
    for value in settings.values
    for model in models
    for program in make(model, settings.at(value), value, settings.label(value))
  ]


def _with_form(experiment, form):
  """The Experiment with all its recurrences in a form."""

  def change(layer):
    if not hasattr(layer.mixer, 'chunk'):
      return layer
    mixer = dataclasses.replace(layer.mixer, form=form)
    return dataclasses.replace(layer, mixer=mixer)

  model, parts = experiment.model, ('prefix', 'period', 'suffix')
  try:
    changed = {p: tuple(map(change, getattr(model, p))) for p in parts}
  except ValueError as error:
    raise ConfigError(str(error)) from error
  model = dataclasses.replace(model, **changed)
  return dataclasses.replace(experiment, model=model)


def _list_layers(model, s, *at):
  """Every mixer of the model once, alone, forward and with all gradients."""
  cfg, dtype = model.experiment.model, model.dtype
  shape = s.batch, s.length, cfg.d_model
  x = jax.ShapeDtypeStruct(shape, dtype)
  programs = []
  for mixer in dict.fromkeys(layer.mixer for layer in cfg.layers):
    module = mixer.make(d_model=cfg.d_model, dtype=dtype)
    ctx = Context(jnp.arange(s.length)[None] + jnp.zeros((s.batch, 1), int))
    forward = lambda params, x, module=module, ctx=ctx: module.apply(
      params, x, ctx
    )[0]
    both = functools.partial(_pull_back, forward)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    once = flops.count_operations(forward, params, x)

    def arguments(module=module):
      key = jax.random.key(0)
      x = jax.random.normal(key, shape, dtype)
      return jax.jit(module.init)(key, x[:1, :1]), x

    make = functools.cache(arguments)
    for way, function, times in zip(
      PASSES, (forward, both), (1, 3), strict=True
    ):
      jitted = jax.jit(function)
      lower = functools.partial(jitted.lower, params, x)
      programs.append(
        TimedProgram(
          f'{model.name} {calc.name_kind(mixer)}', way, *at, lower, make,
          tokens=s.batch * s.length, flops=times * once,
        )
      )  # fmt: skip
  return programs


def _pull_back(forward, params, x):
  y, pull = jax.vjp(forward, params, x)
  return y, pull(y)


def _make_step(model, s, *at):
  """The training step, on all devices."""
  old = model.experiment
  try:
    experiment = dataclasses.replace(
      old,
      mesh=old.mesh.fill(jax.device_count()),
      data=dataclasses.replace(old.data, batch=s.batch, seq_len=s.length),
    )
    mesh = sharding.make_mesh(experiment.mesh)
  except ValueError as error:
    raise ConfigError(f'{model.name}: {error}') from error
  program, held = make_program(experiment, mesh), model.held

  def lower():
    with jax.set_mesh(mesh):
      return program.step.lower(program.abstract, program.batch)

  @functools.cache
  def make_batch():
    tokens = jax.random.randint(
      jax.random.key(0), (s.batch, s.length), 0, old.model.vocab
    )
    every = {
      'tokens': tokens,
      'targets': jnp.roll(tokens, -1, 1),
      'positions': jnp.broadcast_to(jnp.arange(s.length), tokens.shape),
      'segment_ids': jnp.zeros_like(tokens),
      'weights': jnp.ones_like(tokens),
    }
    return {
      name: jax.device_put(
        every[name].astype(dtype), program.batch[name].sharding
      )
      for name, dtype in BATCH.items()
    }

  def arguments():
    # the state of the step before is donated, whatever its length
    state = held.pop('state', None) or program.begin(program.init())
    return state, make_batch()

  tokens = s.batch * s.length
  return [
    TimedProgram(
      model.name, 'training step', *at, lower, arguments,
      keep=lambda results: held.update(state=results[0]), tokens=tokens,
      devices=mesh.size,
      flops=3 * tokens * calc.count_flops(experiment.model, s.length),
    )
  ]  # fmt: skip


def _make_prefill(model, s, *at):
  """A prompt in an empty cache, up to the first token."""
  cfg = model.experiment.model
  advance = make_advance(cfg, model.dtype, GREEDY, cfg.vocab)

  @jax.jit
  def run(params, tokens, key):
    cache = init_cache(cfg, s.batch, s.length, model.dtype)
    for piece in split_prompt(tokens):
      token, cache = advance(params, cache, piece, key)
    return token, cache

  ids = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
  zeros = functools.cache(lambda: jnp.zeros(ids.shape, jnp.int32))
  tokens = s.batch * s.length
  return [
    TimedProgram(
      model.name, 'prefill', *at,
      lambda: run.lower(model.shapes, ids, jax.random.key(0)),
      lambda: (model.params, zeros(), jax.random.key(0)),
      tokens=tokens, flops=tokens * calc.count_flops(cfg, s.length),
    )
  ]  # fmt: skip


def _make_decoding(model, s, *at):
  """One token of each sequence in a nearly full cache."""
  if s.length <= STEPS:
    raise ConfigError(
      f'--length={s.length}: decoding is timed in a cache of more than {STEPS}'
      ' tokens'
    )
  cfg = model.experiment.model
  advance = make_advance(cfg, model.dtype, GREEDY, cfg.vocab)
  new = lambda: init_cache(cfg, s.batch, s.length, model.dtype)
  ids = jax.ShapeDtypeStruct((s.batch, 1), jnp.int32)
  held = {'left': 0}

  def lower():
    cache = jax.eval_shape(new)
    return advance.lower(model.shapes, cache, ids, jax.random.key(0))

  def arguments():
    if not held['left']:
      held['cache'] = make_full()
      held['left'] = STEPS
    cache, key = held.pop('cache'), jax.random.key(0)
    return model.params, cache, jnp.zeros(ids.shape, jnp.int32), key

  def keep(results):
    held['cache'] = results[1]
    held['left'] -= 1

  @jax.jit
  def make_full():
    length = s.length - STEPS
    return full_cache.make_cache(cfg, s.batch, s.length, length, model.dtype)

  return [
    TimedProgram(
      model.name, 'decoding', *at, lower, arguments, keep, tokens=s.batch,
      flops=s.batch * calc.count_decoding_flops(cfg, s.length),
    )
  ]  # fmt: skip
