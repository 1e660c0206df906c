"""The compiled program of a job: trains and scores all members at once.

A member is a learning rate with a seed. Members are vmapped, data are drawn on
the device, and a seed gives every variant the same data.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deltanet_jax import model
from deltanet_jax.config.experiment import OptimConfig
from deltanet_jax.config.mixers import DSAConfig
from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.parallel import sharding
from deltanet_jax.train import optimizer

EVALUATION = 2**31 - 1  # the step number that draws evaluation data


class Scores(NamedTuple):
  """Scores of every target; M members, I sequences."""

  correct: Any  # [M,I,T] bool
  nats: Any  # [M,I,T] float32
  weights: Any  # [M,I,T], 0: no target
  slices: dict  # name -> [M,I,T] int32
  tokens: Any  # [M,I,T] int32, the input


class StudyProgram(NamedTuple):
  """init: seeds [M] -> state
  advance: (state, rates [M], seeds [M], start, stop) -> (state, Scores): trains
  the steps start, ..., stop - 1, then scores; start == stop only scores
  """

  init: Any
  advance: Any


def make_program(cfg, model_cfg, task, steps):
  """The StudyProgram that trains `model_cfg` on `task` for `steps`."""
  lm = model.HybridLM(model_cfg, jnp.dtype(cfg.dtype))
  axes = sharding.find_logical_axes(lm)
  rules = OptimConfig(
    warmup=cfg.warmup, weight_decay=cfg.weight_decay, clip=cfg.clip, final=0.0
  )
  make_adam = lambda rate: optimizer.make_optimizer(rules, steps, axes, lr=rate)
  loss = _make_loss(cfg, model_cfg)

  def member(state, rate, seed, start, stop):
    data = jax.random.fold_in(jax.random.key(seed), 1)
    draw = lambda step, batch: task.sample(
      jax.random.fold_in(data, step), batch
    )
    sample = lambda step: draw(step, cfg.batch)
    state = _train(loss, make_adam(rate), sample, state, start, stop)
    return state, _score(lm, state[0], draw(EVALUATION, cfg.items))

  # compiles sooner than a vmap over seeds
  init = jax.jit(lambda seed: _init(lm, make_adam(1.0), seed))

  def begin(seeds):
    return jax.tree.map(lambda *x: jnp.stack(x), *map(init, seeds))

  advance = jax.vmap(member, in_axes=(0, 0, 0, None, None))
  return StudyProgram(begin, jax.jit(advance, donate_argnums=(0,)))


def _init(lm, adam, seed):
  """Parameters and optimizer state of a member."""
  plain = jax.tree.structure(sharding.make_abstract_params(lm))
  boxed = lm.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
  # without the boxes that hold axis names
  params = jax.tree.unflatten(plain, jax.tree.leaves(boxed['params']))
  # unit-variance embeddings: with smaller ones, small models do not learn
  # lookup within some hundred steps
  params['backbone']['embed'] /= model.EMBED_STD
  return params, adam.init(params)


def _make_loss(cfg, model_cfg):
  sparse = any(isinstance(x.mixer, DSAConfig) for x in model_cfg.layers)
  # the choice of keys has no gradient, so the indexer has a loss of its own
  weights = NextTokenConfig(indexer=float(sparse))
  objective = weights.make(model_cfg, jnp.dtype(cfg.dtype))

  def loss(params, example):
    batch = {
      'tokens': example.tokens, 'targets': example.targets,
      'weights': example.weights, 'positions': None, 'segment_ids': None,
    }  # fmt: skip
    total, _ = objective(params, batch)
    return total / example.weights.sum()

  return loss


def _train(loss, adam, sample, state, start, stop):
  def step(i, state):
    params, moments = state
    grads = jax.grad(loss)(params, sample(i))
    updates, moments, _ = adam.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments

  return jax.lax.fori_loop(start, stop, step, state)


def _score(lm, params, example):
  logits, _ = lm.apply({'params': params}, example.tokens)
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, example.targets
  )
  correct = logits.argmax(-1) == example.targets
  return Scores(correct, nats, example.weights, example.slices, example.tokens)


def scale_decay(params, scale):
  """`params` with decay e^(scale g) instead of e^g, by a shift of A_log: every
  log-decay is g = -exp(A_log) softplus(.)."""

  def shift(path, x):
    if path[-1].key != 'A_log':
      return x
    return x + (math.log(scale) if scale else -math.inf)

  return jax.tree_util.tree_map_with_path(shift, params)
