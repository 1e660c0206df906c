"""One cell of a study: one arm on one task, from the choice of the learning
rate to the scores of the fresh seeds."""

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config.mixers import GatedDeltaNetConfig, KDAConfig
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.study import config, program

VALIDATION = 1000  # the seed that chooses the learning rate
TIE = 0.02  # of accuracy
FRESH = 2000  # the first of those that are scored
DECAYS = (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)  # factors of a learned log-decay
BUDGETS = 0.25, 0.5, 1.0  # parts of the steps at which every slice is scored


class Stopped(Exception):
  """The study was asked to end."""


def match_parameters(cfg, cell, vocab):
  """(ModelConfig, parameters) of the cell's arm, its MLP as wide as makes the
  parameters those of `full`."""
  build = lambda arm, hidden: config.make_model(
    cfg, arm, vocab, cell.layers, hidden
  )
  count = lambda *arm: calc.count_parameters(build(*arm))
  goal = count('full', cfg.hidden)
  low, high = count(cell.arm, 1), count(cell.arm, 2)
  hidden = 1 + round((goal - low) / (high - low))  # an affine function
  if hidden < 1:
    raise ValueError(
      f'{cell.arm} without an MLP has {low} parameters and full has {goal};'
      ' raise hidden'
    )
  return build(cell.arm, hidden), low + (hidden - 1) * (high - low)


def run_cell(cfg, cell, task, tell=lambda done: None):
  """(rows, arrays) of the cell.

  rows: dicts of results.jsonl   arrays: of the fresh seeds' last scores, for
  the bootstrap; empty when no learning rate stayed finite   tell: called with
  the share of the work that is done; may raise Stopped
  """
  model_cfg, parameters = match_parameters(cfg, cell, task.vocab)
  facts = {
    'task': cell.task, 'model': cell.arm, 'layers': cell.layers,
    'parameters': parameters,
    'cache_floats': count_cache_floats(model_cfg, task.length),
    'vocab': task.vocab, 'length': task.length,
  }  # fmt: skip
  compiled = program.make_program(cfg, model_cfg, task, cell.steps)
  trainer, rows = _Trainer(cfg, cell, compiled), []
  report = lambda share: tell(share / 2)
  for _, step, scores in trainer.train(cfg.lrs, [VALIDATION], report):
    scored = [score_all(scores, i) for i in range(len(cfg.lrs))]
    for lr, score in zip(cfg.lrs, scored, strict=True):
      rows.append(facts | _at('grid', lr, VALIDATION, step, cell) | score)
  lr = choose_rate(cfg.lrs, scored)
  if lr is None:
    return rows, {}
  seeds = list(range(FRESH, FRESH + cfg.seeds))
  report = lambda share: tell((1 + share) / 2)
  for state, step, scores in trainer.train([lr], seeds, report):
    trained = state
    full = step in [round(part * cell.steps) for part in BUDGETS]
    levels = task.levels if full else {}
    for i, seed in enumerate(seeds):
      head = facts | _at('fresh', lr, seed, step, cell)
      rows += [head | x for x in score_slices(scores, i, levels)]
  arrays = select_scores(scores, cfg.seeds)
  rows += _decays(trainer, trained, lr, seeds, facts, cell, model_cfg)
  return rows, arrays


def _at(phase, lr, seed, step, cell):
  return {
    'phase': phase, 'lr': lr, 'seed': seed, 'step': step, 'steps': cell.steps,
    'slice': 'all',
  }  # fmt: skip


class _Trainer:
  """A compiled program and how it is driven."""

  def __init__(self, cfg, cell, compiled):
    self.cfg, self.cell, self.program = cfg, cell, compiled
    self.members = max(len(cfg.lrs), cfg.seeds)
    self.advance = None

  def call(self, state, rates, seeds, start, stop):
    steps = jnp.int32(start), jnp.int32(stop)
    args = (state, *self._lanes(rates, seeds), *steps)
    if self.advance is None:
      self.advance = self.program.advance.lower(*args).compile()
    state, scores = self.advance(*args)
    return state, jax.device_get(scores)

  def _lanes(self, rates, seeds):
    """Arrays [M] of both; the last of a list fills the lanes left over."""
    fill = lambda x: list(x) + [x[-1]] * (self.members - len(x))
    return jnp.float32(fill(rates)), jnp.int32(fill(seeds))

  def train(self, rates, seeds, tell):
    """Yields (state, step, scores) after each dispatch."""
    state = self.program.init(self._lanes(rates, seeds)[1])
    for start in range(0, self.cell.steps, self.cfg.chunk):
      stop = start + self.cfg.chunk
      state, scores = self.call(state, rates, seeds, start, stop)
      tell(stop / self.cell.steps)
      yield state, stop, scores


