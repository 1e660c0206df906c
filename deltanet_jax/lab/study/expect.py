"""What is expected of the model variants, and whether the data agree."""

from typing import NamedTuple

from deltanet_jax.lab.study import stats
from deltanet_jax.lab.study.config import parse_variant

MARGIN = 0.05  # accuracies closer than this count as equal


class Term(NamedTuple):
  """sign times a variant's accuracy on a task, over questions in limits."""

  sign: float
  task: str
  variant: str
  limits: dict = {}


class Expectation(NamedTuple):
  """A claim about the sum of the terms: kind 'above' or 'below' the bound, or
  'equal' to 0 within it."""

  claim: str
  terms: tuple
  kind: str = 'above'
  bound: float = 0.0
  gate: bool = False  # the command fails if it is not met


class Finding(NamedTuple):
  expectation: Expectation
  estimate: stats.AccuracyEstimate
  verdict: str
  failed: bool  # a gate that is not met


def judge_all(expectations, arrays, draws, untrained=()):
  """The Findings of all expectations whose scores are in `arrays`.

  arrays: {(task, variant): arrays}   untrained: (task, variant) pairs; a claim
  about one of these is not judged
  """
  return [
    _judge(x, arrays, draws, untrained)
    for x in expectations
    if all((term.task, term.variant) in arrays for term in x.terms)
  ]


def _judge(expectation, arrays, draws, untrained):
  bound = expectation.bound
  estimate = stats.estimate_sum(
    [
      stats.make_part(sign, task, arrays[task, variant], limits)
      for sign, task, variant, limits in expectation.terms
    ],
    draws,
  )
  value, low, high = estimate
  turned = stats.AccuracyEstimate(-value, -high, -low)
  verdict, good = {
    'above': (estimate.above(bound), value > bound),
    'below': (turned.above(-bound), value < bound),
    'equal': (estimate.within(bound), abs(value) <= bound),
  }[expectation.kind]
  if any((term.task, term.variant) in untrained for term in expectation.terms):
    verdict = stats.UNTRAINED
  return Finding(expectation, estimate, verdict, expectation.gate and not good)


def list_smoke_expectations(cfg):
  """Gates of continuous integration."""
  full = {'pairs': (cfg.pairs, cfg.pairs)}
  terms = lambda variant: (Term(1, 'mqar', variant, full),)
  n = f'MQAR with {cfg.pairs} pairs'
  gate = lambda claim, variant, kind, bound: Expectation(
    f'{claim} {n}', terms(variant), kind, bound, True
  )
  return [
    gate('attention solves', 'full-nope', 'above', 0.97),
    gate('linear does not solve', 'linear', 'below', 0.85),
    gate('delta does not solve', 'delta', 'below', 0.85),
    gate('delta-1:1 solves', 'delta-1:1', 'above', 0.9),
  ]


def list_expectations(cfg, variants):
  """What the literature makes one expect. variants: {task: names that ran}."""
  return [
    *_recall(cfg, variants), *_recency(cfg, variants),
    *_rebinding(cfg, variants), *_tracking(), *_hops(variants),
    *_document(variants),
  ]  # fmt: skip


def _pure(names):
  pure = 'linear', 'lightning', 'delta', 'gdn', 'kda'
  return [n for n in names if n in pure]


def _hybrids(names):
  return [n for n in names if parse_variant(n)[1]]


def _less(claim, task, high, low, limits):
  terms = Term(1, task, high, limits), Term(-1, task, low, limits)
  return Expectation(claim, terms)


def _same(claim, task, a, b, limits):
  terms = Term(1, task, a, limits), Term(-1, task, b, limits)
  return Expectation(claim, terms, 'equal', MARGIN)


LARGEST = {
  'mqar': 'most pairs', 'deep': 'most pairs', 'copy': 'longest',
  'palindrome': 'longest', 'quote': 'longest', 'two-hop': 'two hops',
  'rebinding': 'most updates',
}  # fmt: skip


def limit_to_largest(cfg, task):
  """Limits that select the largest size of a task, as LARGEST names it."""
  if task in ('mqar', 'deep'):
    return {'pairs': (cfg.pairs, cfg.pairs)}
  if task in ('copy', 'palindrome'):
    return {'size': (cfg.length // 2, cfg.length // 2)}
  if task == 'quote':
    return {'kind': (1, 1), 'lines': (cfg.lines, cfg.lines)}
  if task == 'two-hop':
    return {'hop': (2, 2)}
  if task == 'rebinding':
    return {'updates': (cfg.updates, cfg.updates)}
  return {}


def _recall(cfg, variants):
  for task in ('mqar', 'deep', 'copy', 'selective-copy', 'palindrome', 'quote'):
    names, limits = variants.get(task, ()), limit_to_largest(cfg, task)
    where = f'{task}, {LARGEST[task]}' if limits else task
    for name in _pure(names):
      yield _less(f'full > {name} ({where})', task, 'full', name, limits)
    for name in _hybrids(names):
      pure = parse_variant(name)[0]
      yield _less(f'{name} > {pure} ({where})', task, name, pure, limits)
      yield _same(f'{name} = full ({where})', task, name, 'full', limits)


def _recency(cfg, variants):
  """Oldest against newest quarter, with more pairs than the state is wide."""
  N = cfg.pairs
  quarter = max(1, N // 4)
  newest = {'pairs': (N, N), 'position': (N - quarter, N - 1)}
  oldest = {'pairs': (N, N), 'position': (0, quarter - 1)}
  for name in _pure(variants.get('mqar', ())):
    terms = Term(1, 'mqar', name, newest), Term(-1, 'mqar', name, oldest)
    if name == 'linear':
      yield Expectation(
        'linear forgets old and new pairs equally', terms, 'equal', 0.1
      )
    else:
      yield Expectation(f'{name} forgets old pairs first', terms)


def _rebinding(cfg, variants):
  names = variants.get('rebinding', ())
  for name in ('delta', 'gdn', 'kda'):
    for other in ('linear', 'lightning'):
      if name in names and other in names:
        claim = f'{name} > {other} on keys that get new values'
        limits = limit_to_largest(cfg, 'rebinding')
        yield _less(claim, 'rebinding', name, other, limits)


def _tracking():
  for task in ('parity', 's5'):
    for other in ('delta', 'gdn', 'linear', 'lightning', 'full'):
      claim = f'delta-neg > {other} ({task})'
      yield _less(claim, task, 'delta-neg', other, {})


def _hops(variants):
  one_hop, two_hops = {'hop': (1, 1)}, {'hop': (2, 2)}
  for name in _hybrids(variants.get('two-hop', ())):
    terms = (
      Term(1, 'two-hop', 'full', two_hops), Term(-1, 'two-hop', name, two_hops),
      Term(-1, 'two-hop', 'full', one_hop), Term(1, 'two-hop', name, one_hop),
    )  # fmt: skip
    yield Expectation(
      f'{name} loses more against full on two hops than on one', terms
    )


def _document(variants):
  gist = {'kind': (0, 0)}
  for name in variants.get('quote', ()):
    if name != 'full':
      yield _same(
        f'{name} = full (topic of a document)', 'quote', name, 'full', gist
      )
