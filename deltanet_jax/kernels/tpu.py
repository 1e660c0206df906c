"""What the kernels for TPUs share: products, how heads and tokens are cut into
blocks, the call.

A program works on one chunk of 128 tokens of some heads of one row; chunks of a
row run in order, and the states stay in the chip's vector memory (VMEM) from
one to the next. Its heads are independent, and a kernel is written stage by
stage over lists of them: only so does the compiler fill the latency of one
head's products with another's.

Not run on a chip yet: compiled for TPUs without one, and interpreted on CPUs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deltanet_jax.kernels.guard import guard
from deltanet_jax.ops.scan import F32

BF16 = jnp.bfloat16
C = 128  # tokens of a chunk: the lanes of a register
# value heads of 128 that a program takes; more fill the latency of products
# better, 16 by 6%, and take twice as long to compile
HEADS = 8
# of the 64 MiB to 128 MiB of VMEM; the programs need 5 to 30
VMEM_LIMIT = 48 * 2**20

# `with interpret(True):` runs kernels anywhere, as XLA programs: for tests
interpret = jax.make_user_context(False)
cat = jnp.concatenate


# ---------------------------------------------------------------- products


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def divide(x: jax.Array, power: int) -> jax.Array:
  """x // power, for a power of two. // itself asks which chip this is."""
  return jax.lax.shift_right_logical(x, jnp.int32(power.bit_length() - 1))


def split(x: jax.Array, parts: int) -> list[jax.Array]:
  """float32 as a sum of bfloat16: two parts keep 16 bits, three all 24."""
  out = []
  for _ in range(parts - 1):
    out.append(x.astype(BF16))
    x = x - out[-1].astype(F32)
  return [*out, x.astype(BF16)]


def dot(a: jax.Array, b: jax.Array, on: tuple[int, int] = (1, 0)) -> jax.Array:
  """a b in float32, summed over axes `on`; float32 operands are not rounded."""
  if interpret.value:
    # XLA's CPU backend lacks some products of bfloat16 into float32
    a, b = a.astype(F32), b.astype(F32)
  exact = a.dtype == F32
  return jax.lax.dot_general(
    a,
    b,
    (((on[0],), (on[1],)), ((), ())),
    precision='highest' if exact else 'default',
    preferred_element_type=F32,
  )


def dot_parts(
  x: jax.Array,
  y: jax.Array,
  low: jnp.dtype,
  on: tuple[int, int] = (1, 0),
) -> jax.Array:
  """x y, as exact as operands of type `low` that were given allow: what is
  float32 beside bfloat16 goes in as two parts, high and low.

  Parts stand side by side in one product: a TPU's multiplies 256 by 256, of
  which operands of 128 fill a quarter.
  """
  if low == F32 or x.dtype == y.dtype == low:
    return dot(x, y, on)
  if x.dtype == low:
    return dot(cat([x, x], on[0]), cat(split(y, 2), on[1]), on)
  left = cat(split(x, 2), on[0])
  if y.dtype == low:
    return dot(left, cat([y, y], on[1]), on)
  row = cat(split(y, 2), 1 - on[1])
  out = dot(left, cat([row, row], on[1]), on)
  half = out.shape[1] // 2
  return out[:, :half] + out[:, half:]


def dot_ones(x: jax.Array, ones: jax.Array, parts: int) -> jax.Array:
  """x times zeros and ones: sums of float32 numbers, of which `parts` bfloat16
  are kept."""
  return sum(dot(part, ones) for part in split(x, parts))  # type: ignore


# ---------------------------------------------------------------- blocks


class Layout(NamedTuple):
  """Sizes of a call, widths and tokens filled up, and how they are cut.

  keys: key heads of a program, which have keys * G value heads
  """

  B: int
  N: int
  J: int
  G: int
  K: int
  V: int
  keys: int
  low: jnp.dtype  # the type of operands
  interpret: bool

  @property
  def heads(self) -> int:
    return self.keys * self.G

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.B, self.J // self.keys, self.N

  @property
  def parts(self) -> int:
    """bfloat16 parts that keep what a float32 array must keep."""
    return 2 if self.low == BF16 else 3

  def lanes(self, head: int, width: int) -> slice:
    """The channels of a program's head in a block of tokens."""
    return slice(head * width, (head + 1) * width)

  def group(self, key: int) -> range:
    """The value heads that read a key head."""
    return range(key * self.G, (key + 1) * self.G)


