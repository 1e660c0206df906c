"""One job of a study: chooses a learning rate for a variant on a task, then
trains and scores fresh seeds."""

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config.mixers import GatedDeltaNetConfig, KDAConfig
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.study import config, program

VALIDATION = 1000  # the seed that chooses the learning rate
TIE = 0.02  # accuracies closer than this count as equal
FRESH = 2000  # the first seed that is scored
DECAYS = (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)  # factors of the learned log-decay
BUDGETS = 0.25, 0.5, 1.0  # every slice is scored at these shares of the steps


class Stopped(Exception):
  """The study is being stopped."""


def match_parameters(cfg, job, vocab):
  """(ModelConfig, parameters) of the variant of a job, with the MLP width that
  matches the parameters of `full`."""
  build = lambda variant, hidden: config.make_model(
    cfg, variant, vocab, job.layers, hidden
  )
  count = lambda *variant: calc.count_parameters(build(*variant))
  goal = count('full', cfg.hidden)
  low, high = count(job.variant, 1), count(job.variant, 2)
  hidden = 1 + round((goal - low) / (high - low))  # affine in hidden
  if hidden < 1:
    raise ValueError(
      f'{job.variant} without an MLP has {low} parameters and full has {goal};'
      ' raise hidden'
    )
  return build(job.variant, hidden), low + (hidden - 1) * (high - low)


def run_job(cfg, job, task, progress=lambda done: None):
  """(rows, arrays) of the job.

  rows: dicts of results.jsonl   arrays: final scores of the fresh seeds, for
  the bootstrap; empty if no learning rate stayed finite   progress: called with
  the share of the work that is done; may raise Stopped
  """
  model_cfg, parameters = match_parameters(cfg, job, task.vocab)
  facts = {
    'task': job.task, 'model': job.variant, 'layers': job.layers,
    'parameters': parameters,
    'cache_floats': count_cache_floats(model_cfg, task.length),
    'vocab': task.vocab, 'length': task.length,
  }  # fmt: skip
  compiled = program.make_program(cfg, model_cfg, task, job.steps)
  trainer, rows = _Trainer(cfg, job, compiled), []
  report = lambda share: progress(share / 2)
  for _, step, scores in trainer.train(cfg.lrs, [VALIDATION], report):
    scored = [score_all(scores, i) for i in range(len(cfg.lrs))]
    for lr, score in zip(cfg.lrs, scored, strict=True):
      rows.append(facts | _at('grid', lr, VALIDATION, step, job) | score)
  lr = choose_rate(cfg.lrs, scored)
  if lr is None:
    return rows, {}
  seeds = list(range(FRESH, FRESH + cfg.seeds))
  report = lambda share: progress((1 + share) / 2)
  for state, step, scores in trainer.train([lr], seeds, report):
    trained = state
    full = step in [round(part * job.steps) for part in BUDGETS]
    levels = task.levels if full else {}
    for i, seed in enumerate(seeds):
      head = facts | _at('fresh', lr, seed, step, job)
      rows += [head | x for x in score_slices(scores, i, levels)]
  arrays = select_scores(scores, cfg.seeds)
  rows += _decays(trainer, trained, lr, seeds, facts, job, model_cfg)
  return rows, arrays


def _at(phase, lr, seed, step, job):
  return {
    'phase': phase, 'lr': lr, 'seed': seed, 'step': step, 'steps': job.steps,
    'slice': 'all',
  }  # fmt: skip


class _Trainer:
  """Runs the compiled program of a job."""

  def __init__(self, cfg, job, compiled):
    self.cfg, self.job, self.program = cfg, job, compiled
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
    """Rates and seeds as arrays [M]; the last of a list fills the rest."""
    fill = lambda x: list(x) + [x[-1]] * (self.members - len(x))
    return jnp.float32(fill(rates)), jnp.int32(fill(seeds))

  def train(self, rates, seeds, progress):
    """Yields (state, step, scores) after each dispatch."""
    state = self.program.init(self._lanes(rates, seeds)[1])
    for start in range(0, self.job.steps, self.cfg.chunk):
      stop = start + self.cfg.chunk
      state, scores = self.call(state, rates, seeds, start, stop)
      progress(stop / self.job.steps)
      yield state, stop, scores


def _decays(trainer, state, lr, seeds, facts, job, model_cfg):
  """Scores of the trained models with their learned log-decays scaled."""
  learned = GatedDeltaNetConfig, KDAConfig
  if job.task not in ('mqar', 'deep') or not any(
    isinstance(layer.mixer, learned) for layer in model_cfg.layers
  ):
    return []
  rows = []
  for scale in DECAYS:
    # a copy: the call donates its state
    params, moments = jax.tree.map(jnp.copy, state)
    changed = program.scale_decay(params, scale), moments
    _, scores = trainer.call(changed, [lr], seeds, job.steps, job.steps)
    for i, seed in enumerate(seeds):
      head = _at('decay', lr, seed, job.steps, job)
      rows.append(facts | head | {'scale': scale} | score_all(scores, i))
  return rows


def count_cache_floats(model_cfg, context):
  """Scalars in state and KV cache of one sequence of `context` tokens,
  the local layer included."""
  sizes = calc.count_cache_bytes(model_cfg, context, 1, jnp.float32)
  return sum(sizes.values()) // 4


def score_all(scores, member, chosen=None):
  """Scores of a member over all targets, or those `chosen` [I,T]: accuracy,
  share of sequences without a mistake, nats per target, number of targets.
  accuracy is None if the model is not finite."""
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
  """A row over all targets, and one per level of each slice in `levels` {name:
  values}, such as 'pairs=8'. A value between two levels counts to the lower."""
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
  """The smallest rate within TIE of the best accuracy, which is noise on one
  seed; smaller rates fail on fewer seeds. None if no member stayed finite."""
  good = [(r, row) for r, row in zip(rates, rows, strict=True) if row['finite']]
  if not good:
    return None
  best = max(row['accuracy'] for _, row in good)
  return min(rate for rate, row in good if row['accuracy'] >= best - TIE)


def select_scores(scores, seeds):
  """What the bootstrap needs of the first `seeds` members."""
  arrays = {
    'correct': scores.correct[:seeds],
    'nats': scores.nats[:seeds].astype(np.float32),
    'weights': scores.weights[:seeds].astype(np.float32),
    'tokens': scores.tokens[:seeds].astype(np.int32),
  }
  return arrays | {f'slice.{k}': v[:seeds] for k, v in scores.slices.items()}
