"""Counted operations against formulas."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from deltanet_jax import flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_product_is_twice_its_sizes():
  dot = lambda x, y: jnp.einsum('bmk,bkn->bmn', x, y)
  assert (
    flops.count_operations(dot, shape(3, 4, 5), shape(3, 5, 7))
    == 2 * 3 * 4 * 5 * 7
  )


def test_elementwise_work_is_left_out():
  assert flops.count_operations(lambda x: jnp.exp(x).sum() * x, shape(9)) == 0


def test_a_scan_counts_its_body_every_time():
  def loop(x, steps):
    inner = lambda x, _: (x @ x, None)
    outer = lambda x, _: jax.lax.scan(inner, x, length=3)
    return jax.lax.scan(outer, x, length=steps)

  for steps in (1, 7):
    found = flops.count_operations(
      lambda x, steps=steps: loop(x, steps), shape(4, 4)
    )
    assert found == steps * 3 * 2 * 4**3


def test_the_dearer_side_of_a_condition_counts():
  once, twice = (lambda x: x @ x), (lambda x: x @ x @ x)
  both = lambda p, x: jax.lax.cond(p, once, twice, x)
  p = jax.ShapeDtypeStruct((), bool)
  assert flops.count_operations(both, p, shape(4, 4)) == 2 * 2 * 4**3


def test_functions_inside_functions_are_counted():
  @jax.custom_vjp
  def square(x):
    return x @ x

  square.defvjp(lambda x: (x @ x, x), lambda x, d: (d @ x.T + x.T @ d,))
  twice = jax.checkpoint(jax.jit(lambda x: square(square(x))))
  inside = lambda x: twice(x).sum()
  assert flops.count_operations(inside, shape(4, 4)) == 2 * 2 * 4**3
  # backward: the first square again, and two products for each
  assert (
    flops.count_operations(jax.grad(inside), shape(4, 4))
    == (2 + 1 + 4) * 2 * 4**3
  )


def test_a_row_meets_its_own_group_alone():
  sizes = jax.ShapeDtypeStruct((6,), jnp.int32)
  args = shape(10, 4), shape(6, 4, 5), sizes
  assert flops.count_operations(jax.lax.ragged_dot, *args) == 2 * 10 * 4 * 5
  loss = lambda *args: jax.lax.ragged_dot(*args).sum()
  both = jax.grad(loss, argnums=(0, 1))
  assert flops.count_operations(both, *args) == 3 * 2 * 10 * 4 * 5
  half = flops.count_in_jaxpr(jax.make_jaxpr(both)(*args).jaxpr, filled=0.5)
  assert half == 3 * 2 * 5 * 4 * 5


def test_of_a_condition_the_dearer_side_counts_unless_it_is_rare():
  once, thrice = (lambda x: x @ x), (lambda x: x @ x @ x @ x)
  rare = jax.named_scope(flops.RARE)(thrice)
  for side, products in ((thrice, 3), (rare, 1)):
    f = lambda x, side=side: jax.lax.cond(x.sum() > 0, once, side, x)
    assert flops.count_operations(f, shape(4, 4)) == products * 2 * 4**3


def test_what_cannot_be_counted_is_an_error():
  loop = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + x, x)
  with pytest.raises(NotImplementedError, match="'while' cannot be counted"):
    flops.count_operations(loop, shape(3))


def test_a_kernel_counts_its_body_for_every_program_of_its_grid():
  def body(x, y, out):
    out[...] = x[...] @ y[...]

  spec = pl.BlockSpec((4, 4), lambda i, j: (0, 0))
  run = pl.pallas_call(
    body, grid=(3, 5), in_specs=[spec, spec], out_specs=spec,
    out_shape=shape(4, 4),
  )  # fmt: skip
  found = flops.count_operations(run, shape(4, 4), shape(4, 4))
  assert found == 3 * 5 * 2 * 4**3
