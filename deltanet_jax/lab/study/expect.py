"""What is expected of the arms, and whether the data bear it out."""

from typing import NamedTuple

from deltanet_jax.lab.study import stats
from deltanet_jax.lab.study.config import parse_arm

MARGIN = 0.05  # of accuracy: less counts as equal


class Term(NamedTuple):
  """sign times an arm's accuracy on a task, over questions in limits."""

  sign: float
  task: str
  arm: str
  limits: dict = {}


class Expectation(NamedTuple):
  """'above': the sum of the terms is above bound; 'equal': it is 0 up to
  bound; 'below': it is below bound."""

  claim: str
  terms: tuple
  kind: str = 'above'
  bound: float = 0.0
  gate: bool = False  # an exit status hangs on its value


class Finding(NamedTuple):
  expectation: Expectation
  estimate: stats.AccuracyEstimate
  verdict: str
  failed: bool  # a gate whose value lies on the wrong side


def judge_all(expectations, arrays, draws):
  """The Findings of those whose cells are in `arrays` {(task, arm): arrays}."""
  return [
    _judge(x, arrays, draws)
    for x in expectations
    if all((term.task, term.arm) in arrays for term in x.terms)
  ]


def _judge(expectation, arrays, draws):
  bound = expectation.bound
  estimate = stats.estimate_sum(
    [
      stats.make_part(sign, task, arrays[task, arm], limits)
      for sign, task, arm, limits in expectation.terms
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
  return Finding(expectation, estimate, verdict, expectation.gate and not good)


def list_smoke_expectations(cfg):
  """Orderings that continuous integration hangs on."""
  full = {'pairs': (cfg.pairs, cfg.pairs)}
  terms = lambda arm: (Term(1, 'mqar', arm, full),)
  n = f'MQAR with {cfg.pairs} pairs'
  gate = lambda claim, arm, kind, bound: Expectation(
    f'{claim} {n}', terms(arm), kind, bound, True
  )
  return [
    gate('attention masters', 'full-nope', 'above', 0.97),
    gate('linear does not master', 'linear', 'below', 0.85),
    gate('delta does not master', 'delta', 'below', 0.85),
    gate('delta and attention 1:1 master', 'delta-1:1', 'above', 0.9),
  ]


def list_expectations(cfg, arms):
  """What the literature lets expect. arms: {task: names that ran}."""
  return [
    *_recall(cfg, arms), *_recency(cfg, arms), *_rebinding(cfg, arms),
    *_tracking(), *_hops(arms), *_document(arms),
  ]  # fmt: skip


def _pure(names):
  pure = 'linear', 'lightning', 'delta', 'gdn', 'kda'
  return [n for n in names if n in pure]


def _hybrids(names):
  return [n for n in names if parse_arm(n)[1]]


def _less(claim, task, high, low, limits):
  terms = Term(1, task, high, limits), Term(-1, task, low, limits)
  return Expectation(claim, terms)


def _same(claim, task, a, b, limits):
  terms = Term(1, task, a, limits), Term(-1, task, b, limits)
  return Expectation(claim, terms, 'equal', MARGIN)


# the hardest questions of each task of recall: {slice: field of the sizes}
def limit_to_hardest(cfg, task):
  """Limits that leave a task's largest size."""
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


def _recall(cfg, arms):
  for task in ('mqar', 'deep', 'copy', 'selective-copy', 'palindrome', 'quote'):
    names, limits = arms.get(task, ()), limit_to_hardest(cfg, task)
    where = f'{task}, hardest size' if limits else task
    for name in _pure(names):
      yield _less(f'full > {name} ({where})', task, 'full', name, limits)
    for name in _hybrids(names):
      pure = parse_arm(name)[0]
      yield _less(f'{name} > {pure} ({where})', task, name, pure, limits)
      yield _same(f'{name} = full ({where})', task, name, 'full', limits)


def _recency(cfg, arms):
  """Old pairs against new ones, of lists longer than a head is wide."""
  N = cfg.pairs
  quarter = max(1, N // 4)
  last = {'pairs': (N, N), 'position': (N - quarter, N - 1)}
  first = {'pairs': (N, N), 'position': (0, quarter - 1)}
  for name in _pure(arms.get('mqar', ())):
    terms = Term(1, 'mqar', name, last), Term(-1, 'mqar', name, first)
    if name == 'linear':
      yield Expectation(
        'linear forgets old and new pairs alike', terms, 'equal', 0.1
      )
    else:
      yield Expectation(f'{name} forgets old pairs first', terms)


def _rebinding(cfg, arms):
  names = arms.get('rebinding', ())
  for name in ('delta', 'gdn', 'kda'):
    for other in ('linear', 'lightning'):
      if name in names and other in names:
        claim = f'{name} > {other} on keys bound anew'
        limits = limit_to_hardest(cfg, 'rebinding')
        yield _less(claim, 'rebinding', name, other, limits)


def _tracking():
  for task in ('parity', 's5'):
    for other in ('delta', 'gdn', 'linear', 'lightning', 'full'):
      claim = f'beta up to 2 > {other} ({task})'
      yield _less(claim, task, 'delta-neg', other, {})


def _hops(arms):
  one_hop, two_hops = {'hop': (1, 1)}, {'hop': (2, 2)}
  for name in _hybrids(arms.get('two-hop', ())):
    terms = (
      Term(1, 'two-hop', 'full', two_hops), Term(-1, 'two-hop', name, two_hops),
      Term(-1, 'two-hop', 'full', one_hop), Term(1, 'two-hop', name, one_hop),
    )  # fmt: skip
    yield Expectation(f'{name} gives up more on two hops than on one', terms)


def _document(arms):
  gist = {'kind': (0, 0)}
  for name in arms.get('quote', ()):
    if name != 'full':
      yield _same(f'{name} = full (gist)', 'quote', name, 'full', gist)
