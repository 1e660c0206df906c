"""Shapes by their letters, checked once at the top of a public op."""

import chex
import jax


def check_shapes(**arrays: tuple[jax.Array | None, str]) -> dict[str, int]:
  """The size of every letter; ValueError names the first array that misfits.

  arrays: by name, an array (or None) and its axes, a letter each: 'BTHK'. A
  figure is a size itself; 'BTH|H' is either of the two. A letter's size is
  that of the first array that has it.
  """
  sizes: dict[str, int] = {}
  for name, (x, axes) in arrays.items():
    if x is None:
      continue
    choices = axes.split('|')
    own = next((c for c in choices if len(c) == x.ndim), choices[0])
    try:
      chex.assert_shape(x, tuple(_size(letter, sizes) for letter in own))
    except AssertionError:
      expected = ' or '.join(_spell(choice, sizes) for choice in choices)
      raise ValueError(
        f'{name} has shape {x.shape}; expected {expected}'
      ) from None
    sizes |= zip(own, x.shape, strict=True)
  return sizes


def _size(letter, sizes):
  """None: any."""
  return int(letter) if letter.isdigit() else sizes.get(letter)


def _spell(axes, sizes):
  """'[B,T,H] = (2, 20, 4)', a letter in the place of what may be any size."""
  numbers = [str(_size(x, sizes) or x) for x in axes]
  comma = ',' if len(axes) == 1 else ''
  return f'[{",".join(axes)}] = ({", ".join(numbers)}{comma})'
