"""One clear line where a program with kernels goes to another platform, or is
differentiated twice."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# names of platforms in programs
NAMES = {'tpu': 'TPUs', 'cuda': 'NVIDIA GPUs'}


def guard(
  arrays: Sequence[jax.Array], form: str, instead: str, platform: str | None
) -> Sequence[jax.Array]:
  """Returns the arrays, which a kernel with a gradient of its own takes.

  form, instead: the kernel's, and one that runs anywhere
  platform: the kernel's; None: any

  Raises:
    ValueError: a derivative is asked for, or, when a program is made, that is
      not for the platform.
  """
  return _guard.bind(*arrays, form=form, instead=instead, platform=platform)


def differentiate_once(
  f: Callable[..., jax.Array],
  *args: jax.Array | None,
  form: str,
  instead: str,
  platform: str | None,
  precision: str = 'default',
) -> jax.Array:
  """f(*args) for an f with a gradient of its own, and `guard`.

  precision: of its products, whatever the program has elsewhere
  """

  def checked(args):
    leaves, tree = jax.tree.flatten(args)
    return tree.unflatten(guard(leaves, form, instead, platform))

  def call(*args):
    with jax.default_matmul_precision(precision):
      return f(*checked(args))

  def forward(*args):
    with jax.default_matmul_precision(precision):
      return jax.vjp(f, *checked(args))

  def backward(pull, d):
    with jax.default_matmul_precision(precision):
      return pull(*checked((d,)))

  call = jax.custom_vjp(call)
  call.defvjp(forward, backward)
  return call(*args)


_guard: Any = Primitive('guard')
_guard.multiple_results = True
_guard.def_impl(
  lambda *arrays, **how: jax.jit(functools.partial(_guard.bind, **how))(*arrays)
)
_guard.def_abstract_eval(lambda *arrays, **how: arrays)


def _check_platform(context, *arrays, form, instead, platform):
  platforms = tuple(context.module_context.platforms)
  if platform is not None and platforms != (platform,):
    raise ValueError(
      f"form '{form}' is for {NAMES[platform]}, and this program for"
      f" {', '.join(platforms)}; take form='{instead}'"
    )
  return arrays


def _refuse_derivative(*args, form, instead, **how):
  raise ValueError(
    f"form '{form}' has first derivatives alone; take form='{instead}'"
  )


mlir.register_lowering(_guard, _check_platform)
ad.primitive_jvps[_guard] = _refuse_derivative
batching.primitive_batchers[_guard] = lambda arrays, axes, **how: (
  _guard.bind(*arrays, **how),
  axes,
)
