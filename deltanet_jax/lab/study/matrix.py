"""The jobs of a study of each size: pairs of variant and task."""

from deltanet_jax.lab.study import config
from deltanet_jax.lab.study.config import (
  DEEP,
  TASKS,
  StudyConfig,
  parse_variant,
)

SIZES = {
  # continuous integration: minutes
  'smoke': StudyConfig(
    key_dim=4, value_dim=8, length=32, pairs=8, batch=32, steps=400,
    lrs=(2e-3, 4e-3), seeds=2, items=128,
  ),
  'study': StudyConfig(),
  # one H200: widths and length of figure 4 of Kimi Linear (arXiv:2510.26692)
  'gpu': StudyConfig(
    d_model=256, layers=2, deep=8, heads=2, key_dim=128, value_dim=128,
    hidden=256, local=0, conv=4, symbols=512, length=1024, pairs=128,
    window=64, top=64, stacks=64, lines=32, width=6, batch=32, steps=2000,
    deep_steps=2000, chunk=100, lrs=(1e-4, 5e-4, 1e-3), warmup=100, items=128,
    dtype='bfloat16',
  ),
}  # fmt: skip

# (task, variants), the most informative first; jobs start in this order
ORDER = {
  'smoke': [('mqar', ('full-nope', 'linear', 'delta', 'delta-1:1'))],
  'study': [
    ('deep', ('full', 'delta-3:1', 'delta', 'kda-3:1')),
    ('mqar', ('full', 'linear', 'lightning', 'delta', 'kda', 'gdn')),
    ('quote', ('full', 'delta-3:1', 'delta')),
    ('parity', ('full', 'delta', 'delta-neg')),
    ('rebinding', ('linear', 'lightning', 'delta')),
    ('mqar', ('window', 'mla', 'dsa', 'delta-1:1')),
    ('deep', ('lightning-3:1', 'lightning', 'gdn-3:1')),
    ('copy', ('full', 'delta-3:1', 'delta')),
    ('two-hop', ('full', 'delta-3:1')),
  ],
  'gpu': [
    ('mqar', ('kda', 'gdn', 'full', 'lightning', 'delta')),
    ('palindrome', ('kda', 'gdn')),
    ('stack', ('kda', 'gdn')),
  ],
}  # fmt: skip


def list_jobs(cfg, size, models, tasks):
  """The Jobs of a size. If `tasks` or `models` are given, only these; every
  model given then runs on every task.

  Raises:
    ValueError: an unknown name, or layers that a ratio does not divide.
  """
  for name in tasks:
    if name not in TASKS:
      raise ValueError(f'no task {name!r}; there is {", ".join(TASKS)}')
  for name in models:
    parse_variant(name)
  order = ORDER[size]
  if models:
    names = tasks or dict.fromkeys(task for task, _ in order)
    order = [(task, models) for task in names]
  elif tasks:
    variants = {task: row for task, row in reversed(order)}
    others = variants[order[0][0]]  # for a task that this size does not have
    order = [x for x in order if x[0] in tasks]
    order += [(task, others) for task in tasks if task not in variants]
  jobs = []
  for task, variants in order:
    layers, steps = cfg.layers, cfg.steps
    if task in DEEP:
      layers, steps = cfg.deep, cfg.deep_steps
    for variant in variants:
      # raises if the layers do not fit
      config.make_model(cfg, variant, cfg.symbols, layers, cfg.hidden)
      jobs.append(config.Job(task, variant, layers, steps))
  return list(dict.fromkeys(jobs))


def make_task(cfg, name):
  """The task `name`, in the sizes of `cfg`."""
  from deltanet_jax.data.tasks import documents, order, synthetic, tracking

  N, T = cfg.pairs, cfg.length
  # lookup is learned on short lists
  levels = tuple(sorted({min(N, max(2, N // part)) for part in (8, 4, 2, 1)}))
  sizes = tuple(sorted({T // 8, T // 4, T // 2}))
  pool = {'keys': cfg.symbols, 'values': cfg.symbols}
  mqar = lambda: synthetic.MQAR(length=T, pairs=levels, **pool)
  make = {
    'mqar': mqar,
    'deep': mqar,
    'rebinding': lambda: synthetic.Rebinding(
      length=max(T, 16 + 4 * cfg.updates), pairs=(4,),
      updates=tuple(sorted({1, max(1, cfg.updates // 2), cfg.updates})),
      **pool,
    ),
    'copy': lambda: synthetic.Copy(sizes=sizes),
    'selective-copy': lambda: order.SelectiveCopy(
      length=T, sizes=(max(1, T // 4),)
    ),
    'palindrome': lambda: order.Palindrome(sizes=sizes),
    'stack': lambda: order.Stacks(length=T, stacks=cfg.stacks),
    'two-hop': lambda: synthetic.TwoHop(
      pairs=tuple(sorted({max(1, N // 8), max(1, N // 4)})),
      symbols=max(cfg.symbols, N),
    ),
    'parity': lambda: tracking.Parity(length=T),
    's5': lambda: tracking.S5Word(length=T, moves=2),
    'quote': lambda: documents.QuoteGist(
      lines=tuple(sorted({max(1, cfg.lines // 2), cfg.lines})),
      width=cfg.width, words=32, topics=4, quotes=max(1, cfg.lines // 4),
    ),
    'multi-turn': lambda: documents.MultiTurn(
      length=T // 3 * 3, slots=N, values=cfg.symbols
    ),
  }  # fmt: skip
  return make[name]()


def estimate_seconds(cfg, job):
  """Estimated seconds of one core: linear in tokens and layers, as measured on
  an AMD EPYC."""
  name, ratio = parse_variant(job.variant)
  heavy = {'kda': 5.0, 'gdn': 2.2, 'delta': 2.0, 'delta-neg': 2.0, 'dsa': 2.0}
  weight = heavy.get(name, 1.2)
  per_layer = (weight * ratio + 1) / (ratio + 1) if ratio else weight
  work = cfg.batch * cfg.length * job.steps * 2 * max(len(cfg.lrs), cfg.seeds)
  return 30 + 2.9e-6 * work * cfg.d_model / 48 * (job.layers * per_layer + 1)
