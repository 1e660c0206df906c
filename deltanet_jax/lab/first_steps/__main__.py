"""The first thing to play with: a memory of fixed size, and how it fails.

  python -m launch.first_steps

Writes pairs into a state, first by hand with the library's own step of the
delta rule, beside linear attention's, and reads them back; then trains one
layer of each to copy and shows how long a text it copies. Prints what happened,
and draws it into --out. One or two minutes on a laptop; --steps=0 leaves the
training out.
"""

import pathlib

from absl import flags

from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra
from deltanet_jax.config.sampling import SEEDS

OUT = flags.DEFINE_string('out', 'runs/first_steps', 'Folder of the pictures.')
STEPS = flags.DEFINE_integer(
  'steps', 300, 'Of training; 0: none.', lower_bound=0
)
SEED = flags.DEFINE_integer(  # the one after it is used too
  'seed', 0, 'Other pairs, other weights.',
  lower_bound=SEEDS[0], upper_bound=SEEDS[-2],
)  # fmt: skip
SHOWN = 4, 8, 16, 24, 32, 48
WIDTHS = 16, 64  # of the trained layers' keys
TIMES = 8  # values that one key gets


@command.as_main()
def main(_):
  if 0 < STEPS.value < 10:
    raise ConfigError(f'--steps={STEPS.value}: give 0, or 10 and more')
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

A recurrent layer remembers in one matrix S, here {K} x {K}, however long the
text. To write a pair of a key k and a value v, both of {K} numbers:

  linear   S + k v^T              linear attention adds
  delta    S + k (v - S^T k)^T    the delta rule asks S for k first, and writes
                                  what is missing

To read: S^T k. We write random pairs one after the other and count the pairs of
which what comes back is nearer to the right value than to any other.

  pairs written{'':10}{''.join(f'{n:>6}' for n in SHOWN)}""")
  for rule, overload in overloads.items():
    for part in ('all', 'oldest', 'newest'):
      cells = ''.join(f'{overload.share(n, part):6.0%}' for n in SHOWN)
      label = part if part == 'all' else f'{part} quarter'
      print(f'  {rule:8}{label:15}{cells}')
  print("""
Columns are the pairs written so far, cells the share of them, or of their
oldest or newest quarter, that is read back right: 100% is best.
""")
  for rule, overload in overloads.items():
    old, new = (overload.share(N, part) for part in ('oldest', 'newest'))
    print(f'With {N} pairs {rule} {_who_fails(old, new)}.')
  _exceptions()
  path = out / 'state.png'
  first_steps.draw_state(overloads, path)
  print(f'Every pair after every write: {path}')


def _who_fails(old, new):
  numbers = f'{new:.0%} of the newest quarter and {old:.0%} of the oldest'
  if new - old > 0.2:
    return f'still knows {numbers}: the old ones go first'
  if old - new > 0.2:
    return f'still knows {numbers}: the new ones go first'
  return f'knows {numbers}: age makes little difference'


def _exceptions():
  import jax

  from deltanet_jax.lab.first_steps import first_steps

  key = jax.random.key(SEED.value + 1)
  K = first_steps.WIDTH
  right = first_steps.measure_orthogonal_error(key)
  again = first_steps.measure_overwrite_error(key, TIMES)
  each = lambda errors: ', '.join(f'{r} {e:.1e}' for r, e in errors.items())
  print(f"""
It is crowding that hurts, as keys that are not at right angles share room. Of
{K} pairs with keys at right angles the worst error, over the length of a value:
  {each(right)}
And a key that got {TIMES} values in turn gives its newest back with an error of
  {each(again)}
{_conclude(again)}
""")


def _conclude(again):
  """What the errors of a key that was written again say."""
  if again['delta'] < 0.01 < 0.5 < again['linear']:
    return (
      'The delta rule gives up old pairs so that a key can get a new value;'
      ' linear\nattention keeps what it was given, and cannot correct it.'
    )
  return 'Here the two rules differ little in this.'


def _trained(out):
  from deltanet_jax.lab.first_steps import first_steps
  from deltanet_jax.progress import Line

  task = first_steps.TASK
  print(f"""
2. The same in a layer that learns

The text is x_1 .. x_n | x_1 .. x_n of {task.symbols} symbols; the model, one
layer, has to say the second half. Its keys are made of the last tokens, so n
tokens to copy are n pairs to keep. The layer and its keys are learned; the
width of the keys is ours. {STEPS.value} steps each.
""")
  progress, copiers = Line(), []
  for width in WIDTHS:
    for rule in first_steps.RULES:
      name = f'{rule}, keys of {width}'
      show = lambda done, loss, name=name: progress.show(
        f'{name}: step {done}/{STEPS.value}, {loss:.2f} nats a token'
      )
      progress.show(f'{name}: compiling')
      how = {'steps': STEPS.value, 'seed': SEED.value, 'show': show}
      copiers.append(first_steps.train_copier(rule, width, task, **how))
      progress.clear()
  sizes = task.sizes
  print(f'  {"copied rightly, n =":22}' + ''.join(f'{n:>6}' for n in sizes))
  for c in copiers:
    cells = ''.join(f'{c.by_size[n]:6.0%}' for n in sizes)
    print(f'  {c.name:22}{cells}')
  print(f'  {"by chance":22}' + f'{1 / task.symbols:6.0%}' * len(sizes))
  print("""
Columns are the tokens to copy, cells the share of them that is right: 100% is
best. Wider keys hold more pairs, and a trained layer may do better than random
keys, as it chooses its own.
""")
  for c in copiers:
    print(_what_happened(c, task))
  path = out / 'copy.png'
  first_steps.draw_copiers(copiers, path)
  print(f'\nBy length and by position: {path}')


def _what_happened(copier, task):
  """A sentence of what the numbers say, not of what they should."""
  fits = [n for n, right in copier.by_size.items() if right >= 0.9]
  longest = max(task.sizes)
  quarter = longest // 4
  old = copier.by_position[:quarter].mean()
  new = copier.by_position[-quarter:].mean()
  upto = f'copies up to {max(fits)} tokens' if fits else 'copies no length'
  return (
    f'{copier.name}: {upto} with 90%; of {longest}, {old:.0%} of the first'
    f' quarter and {new:.0%} of the last.'
  )


if __name__ == '__main__':
  main()