def _decays(trainer, state, lr, seeds, facts, cell, model_cfg):
  """Rows of the trained models with every learned log-decay scaled."""
  learned = GatedDeltaNetConfig, KDAConfig
  if cell.task not in ('mqar', 'deep') or not any(
    isinstance(layer.mixer, learned) for layer in model_cfg.layers
  ):
    return []
  rows = []
  for scale in DECAYS:
    # a copy: the call gives its state's memory away
    params, moments = jax.tree.map(jnp.copy, state)
    changed = program.scale_decay(params, scale), moments
    _, scores = trainer.call(changed, [lr], seeds, cell.steps, cell.steps)
    for i, seed in enumerate(seeds):
      head = _at('decay', lr, seed, cell.steps, cell)
      rows.append(facts | head | {'scale': scale} | score_all(scores, i))
  return rows


def count_cache_floats(model_cfg, context):
  """Numbers that decoding keeps of one sequence of `context` tokens; the
  local layer, the same in every arm, included."""
  sizes = calc.count_cache_bytes(model_cfg, context, 1, jnp.float32)
  return sum(sizes.values()) // 4


def score_all(scores, member, chosen=None):
  """What member `member` scored over all targets, or those `chosen` [I,T]:
  accuracy, sequences without a mistake, nats a target, and their number.
  A model that is not finite has no accuracy."""
  weights = np.asarray(scores.weights[member], np.float64)
  if chosen is not None:
    weights = weights * chosen
  nats = np.asarray(scores.nats[member], np.float64)
  count, finite = weights.sum(), bool(np.isfinite(nats).all())
  score = {'accuracy': None, 'exact': None, 'nats': None}
  if finite and count:
    wrong = (weights * ~scores.correct[member]).sum(1)
    exact = wrong[weights.sum(1) > 0] == 0
    score = {
      'accuracy': float(1 - wrong.sum() / count),
      'exact': float(exact.mean()),
      'nats': float((weights * nats).sum() / count),
    }
  return score | {'targets': int(count), 'finite': finite}


def score_slices(scores, member, levels):
  """The row over all targets, and one for each level of each slice in
  `levels` {name: values}: 'pairs=8'. A number between two levels counts for
  the lower one."""
  out = [score_all(scores, member)]
  questions = scores.weights[member] > 0
  for name, values in levels.items():
    values = np.asarray(values)
    labels = scores.slices[name][member]
    below = np.searchsorted(values, labels, 'right') - 1
    for i in np.unique(below[questions & (labels >= values[0])]):
      score = score_all(scores, member, below == i)
      out.append(score | {'slice': f'{name}={values[i]}'})
  return out


def choose_rate(rates, rows):
  """The smallest rate within TIE of the best accuracy: what is gained beyond
  on one seed is chance, and a smaller rate fails on fewer others. None when no
  member stayed finite."""
  good = [(r, row) for r, row in zip(rates, rows, strict=True) if row['finite']]
  if not good:
    return None
  best = max(row['accuracy'] for _, row in good)
  return min(rate for rate, row in good if row['accuracy'] >= best - TIE)


def select_scores(scores, seeds):
  """What the bootstrap needs, of the first `seeds` members, small."""
  arrays = {
    'correct': scores.correct[:seeds],
    'nats': scores.nats[:seeds].astype(np.float32),
    'weights': scores.weights[:seeds].astype(np.float32),
    'tokens': scores.tokens[:seeds].astype(np.int32),
  }
  return arrays | {f'slice.{k}': v[:seeds] for k, v in scores.slices.items()}
