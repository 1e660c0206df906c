"""What a rule says of itself: `DESCRIPTION`, at the foot of its file.

Time split over devices, the bench and the checks of a rule's arguments read
this and know no rule by name.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.shapes import check_shapes


class Input(NamedTuple):
  """An argument of a rule's forms: an array, or None where the rule allows.

  axes: a letter each (`shapes.check_shapes`), T the second or absent; of
  several choices the usual one first   kind: 'key' has norm 1 at most, 'query'
  is a key and scaled, 'value' is any, 'gate' is in (0, 1) as a rule, 'decay' is
  a logarithm, <= 0
  """

  axes: str
  kind: Literal['query', 'key', 'value', 'gate', 'decay']

  def axes_of(self, x: jax.Array) -> str:
    """The choice that x has as many axes as."""
    return next(c for c in self.axes.split('|') if len(c) == x.ndim)


QUERY = Input('BTJK', 'query')
KEY = Input('BTJK', 'key')
VALUE = Input('BTHV', 'value')
STATE = 'BHKV'


class Description(NamedTuple):
  """A rule that is affine in its state: tokens take S [B,H,K,V] to A S + U.

  A acts on K alone, in each head by itself; with zeros for all inputs that
  have an axis V, U is zero and A is unchanged. Before the first token S is
  zero.

  carry: 'scalar' where A is a number for each head, that no axis K or V of an
  input has a part in; 'matrix' [B,H,K,K] otherwise, diagonal or not
  inputs: by name, in the forms' order   gates: those that forms take by keyword
  """

  carry: Literal['scalar', 'matrix']
  inputs: dict[str, Input]
  gates: dict[str, Input] = {}

  def check(self, **arrays: jax.Array | None) -> dict[str, int]:
    """Sizes by letter; ValueError where the shapes of inputs, gates, `state`
    and `segment_ids` do not fit together."""
    axes = {name: x.axes for name, x in (self.inputs | self.gates).items()}
    axes |= {'state': STATE, 'segment_ids': 'BT'}
    sizes = check_shapes(**{n: (x, axes[n]) for n, x in arrays.items()})
    if sizes['H'] % sizes['J']:
      raise ValueError(
        f'{sizes["H"]} value heads are no multiple of {sizes["J"]} key heads'
      )
    return sizes

  def check_token(self, **arrays: jax.Array | None) -> None:
    """`check` of a step's arguments: inputs and gates without T, and state."""
    axes = {
      name: x.axes.replace('T', '')
      for name, x in (self.inputs | self.gates).items()
    }
    axes['state'] = STATE
    check_shapes(**{n: (x, axes[n]) for n, x in arrays.items()})

  def zero_state(self, sizes: dict[str, int]) -> jax.Array:
    """What is before the first token, by the sizes of `STATE`'s letters."""
    return jnp.zeros([sizes[letter] for letter in STATE], jnp.float32)
