"""Checks array shapes given as letters, at the top of every public op."""

import chex
import jax


def check_shapes(**arrays: tuple[jax.Array | None, str]) -> dict[str, int]:
  """Returns the size of every letter. ValueError names the first array that
  does not fit, its shape and the expected one.

  arrays: by name, an array (or None) and a letter for each axis: 'BTHK'. The
  first array that has a letter sets its size. A digit is a size; 'BTH|H' means
  either.
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
  """The size that `letter` stands for, None if it is not set yet."""
  return int(letter) if letter.isdigit() else sizes.get(letter)


def _spell(axes, sizes):
  """'[B,T,H] = (2, 20, H)': a letter stands for itself where any size fits."""
  numbers = [str(_size(x, sizes) or x) for x in axes]
  comma = ',' if len(axes) == 1 else ''
  return f'[{",".join(axes)}] = ({", ".join(numbers)}{comma})'
