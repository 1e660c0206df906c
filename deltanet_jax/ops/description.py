"""The inputs and the carry of a rule: `DESCRIPTION`, at the foot of its file.

Shape checks, sequence parallelism, the benchmark and the tests read it, and
name no rule themselves.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.shapes import check_shapes


class Input(NamedTuple):
  """An argument of a rule's forms: an array, or None where the rule allows it.

  axes: a letter for each (`shapes.check_shapes`), T second or absent; of
    several choices the usual one is first
  kind: 'key', of norm 1 at most; 'query', a key that is also scaled; 'value',
    any number; 'gate', usually in (0, 1); 'decay', a logarithm, <= 0
  """

  axes: str
  kind: Literal['query', 'key', 'value', 'gate', 'decay']

  def axes_of(self, x: jax.Array) -> str:
    """Returns the choice that has as many axes as x."""
    return next(c for c in self.axes.split('|') if len(c) == x.ndim)


QUERY = Input('BTJK', 'query')
KEY = Input('BTJK', 'key')
VALUE = Input('BTHV', 'value')
STATE = 'BHKV'


class Description(NamedTuple):
  """A rule that is affine in its state: a token maps S [B,H,K,V] to A S + U.

  A acts on the axis K of each head. If all inputs with an axis V are zero, U is
  zero and A is unchanged. The state before the first token is zero.

  carry: 'scalar' if A is a number for each head that depends on no input with
    an axis K or V; else 'matrix', A [B,H,K,K]
  inputs: by name, in the order of the forms' arguments
  gates: the optional keyword arguments
  """

  carry: Literal['scalar', 'matrix']
  inputs: dict[str, Input]
  gates: dict[str, Input] = {}

  def check(self, **arrays: jax.Array | None) -> dict[str, int]:
    """Returns sizes by letter. ValueError where the shapes of inputs, gates,
    `state` and `segment_ids` do not fit together."""
    axes = {name: x.axes for name, x in (self.inputs | self.gates).items()}
    axes |= {'state': STATE, 'segment_ids': 'BT'}
    sizes = check_shapes(**{n: (x, axes[n]) for n, x in arrays.items()})
    if sizes['H'] % sizes['J']:
      raise ValueError(
        f'{sizes["H"]} value heads are no multiple of {sizes["J"]} key heads;'
        ' change one of them'
      )
    return sizes

  def check_token(self, **arrays: jax.Array | None) -> None:
    """`check` of the arguments of `step`: inputs and gates without T, state."""
    axes = {
      name: x.axes.replace('T', '')
      for name, x in (self.inputs | self.gates).items()
    }
    axes['state'] = STATE
    check_shapes(**{n: (x, axes[n]) for n, x in arrays.items()})

  def zero_state(self, sizes: dict[str, int]) -> jax.Array:
    """The state [B,H,K,V] float32 before the first token."""
    return jnp.zeros([sizes[letter] for letter in STATE], jnp.float32)
