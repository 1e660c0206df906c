"""Affine maps of chunks, composed in a tree; the launches that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.ops import affine, scan
from tests import count_launches

K, V = 3, 2


def _maps(M, width):
  random = np.random.default_rng(M)
  carry = random.standard_normal((M, 1, 2, width, 1))
  write = random.standard_normal((M, 1, 2, K, V))
  return carry, write, random.standard_normal((1, 2, K, V))


@pytest.mark.parametrize('width, mixed', [(1, False), (1, True), (K, True)])
@pytest.mark.parametrize('M', [1, 7])
def test_a_tree_of_maps_equals_a_walk_through_them(
  M, width, mixed, quick_compile
):
  scale, write, state = _maps(M, width)
  mix = np.random.default_rng(0).standard_normal((M, 1, 2, K, K)) * mixed
  whole = scale * np.eye(K) + mix

  @jax.jit
  def walk(scale, mix, write, state, d_state):
    carry = affine.Carry(scale, mix if mixed else None)
    tree = affine.multiply_pairs(carry)
    back = affine.tree_walk(tree, write, d_state, reverse=True)
    return affine.tree_walk(tree, write, state), back

  got = walk(scale, mix, write, state, state)
  entry, exits, now = [], [], state
  for a, u in zip(whole, write, strict=True):
    entry.append(now)
    now = a @ now + u
  back = state
  for a, u in zip(whole[::-1], write[::-1], strict=True):
    exits.append(back)
    back = np.swapaxes(a, -1, -2) @ back + u
  want = (np.stack(entry), now), (np.stack(exits[::-1]), back)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    got,
    want,
  )


def test_carries_near_the_identity_gather_no_error(quick_compile):
  # one key in every chunk: 64 times the same rounding
  M, K = 64, 16
  random = np.random.default_rng(0)
  k = random.standard_normal((K, 1))
  k /= np.linalg.norm(k)
  scale, mix = np.float32(np.exp(-6e-4)), np.float32(-k @ k.T)
  state = np.float32(random.standard_normal((1, 1, K, K)))

  @jax.jit
  def walk(state):
    carry = affine.Carry(
      jnp.full((M, 1, 1, 1, 1), scale), jnp.broadcast_to(mix, (M, 1, 1, K, K))
    )
    write = jnp.zeros((M, *state.shape))
    return affine.tree_walk(affine.multiply_pairs(carry), write, state)[1]

  whole = np.float64(scale) * np.eye(K) + mix
  want = np.linalg.matrix_power(whole, M) @ state
  assert np.abs(walk(state) - want).max() < 8e-7 * np.abs(want).max()


def test_numbers_that_carry_have_the_gradient_of_a_scan(quick_compile):
  maps = [jnp.asarray(x) for x in _maps(5, 1)]

  def plain(carry, write, state):
    entry = []
    for a, u in zip(carry, write, strict=True):
      entry.append(state)
      state = a * state + u
    return jnp.stack(entry), state

  def pull(walk):
    out, pull = jax.vjp(walk, *maps)
    return pull(jax.tree.map(jnp.sin, out))

  got, want = (
    jax.jit(pull, static_argnums=0)(x) for x in (affine.scalar_walk, plain)
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4), got, want)


def test_the_states_of_a_group_have_a_fixed_size():
  size = lambda *shape: scan._group_size('tree', np.empty(shape, np.int8))
  assert size(1, 16, 128, 128) == 64
  assert size(1, 16, 64, 64) == 256
  assert size(64, 16, 128, 128) == size(0, 16, 128, 128) // 2**22 == 4
  assert scan._group_size('chunked', np.empty((1, 16, 128, 128), np.int8)) == 4


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  %sine = f32[8]{0} sine(%p.0)
  ROOT %twice = f32[8]{0} add(%sine, %sine)
}

%sliced (p.1: f32[4,8], p.2: s32[]) -> f32[8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,8}
  ROOT %row = f32[8]{0} bitcast(%slice)
}

%body (t: (s32[], f32[8], f32[4,8])) -> (s32[], f32[8], f32[4,8]) {
  %t = (s32[], f32[8]{0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %rows = f32[4,8]{1,0} get-tuple-element(%t), index=2
  %start = ((f32[4,8]{1,0}, s32[]), f32[8]{0}, u32[]) fusion-start(%rows, %i), kind=kLoop, calls=%sliced
  %one = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %done = f32[8]{0} fusion-done(%start)
  %product = (f32[8]{0}, s8[64]{0}) custom-call(%one, %done), custom_call_target="__cublas$gemm"
  %y = f32[8]{0} get-tuple-element(%product), index=0
  ROOT %out = (s32[], f32[8]{0}, f32[4,8]{1,0}) tuple(%i, %y, %rows)
}

%condition (t.1: (s32[], f32[8], f32[4,8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}, f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant(4)
  ROOT %more = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8], b: f32[4,8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %first = s32[] copy(%zero)
  %all = (s32[], f32[8]{0}, f32[4,8]{1,0}) tuple(%first, %a, %b)
  %loop = (s32[], f32[8]{0}, f32[4,8]{1,0}) while(%all), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %last = f32[8]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_launches_are_what_is_started_as_often_as_it_runs():
  # a copy; in each of 4 turns a slice beside a fusion, and a product
  assert count_launches.count_launches(PROGRAM) == 1 + 4 * 3


def _stored():
  """The table of the page: launches and MiB with gradients by rule and form."""
  _, _, table = count_launches.PAGE.read_text().partition(count_launches.MARK)
  rows = [
    [cell.strip().replace(',', '') for cell in line.split('|')[1:-1]]
    for line in table.splitlines()
    if line.startswith('| ') and not line.startswith('| rule')
  ]
  return {
    (rule, form, int(chunk)): (int(launches), int(held))
    for rule, form, chunk, _, launches, _, held in rows
  }


def test_the_stored_table_is_as_lean_as_the_form_promises():
  stored = _stored()
  assert set(stored) == {
    (rule, *how)
    for rule in count_launches.RULES
    for how in count_launches.FORMS
  }
  # of MiB: twice those of the chunked form when this was written; 1.3 GiB
  most = {
    'delta_rule': (1000, 2 * 647),
    'linear_attention': (1000, 2 * 324),
    'kda': (2500, 1331),
  }
  for rule, (launches, held) in most.items():
    assert stored[rule, 'tree', 64][0] <= launches, rule
    assert stored[rule, 'tree', 64][1] <= held, rule


@pytest.mark.slow
def test_the_stored_table_is_what_is_compiled():
  pytest.importorskip('jax_cuda13_plugin')
  row = count_launches.count_alone('linear_attention', 'tree', 64)
  cells = [cell.strip().replace(',', '') for cell in row.split('|')[1:-1]]
  launches, held = _stored()['linear_attention', 'tree', 64]
  assert int(cells[4]) == pytest.approx(launches, rel=0.1)
  assert int(cells[6]) == pytest.approx(held, rel=0.1)
