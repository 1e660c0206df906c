"""Floating-point operations of a JAX function, counted in its jaxpr.

Matrix products alone are counted, 2 m k n for [m,k] [k,n]; elementwise work
(norms, gates, softmax) is small beside them. The body of a scan counts as often
as it runs, which XLA's own count does not do, a Pallas kernel as often as its
grid has programs, and a condition as its larger branch.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from deltanet_jax.ops.routing import RARE


def count_operations(function: Callable[..., object], *args: object) -> int:
  """Operations of function(*args); shapes (jax.ShapeDtypeStruct) are enough.

  Raises:
    NotImplementedError: a loop of unknown length, a convolution, or a kernel
      that is not Pallas's.
  """
  return count_in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_in_jaxpr(jaxpr: Jaxpr, filled: float = 1) -> int:
  """`count_operations` of a traced function, over all devices of its mesh.

  filled: the fraction of a grouped product's rows that belong to a group
  """
  return sum(_equation(eqn, filled) for eqn in jaxpr.eqns)


def _equation(eqn, filled):
  name, inner = eqn.primitive.name, list(jaxprs_in_params(eqn.params))
  if name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    return 2 * eqn.outvars[0].aval.size * _sizes(eqn.invars[0], contract)
  if name == 'ragged_dot_general':
    return round(filled * _ragged(eqn))
  if name == 'pallas_call':
    programs = math.prod(eqn.params['grid_mapping'].grid)
    return programs * count_in_jaxpr(eqn.params['jaxpr'], filled)
  if name in ('while', 'conv_general_dilated') or 'pallas' in name:
    raise NotImplementedError(
      f'the operations of {name!r} cannot be counted; count a form without it'
    )
  if name == 'cond':
    return max(count_in_jaxpr(x, filled) for x in inner if not _rare(x))
  times = eqn.params['length'] if name == 'scan' else 1
  if name == 'shard_map':  # its jaxpr is the work of one device
    mesh = eqn.params['mesh']
    times = math.prod(
      mesh.shape[axis] for axis in eqn.params['newly_manual_axes']
    )
  return times * sum(count_in_jaxpr(x, filled) for x in inner)


def _rare(jaxpr):
  return any(RARE in str(x.source_info.name_stack) for x in jaxpr.eqns)


def _ragged(eqn):
  """Each row is multiplied by one matrix, however rows are grouped."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (contract, _), _ = numbers.dot_dimension_numbers
  (ragged,) = numbers.lhs_ragged_dimensions
  size, groups = eqn.outvars[0].aval.size, eqn.invars[2].aval.shape[-1]
  if ragged in contract:  # the gradient has a matrix for each group
    size //= groups
  return 2 * size * _sizes(eqn.invars[0], contract)


def _sizes(var, axes):
  return math.prod(var.aval.shape[axis] for axis in axes)
