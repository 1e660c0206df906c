"""Shows how a recurrent state stores key-value pairs, and how it fails.

  python -m launch.first_steps

First it writes random pairs into a state, with the delta rule and with linear
attention, and reads them back. Then it trains one layer of each to copy a text.
It explains what it prints and saves two plots in --out. One or two minutes on a
laptop; --steps=0 skips the training.
"""

import pathlib

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra
from deltanet_jax.config.sampling import SEEDS

OUT = flags.DEFINE_string('out', 'runs/first_steps', 'Folder of the plots.')
STEPS = flags.DEFINE_integer(
  'steps', 300, 'Training steps; 0: no training.', lower_bound=0
)
SEED = flags.DEFINE_integer(  # the one after it is used too
  'seed', 0, 'Seed of pairs and weights.',
  lower_bound=SEEDS[0], upper_bound=SEEDS[-2],
)  # fmt: skip
SHOWN = 4, 8, 16, 24, 32, 48
WIDTHS = 16, 64  # of the keys of the trained layers
TIMES = 8  # values that one key gets


@command.as_main()
def main(_):
  if 0 < STEPS.value < 10:
    raise ConfigError(f'--steps={STEPS.value}: give 0, or 10 or more')
  require_extra('matplotlib', 'first_steps')
  out = pathlib.Path(OUT.value)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--out={out}: {error.strerror}') from error
  _by_hand(out)
  if STEPS.value:
    _trained(out)
  return 0


def _by_hand(out):
  import jax

  from deltanet_jax.lab.first_steps import first_steps

  overloads = first_steps.measure_overload(jax.random.key(SEED.value))
  K, N = first_steps.WIDTH, first_steps.PAIRS
  print(f"""1. A state is a matrix

A recurrent layer stores the past in one matrix S, here {K} x {K}, however long
the text. To write a key k with its value v, vectors of {K} numbers each:

  linear   S = S + k v^T              linear attention adds the pair
  delta    S = S + k (v - S^T k)^T    the delta rule first reads what k returns
                                      and writes the difference

To read the value of k: S^T k. We write random pairs one after the other. A pair
counts as right if what is read is nearer to its value than to any other.

  pairs written{'':10}{''.join(f'{n:>6}' for n in SHOWN)}""")
  for rule, overload in overloads.items():
    for part in ('all', 'oldest', 'newest'):
      cells = ''.join(f'{overload.share(n, part):6.0%}' for n in SHOWN)
      label = part if part == 'all' else f'{part} quarter'
      print(f'  {rule:8}{label:15}{cells}')
  print("""
Columns: pairs written so far. Cells: share of them, or of the oldest or newest
quarter of them, that is right; 100% is best.
""")
  for rule, overload in overloads.items():
    old, new = (overload.share(N, part) for part in ('oldest', 'newest'))
    print(f'With {N} pairs {rule} {_who_fails(old, new)}.')
  _exceptions()
  path = out / 'state.png'
  first_steps.draw_state(overloads, path)
  print(f'Plot of every pair after every write: {path}')


def _who_fails(old, new):
  shares = f'{new:.0%} of the newest quarter and {old:.0%} of the oldest'
  if new - old > 0.2:
    return f'returns {shares}: it loses old pairs first'
  if old - new > 0.2:
    return f'returns {shares}: it loses new pairs first'
  return f'returns {shares}: it loses old and new pairs alike'


def _exceptions():
  import jax

  from deltanet_jax.lab.first_steps import first_steps

  key = jax.random.key(SEED.value + 1)
  K = first_steps.WIDTH
  right = first_steps.measure_orthogonal_error(key)
  again = first_steps.measure_overwrite_error(key, TIMES)
  each = lambda errors: ', '.join(f'{r} {e:.1e}' for r, e in errors.items())
  print(f"""
Pairs disturb each other because random keys are not orthogonal. With {K} pairs
and orthogonal keys, the largest error |S^T k - v| / |v| is
  {each(right)}
If one key gets {TIMES} values in turn, the error of the newest value is
  {each(again)}
{_conclude(again)}
""")


def _conclude(again):
  """A sentence on the errors of a key that was written again."""
  if again['delta'] < 0.01 < 0.5 < again['linear']:
    return (
      'So the delta rule loses old pairs, but it can replace the value of a'
      ' key. Linear\nattention cannot: it returns the sum of all values.'
    )
  return 'Here the two differ little.'


def _trained(out):
  from deltanet_jax.lab.first_steps import first_steps
  from deltanet_jax.progress import Line

  task = first_steps.TASK
  print(f"""
2. The same in a trained layer

The text is x_1 .. x_n | x_1 .. x_n of {task.symbols} symbols. A model of one
layer has to predict the second half. To copy n tokens it must store n pairs,
whose key is the last few tokens and whose value is the next. Each model is
trained for {STEPS.value} steps, with keys of two widths.
""")
  progress, copiers = Line(), []
  for width in WIDTHS:
    for rule in first_steps.RULES:
      name = f'{rule}, keys of {width}'
      show = lambda done, loss, name=name: progress.show(
        f'{name}: step {done}/{STEPS.value}, loss {loss:.2f} nats per token'
      )
      progress.show(f'{name}: compiling')
      how = {'steps': STEPS.value, 'seed': SEED.value, 'show': show}
      copiers.append(first_steps.train_copier(rule, width, task, **how))
      progress.clear()
  sizes = task.sizes
  print(f'  {"tokens to copy":22}' + ''.join(f'{n:>6}' for n in sizes))
  for c in copiers:
    cells = ''.join(f'{c.by_size[n]:6.0%}' for n in sizes)
    print(f'  {c.name:22}{cells}')
  print(f'  {"by chance":22}' + f'{1 / task.symbols:6.0%}' * len(sizes))
  print("""
Columns: tokens to copy. Cells: share of them that is right; 100% is best. Wider
keys store more pairs. A trained layer learns its keys and what to write, so it
can store more than part 1 and need not lose the oldest pairs first.
""")
  for c in copiers:
    print(_what_happened(c, task))
  path = out / 'copy.png'
  first_steps.draw_copiers(copiers, path)
  print(f'\nPlot by length and by position: {path}')


def _what_happened(copier, task):
  """A sentence that follows from the measured numbers."""
  fits = [n for n, right in copier.by_size.items() if right >= 0.9]
  longest = max(task.sizes)
  quarter = longest // 4
  old = copier.by_position[:quarter].mean()
  new = copier.by_position[-quarter:].mean()
  upto = f'up to {max(fits)} tokens' if fits else 'no length'
  return (
    f'{copier.name}: copies {upto} at 90% or more. Of {longest} tokens'
    f' {old:.0%} of the first quarter and {new:.0%} of the last are right.'
  )


if __name__ == '__main__':
  main()
