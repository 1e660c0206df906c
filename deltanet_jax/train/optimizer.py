"""AdamW and Muon, their schedules, and the choice between them per weight."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deltanet_jax.config.experiment import OptimConfig
from deltanet_jax.parallel.sharding import LogicalAxes, Params

Flags = dict[str, 'Flags | bool']  # a tree like the parameters'

_HIDDEN = ('embed', 'mlp', 'latent')  # axes that make an array a hidden matrix
_STACKED = ('layers', 'experts')  # axes along which matrices are stacked


class Optimizer(NamedTuple):
  """init(params) -> state; update(grads, state, params) -> (updates, state,
  rate), rate the learning rate that the updates include."""

  init: Callable[[Params], optax.OptState]
  update: Callable[
    [Params, optax.OptState, Params], tuple[Params, optax.OptState, jax.Array]
  ]


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """step -> learning rate as a fraction of the peak, with a linear warm-up.

  cosine: falls to `cfg.final` at the last step; wsd (warm-up, stable, decay):
  1, then linear to `cfg.final` over the last `cfg.decay` of the steps;
  constant: 1.
  """

  def factor(step):
    step = jnp.asarray(step, jnp.float32)
    warm = (step + 1) / (cfg.warmup + 1)
    if cfg.schedule == 'constant':
      rate = 1.0
    elif cfg.schedule == 'cosine':
      x = (step - cfg.warmup) / max(1, steps - 1 - cfg.warmup)
      wave = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(x, 0, 1)))
      rate = cfg.final + (1 - cfg.final) * wave
    else:
      tail = max(1.0, cfg.decay * steps)
      x = jnp.clip((step - (steps - 1 - tail)) / tail, 0, 1)
      rate = 1 - (1 - cfg.final) * x
    return jnp.minimum(warm, 1.0) * rate

  return factor


def find_matrix_axes(
  axes: Sequence[str | None],
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """The indices (inputs, outputs) of a weight's axes as a matrix, or None.

  axes: the weight's logical axis names. 'layers' and 'experts' stack separate
  matrices. A first 'embed' is the input, a last 'embed' the output, and the
  other axes are the other side: ('layers', 'embed', 'heads', 'head_k') is a
  D x HK matrix in each layer. None for what is no hidden matrix: embedding and
  head ('vocab'), norms, biases, taps of a convolution.
  """
  names = [(i, name) for i, name in enumerate(axes) if name not in _STACKED]
  kinds = {name for _, name in names}
  if len(names) < 2 or kinds & {'vocab', 'conv'} or not kinds & set(_HIDDEN):
    return None
  inputs = len(names) - 1 if names[-1][1] == 'embed' else 1
  index = tuple(i for i, _ in names)
  return index[:inputs], index[inputs:]


def _dimension_numbers(axes, label):
  """Muon's dimension numbers of a weight with these axes."""
  if label != 'muon':
    return optax.transforms.MaskedNode()
  return optax.contrib.MuonDimensionNumbers(*find_matrix_axes(axes))


def _muon(dims):
  """Orthogonalized momentum, times sqrt(max(1, fan_out / fan_in))."""

  def rescale(update, dim):
    fans = [
      math.prod(update.shape[i] for i in side)
      for side in (dim.reduction_axis, dim.output_axis)
    ]
    return update * math.sqrt(max(1.0, fans[1] / fans[0]))

  return optax.chain(
    optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=dims),
    optax.stateless(lambda updates, _: jax.tree.map(rescale, updates, dims)),
  )


def make_optimizer(
  cfg: OptimConfig,
  steps: int,
  axes: LogicalAxes,
  trainable: Flags | None = None,
  lr: jax.Array | None = None,
) -> Optimizer:
  """The Optimizer of a run; the rate that it returns is Adam's.

  steps: of the whole run
  axes: the parameters' tree, with PartitionSpecs of logical axis names
  trainable: the same tree of bool; False: a parameter stays as it is and has
    no moments; None: all are trained
  lr: an array in place of `cfg.lr`

  The gradient is clipped to global norm `cfg.clip`. 'muon' orthogonalizes
  every hidden matrix (`find_matrix_axes`) and leaves the rest to Adam. Weight
  decay, times the rate, acts on hidden matrices, embedding and head alone.
  """
  factor = make_schedule(cfg, steps)
  if trainable is None:
    trainable = jax.tree.map(lambda a: True, axes)
  hidden = 'muon' if cfg.name == 'muon' else 'adam'
  labels = jax.tree.map(
    lambda a, m: (hidden if find_matrix_axes(a) else 'adam') if m else 'fixed',
    axes,
    trainable,
  )
  dims = jax.tree.map(_dimension_numbers, axes, labels)
  decayed = jax.tree.map(
    lambda a: find_matrix_axes(a) is not None or 'vocab' in a, axes
  )
  adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
  fixed = optax.set_to_zero()
  chain = optax.chain(
    optax.clip_by_global_norm(cfg.clip),
    optax.partition(
      {'muon': _muon(dims), 'adam': adam, 'fixed': fixed}, labels
    ),
    optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
    optax.partition(
      {'muon': _descend('muon'), 'adam': _descend('adam'), 'fixed': fixed},
      labels,
    ),
  )
  peaks = {'muon': cfg.muon_lr, 'adam': cfg.lr if lr is None else lr}

  def update(grads, state, params):
    count = state[-1].inner_states['adam'].inner_state.count
    part = factor(count)
    rates = {name: peak * part for name, peak in peaks.items()}
    updates, state = chain.update(grads, state, params, rates=rates)
    return updates, state, rates['adam']

  return Optimizer(chain.init, update)


def _descend(name):
  """Multiplies updates by -rates[name], an argument of update; the state counts
  steps, as in optax's schedules."""

  def update(updates, state, params=None, *, rates, **others):
    del params, others
    step = -rates[name]
    updates = jax.tree.map(lambda x: step.astype(x.dtype) * x, updates)
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count)

  init = lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
  return optax.GradientTransformationExtraArgs(init, update)
