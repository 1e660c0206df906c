"""What a study of each size trains: cells of arm and task."""

from deltanet_jax.study.config import TASKS, Cell, StudyConfig, parse_arm

SIZES = {
  # continuous integration: minutes
  'smoke': StudyConfig(
    layers=2, length=32, pairs=8, steps=400, lrs=(1e-3, 2e-3), seeds=2,
    items=128,
  ),
  'study': StudyConfig(),
  # one H200: Kimi Linear's figure 4 and Zoology's widths
  'gpu': StudyConfig(
    d_model=256, layers=2, deep=8, heads=2, key_dim=128, value_dim=128,
    hidden=256, local=0, conv=4, vocab=1024, length=1024, pairs=128,
    window=64, top=64, batch=32, steps=2000, chunk=100,
    lrs=(1e-4, 5e-4, 1e-3), warmup=100, items=128, dtype='bfloat16',
  ),
}  # fmt: skip

_PURE = ('linear', 'lightning', 'delta', 'gdn', 'kda')
_CORE = ('full', 'lightning', 'delta', 'gdn', 'gdn-3:1')
_RATIOS = tuple(
  f'{name}-{ratio}' for name in ('lightning', 'gdn')
  for ratio in ('1:1', '3:1', '7:1')
)  # fmt: skip

# arms of every task; the ratio 7:1 takes 8 layers and so runs in `deep`
ARMS_OF = {
  'smoke': {'mqar': ('full', 'linear', 'delta', 'delta-1:1')},
  'study': {
    'mqar': (
      'full', 'full-nope', 'window', 'mla', 'dsa', *_PURE, 'delta-neg',
      'lightning-3:1', 'delta-3:1', 'gdn-3:1', 'kda-3:1', 'gdn-1:1',
    ),
    'deep': ('full', 'lightning', 'gdn', *_RATIOS),
    'copy': (*_CORE, 'linear'),
  },
  'gpu': {'mqar': ('full', 'lightning', 'delta', 'gdn', 'kda')},
}  # fmt: skip


def cells(cfg, size, models, tasks):
  """The Cells of a size; `models` and `tasks`, where given, choose: every
  model then runs on every task.

  Raises:
    ValueError: an unknown name, or layers that a ratio does not divide.
  """
  for name in tasks:
    if name not in TASKS:
      raise ValueError(f'no task {name!r}; there is {", ".join(TASKS)}')
  for name in models:
    parse_arm(name)
  found = []
  for task in tasks or ARMS_OF[size]:
    for arm in models or ARMS_OF[size].get(task, ARMS_OF[size]['mqar']):
      layers = cfg.deep if task == 'deep' else cfg.layers
      ratio = parse_arm(arm)[1]
      if layers % (ratio + 1) == 0 or not models:
        steps = cfg.text_steps if task == 'text' else cfg.steps
        found.append(Cell(task, arm, layers, steps))
  if not found:
    raise ValueError('no cell of these models and tasks; give layers a multiple')
  return found


def make_task(cfg, name):
  """The task `name`, in the sizes of `cfg`."""
  from deltanet_jax.data import synthetic

  N = cfg.pairs
  levels = tuple(sorted({max(1, N // 4), max(1, N // 2), N}))
  symbols = (cfg.vocab - 16) // 2
  mqar = synthetic.MQAR(
    length=cfg.length, pairs=levels, keys=symbols, values=symbols
  )
  make = {
    'mqar': lambda: mqar,
    'deep': lambda: mqar,
    'copy': lambda: synthetic.Copy(sizes=(N // 2, N, cfg.length // 2)),
  }
  return make[name]()


def seconds(cfg, cell):
  """About how long a core works at a cell: measured on 2 cores of an AMD
  EPYC, linear in tokens and layers."""
  name, ratio = parse_arm(cell.arm)
  heavy = {'kda': 6.0, 'gdn': 2.2, 'delta': 2.0, 'delta-neg': 2.0, 'dsa': 2.0}
  one = heavy.get(name, 1.3)
  per_layer = (one * ratio + 1) / (ratio + 1) if ratio else one
  work = cfg.batch * cfg.length * cell.steps * (len(cfg.lrs) + cfg.seeds)
  widths = cfg.d_model / 48
  return 15 + 0.9e-6 * work * widths * (cell.layers * per_layer + 1)
