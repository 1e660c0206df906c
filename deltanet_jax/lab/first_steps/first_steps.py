"""Pairs written into a state one by one, and a trained layer that has to copy
more tokens than its keys are wide."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deltanet_jax.config import experiment, mixers
from deltanet_jax.data.tasks.synthetic import Copy
from deltanet_jax.model import HybridLM
from deltanet_jax.ops import delta_rule, linear_attention
from deltanet_jax.parallel import sharding

WIDTH = 16  # of the keys and values of part 1
PAIRS = 48
DRAWS = 100
TASK = Copy(sizes=(4, 8, 16, 24, 32), symbols=16)


RULES = {
  # S + k (v - S^T k)^T: writes the difference to what k returns
  'delta': lambda k, v, state: delta_rule.step(
    k, k, v, jnp.ones(k.shape[:2]), None, state
  )[1],
  # S + k v^T
  'linear': lambda k, v, state: linear_attention.step(k, k, v, None, state)[1],
}


def write_one_by_one(rule, keys, values):
  """Reads every pair after each write.

  rule: of RULES   keys [B,N,K], values [B,N,V]: B draws of N pairs

  Returns (error, right), [B,N,N] each, by (writes done - 1, pair): the error
  |S^T k - v| / |v|, and whether v is the nearest to S^T k of the values written
  so far. nan for pairs not yet written.
  """
  B, N, K = keys.shape

  def write(state, kv):
    k, v = (x[:, None] for x in kv)
    state = RULES[rule](k, v, state)
    return state, state[:, 0]

  empty = jnp.zeros((B, 1, K, values.shape[-1]))
  by_time = (jnp.moveaxis(x, 1, 0) for x in (keys, values))
  states = jax.lax.scan(write, empty, tuple(by_time))[1]  # [N,B,K,V]
  read = jnp.einsum('NBKV,BIK->BNIV', states, keys)
  written = jnp.arange(N)[:, None] >= jnp.arange(N)  # [writes, pair]
  # |read - v|^2 without |read|^2, which is the same for every v
  far = jnp.sum(values**2, -1)[:, None, None] - 2 * jnp.einsum(
    'BNIV,BJV->BNIJ', read, values
  )
  nearest = jnp.argmin(jnp.where(written[:, None], far, jnp.inf), -1)
  own = jnp.linalg.norm(read - values[:, None], axis=-1)
  size = jnp.linalg.norm(values, axis=-1)[:, None]
  known = lambda x: jnp.where(written, x, jnp.nan)
  return known(own / size), known(1.0 * (nearest == jnp.arange(N)))


def make_pairs(key, draws, pairs, width):
  """Keys of length 1 and values, [draws,pairs,width] each."""
  k, v = jax.random.normal(key, (2, draws, pairs, width))
  return k / jnp.linalg.norm(k, axis=-1, keepdims=True), v


class Overload(NamedTuple):
  """Means over draws, [N,N] by (writes done - 1, pair); nan: not written."""

  error: np.ndarray
  right: np.ndarray

  def share(self, written, part='all'):
    """The share of `written` pairs, or of their oldest or newest quarter, that
    is read right."""
    row, quarter = self.right[written - 1, :written], max(1, written // 4)
    cut = {'all': row, 'oldest': row[:quarter], 'newest': row[-quarter:]}
    return float(cut[part].mean())


def measure_overload(key):
  """{rule: Overload} for the same random pairs."""
  keys, values = make_pairs(key, DRAWS, PAIRS, WIDTH)
  out = {}
  for rule in RULES:
    pairs = jax.jit(functools.partial(write_one_by_one, rule))(keys, values)
    out[rule] = Overload(*(np.asarray(x.mean(0)) for x in pairs))
  return out


def measure_orthogonal_error(key):
  """{rule: largest error} of WIDTH pairs with orthogonal keys."""
  keys, values = make_pairs(key, DRAWS, WIDTH, WIDTH)
  last = _measure_last_errors(jnp.linalg.qr(keys)[0], values)
  return {rule: float(error.max()) for rule, error in last.items()}


def measure_overwrite_error(key, times):
  """{rule: mean error} of the newest value of a key that got `times` values."""
  keys, values = make_pairs(key, DRAWS, times, WIDTH)
  keys = jnp.broadcast_to(keys[:, :1], keys.shape)
  last = _measure_last_errors(keys, values)
  return {rule: float(error[:, -1].mean()) for rule, error in last.items()}


def _measure_last_errors(keys, values):
  """{rule: [B,N]}: the error of every pair once all are written."""
  return {r: write_one_by_one(r, keys, values)[0][:, -1] for r in RULES}


class Copier(NamedTuple):
  """A layer trained to copy, and its accuracy."""

  rule: str
  width: int  # of its keys
  by_size: dict  # number of tokens to copy: accuracy
  by_position: np.ndarray  # accuracy of each token of the longest copy

  @property
  def name(self):
    return f'{self.rule}, keys of {self.width}'


def make_model(rule, width, task, d_model):
  """An embedding, one mixer with one head, an MLP and the output layer."""
  kind = {
    'delta': mixers.DeltaNetConfig, 'linear': mixers.LinearAttentionConfig
  }[rule]  # fmt: skip
  # the short convolution makes keys of the last few tokens
  mixer = kind(1, width, d_model, conv=4, form='recurrent')
  layer = experiment.Layer(mixer, experiment.MLPConfig(2 * d_model))
  return experiment.ModelConfig(task.vocab, d_model, (layer,), repeats=1)


def train_copier(
  rule, width, task, *, steps, seed, show, d_model=64, batch=32, lr=1e-2
):
  """Trains a `Copier`.   show: called with (steps done, loss)"""
  model = HybridLM(make_model(rule, width, task, d_model))
  data, test, start = jax.random.split(jax.random.key(seed), 3)
  mesh = sharding.make_mesh(experiment.MeshConfig())
  params = sharding.init_params(model, start, mesh)
  rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps, lr / 20)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

  def loss(params, example):
    logits, _ = model.apply({'params': params}, example.tokens)
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, example.targets
    )
    return jnp.sum(nats * example.weights) / jnp.sum(example.weights)

  def step(carry, i):
    params, state = carry
    example = task.sample(jax.random.fold_in(data, i), batch)
    value, slope = jax.value_and_grad(loss)(params, example)
    updates, state = optimizer.update(slope, state, params)
    return (optax.apply_updates(params, updates), state), value

  several = jax.jit(lambda carry, ids: jax.lax.scan(step, carry, ids))
  carry = params, optimizer.init(params)
  for ids in jnp.split(jnp.arange(steps), max(1, steps // 30)):
    carry, values = several(carry, ids)
    show(int(ids[-1]) + 1, float(values[-1]))
  return Copier(rule, width, *_judge(model, carry[0], task, test))


def _judge(model, params, task, key, rows=1024):
  """(accuracy by size, by position of the largest size) on new rows."""
  example = task.sample(key, rows)
  logits, _ = jax.jit(model.apply)({'params': params}, example.tokens)
  right = np.asarray(jnp.argmax(logits, -1) == example.targets)
  questions = np.asarray(example.weights) > 0
  size, place = (np.asarray(example.slices[n]) for n in ('size', 'position'))
  mean = lambda where: float(right[questions & where].mean())
  sizes = sorted(task.sizes)
  last = size == sizes[-1]
  return (
    {n: mean(size == n) for n in sizes},
    np.array([mean(last & (place == i)) for i in range(sizes[-1])]),
  )


def draw_state(overloads, path):
  """Draws the error of every pair after every write, a panel per rule."""
  from deltanet_jax.lab import plots

  figure, axes = plots.make_figure((10, 5), len(overloads), share_y=True)
  for panel, (rule, overload) in zip(axes, overloads.items(), strict=True):
    image = panel.imshow(
      overload.error.T, origin='lower', vmin=0, vmax=1.5, cmap='viridis',
      extent=(0.5, PAIRS + 0.5, 0.5, PAIRS + 0.5),
    )  # fmt: skip
    panel.axvline(WIDTH + 0.5, color='0.3', lw=1, ls='--')
    panel.text(WIDTH + 1, PAIRS - 1, f'width of a key: {WIDTH}', va='top')
    panel.set(title=rule, xlabel='pairs written')
  axes[0].set(ylabel='pair, in the order of writing')
  figure.colorbar(
    image, ax=axes, label='error of the value read, |S^T k - v| / |v|'
  )
  plots.save_figure(figure, path)


def draw_copiers(copiers, path):
  """Draws accuracy by length, and by position in the longest copy."""
  from deltanet_jax.lab import plots

  figure, (left, right) = plots.make_figure((11, 4.4), 2, share_y=True)
  widths = sorted({c.width for c in copiers})
  for c in copiers:
    style = {
      'color': plots.PALETTE[widths.index(c.width)], 'label': c.name,
      'ls': '-' if c.rule == 'delta' else ':',
    }  # fmt: skip
    left.plot(*zip(*c.by_size.items(), strict=True), marker='o', ms=4, **style)
    right.plot(np.arange(1, len(c.by_position) + 1), c.by_position, **style)
  for i, width in enumerate(widths):
    left.axvline(width, color=plots.PALETTE[i], lw=1, ls='--', alpha=0.5)
  sizes = list(copiers[0].by_size)
  left.set(xlabel='tokens to copy (dashed: width of the keys)', ylim=(0, 1.03))
  left.set_xscale('log', base=2)
  left.set_xticks(sizes, [str(n) for n in sizes])
  left.set(ylabel='share of tokens that is right')
  right.set(xlabel=f'position among the {sizes[-1]} tokens to copy')
  right.legend(frameon=False)
  for axes in (left, right):
    plots.style_axes(axes)
  plots.save_figure(figure, path)