class Blocks(NamedTuple):
  """Which part of an array a program of the grid (row, heads, chunk) has."""

  layout: Layout
  reverse: bool = False  # chunks from last to first

  def _at(self, n):
    return self.layout.N - 1 - n if self.reverse else n

  def tokens(self, width: int) -> pl.BlockSpec:
    """Of [B,T,heads * width]."""
    return pl.BlockSpec((1, C, width), lambda b, h, n: (b, self._at(n), h))

  def rows(self, count: int) -> pl.BlockSpec:
    """Of [B,blocks,N,count,C]: a number a head and token, tokens in lanes."""
    return pl.BlockSpec(
      (1, 1, 1, count, C), lambda b, h, n: (b, h, self._at(n), 0, 0)
    )

  def chunks(self, *shape: int) -> pl.BlockSpec:
    """Of [B,N,H,..]: a matrix a head and chunk."""
    return pl.BlockSpec(
      (1, 1, self.layout.heads, *shape),
      lambda b, h, n: (b, self._at(n), h, 0, 0),
    )

  def states(self, *shape: int) -> pl.BlockSpec:
    """Of [B,H,..]: a matrix a head, the same for all chunks."""
    return pl.BlockSpec(
      (1, self.layout.heads, *shape), lambda b, h, n: (b, h, 0, 0)
    )

  def constant(self, shape: tuple[int, int]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda b, h, n: (0, 0))


def make_layout(q: jax.Array, v: jax.Array) -> Layout:
  """The layout of q [B,T,J,K] and v [B,T,H,V], filled up."""
  B, T, J, K = q.shape
  H, V = v.shape[2:]
  G = H // J
  most = count_heads(K, V, q.dtype) // G
  keys = max(n for n in range(1, most + 1) if J % n == 0)
  return Layout(B, T // C, J, G, K, V, keys, q.dtype, bool(interpret.value))


def count_heads(K: int, V: int, dtype: jnp.dtype) -> int:
  """How many value heads a program takes at most: as VMEM has room for."""
  return max(1, HEADS * C // max(K, V) // (1 if dtype == BF16 else 2))


def to_rows(x: jax.Array, z: Layout) -> jax.Array:
  """[B,T,H] -> [B,blocks,N,heads,C] float32."""
  x = x.astype(F32).reshape(z.B, z.N, C, -1, z.heads)
  return x.transpose(0, 3, 1, 4, 2)


def from_rows(x: jax.Array, z: Layout) -> jax.Array:
  """The inverse of `to_rows`."""
  return x.transpose(0, 2, 4, 1, 3).reshape(z.B, z.N * C, z.J * z.G)


def flat(x: jax.Array) -> jax.Array:
  """[B,T,heads,width] -> [B,T,heads * width]."""
  return x.reshape(*x.shape[:2], -1)


# ---------------------------------------------------------------- the call


Placed = tuple[jax.Array | jax.ShapeDtypeStruct, pl.BlockSpec]


def call(
  kernel: Callable[..., None],
  name: str,
  z: Layout,
  inputs: Sequence[Placed],
  outputs: Sequence[Placed],
  state: tuple[int, int],
) -> Sequence[jax.Array]:
  """Runs kernel(*inputs, *outputs, scratch) on the grid; scratch is float32,
  [heads, *state], and stays from chunk to chunk."""
  arrays, in_specs = zip(*inputs, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)
  platform = None if z.interpret else 'tpu'
  checked = guard(arrays, 'kernel', 'chunked', platform)
  with interpret(z.interpret):
    return pl.pallas_call(
      kernel,
      grid=z.grid,
      in_specs=in_specs,
      out_specs=out_specs,
      out_shape=shapes,
      scratch_shapes=[pltpu.VMEM((z.heads, *state), F32)],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', 'arbitrary'),
        vmem_limit_bytes=VMEM_LIMIT,
      ),
      interpret=z.interpret,
      name=name,
    )(*checked)
