"""Compiled programs are read rightly: collectives, traffic, loops."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from deltanet_jax import flops
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.lab.dryrun import hlo, traffic
from deltanet_jax.parallel import experts, sharding

N, L, D = 8, 5, 64


def _text(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


def _mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=4))


def _summed(turns, inner):
  """Sums over fsdp `turns` x `inner` times, gathers once over both axes."""

  @functools.partial(
    jax.shard_map,
    mesh=_mesh(),
    in_specs=PartitionSpec(('data', 'fsdp')),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  def f(x):
    def add(x, _):
      return jnp.sin(jax.lax.psum(x, 'fsdp')), None

    def outer(x, _):
      return jax.lax.scan(add, x, None, length=inner)[0], None

    x = jax.lax.scan(outer, x, None, length=turns)[0]
    return jax.lax.all_gather(x, ('data', 'fsdp'), tiled=True)

  return _text(f, jax.ShapeDtypeStruct((N * 16, D), jnp.float32))


def test_collectives_in_loops_count_as_often_as_they_run():
  found = {x.kind: x for x in hlo.find_collectives(_summed(3, 7))}
  assert set(found) == {'all-reduce', 'all-gather'}
  assert found['all-reduce'].times == 21
  assert found['all-reduce'].bytes == 4 * 16 * D
  assert found['all-reduce'].group == (0, 1, 2, 3)
  assert found['all-gather'].times == 1
  assert found['all-gather'].shapes == ((N * 16, D),)
  assert found['all-gather'].group == tuple(range(N))


def test_a_rare_side_of_a_condition_does_not_count():
  def text(name):
    @functools.partial(
      jax.shard_map,
      mesh=_mesh(),
      in_specs=(PartitionSpec(), PartitionSpec(('data', 'fsdp'))),
      out_specs=PartitionSpec('data'),
      check_vma=False,
    )
    def f(some, x):
      gather = lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True)
      copies = lambda x: jnp.tile(jax.lax.psum(x, 'fsdp'), (4, 1))
      y = jax.lax.cond(some, copies, jax.named_scope(name)(gather), x)
      # a cache of compiled programs takes two that differ in names for one
      return y * (3 if name == flops.RARE else 2)

    shape = jax.ShapeDtypeStruct
    return _text(f, shape((), bool), shape((N * 16, D), jnp.float32))

  kinds = lambda name: {x.kind for x in hlo.find_collectives(text(name))}
  assert kinds('plain') == {'all-reduce', 'all-gather'}
  assert kinds(flops.RARE) == {'all-reduce'}
  assert traffic.count_bytes(text(flops.RARE)) < traffic.count_bytes(
    text('plain')
  )


def test_traffic_of_a_scan_is_that_of_each_layers_own_weights():
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  per_layer = 4 * D * D
  for layers in (4, 32):
    moved = traffic.count_bytes(_text(f, shape(2, D), shape(layers, D, D)))
    # read; and perhaps written and read again as a slice: never the stack
    assert layers * per_layer <= moved < 4.5 * layers * per_layer


HIDDEN = """HloModule jit_step, is_scheduled=true

%fused_start (p.0: bf16[4,8]) -> bf16[32,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%fused_done (p.1: bf16[4,8]) -> bf16[32,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%all-reduce-scatter.1 (p.2: f32[64,8]) -> f32[8,8] {
  %p.2 = f32[64,8]{1,0} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p.2), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,8}
}

%body (t: (s32[], bf16[4,8], f32[64,8])) -> (s32[], bf16[4,8], f32[64,8]) {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%t), index=1
  %y = f32[64,8]{1,0} get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %start = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%fused_start
  %done = bf16[32,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%fused_done
  %scattered = f32[8,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[4,8]{1,0}, /*index=2*/f32[64,8]{1,0}) tuple(%next, %x, %y)
}

%condition (t.1: (s32[], bf16[4,8], f32[64,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %end = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: bf16[4,8], b: f32[64,8]) -> f32[64,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %first = s32[]{:T(128)} constant(2)
  %tuple = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) tuple(%first, %a, %b)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %token = token[] after-all()
  %send = (f32[64,8]{1,0}, u32[], token[]) send(%b, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %last = f32[64,8]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_what_a_tpus_compiler_hides_in_fusions_counts_once_a_turn():
  found = {x.kind: x for x in hlo.find_collectives(HIDDEN)}
  assert len(found) == len(hlo.find_collectives(HIDDEN)) == 3
  assert found['all-gather'].times == 10  # from 2 to 12
  assert found['all-gather'].bytes == 2 * 32 * 8
  # its result, not that of the sum inside
  assert found['reduce-scatter'].shapes == ((8, 8),)
  assert found['reduce-scatter'].times == 10
  assert found[f'{hlo.BETWEEN}: all-reduce'].bytes == 4 * 64 * 8
  assert hlo.find_unknown_loops(HIDDEN) == []


OFFLOADED = """HloModule jit_step, is_scheduled=true

%gather (p: bf16[4,8]) -> bf16[32,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %start = ((bf16[4,8]{1,0}, token[]), bf16[32,8]{1,0}) call-start(%a), async_execution_thread="sparsecore", to_apply=%gather
  ROOT %done = bf16[32,8]{1,0} call-done(%start)
}
"""  # noqa: E501


def test_what_the_sparse_cores_send_counts_once():
  (found,) = hlo.find_collectives(OFFLOADED)
  assert (found.kind, found.times, found.bytes) == ('all-gather', 1, 2 * 32 * 8)
  assert traffic.count_bytes(OFFLOADED) == 2 * (4 * 8 + 32 * 8)


EXPERTS = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[40,8], room: bf16[80,8], n: s32[8], w: bf16[8,8,4]) -> bf16[80,4] {
  %a = bf16[40,8]{1,0} parameter(0)
  %room = bf16[80,8]{1,0} parameter(1)
  %n = s32[8]{0} parameter(2)
  %w = bf16[8,8,4]{2,1,0} parameter(3)
  %rows = bf16[80,8]{1,0} ragged-all-to-all(%a, %room, %n, %n, %n, %n), channel_id=1, replica_groups=[1,8]<=[8]
  %later = bf16[80,8]{1,0} add-dependency(%rows, %n)
  ROOT %ragged-dot-none.1 = bf16[80,4]{1,0} custom-call(%n, %later, %w), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_of_the_room_for_experts_rows_only_what_is_filled_counts():
  (found,) = hlo.find_collectives(EXPERTS)
  assert (found.kind, found.bytes) == ('ragged-all-to-all', 2 * 40 * 8)
  products = 2 * 40 * (8 + 4) + 2 * 8 * 8 * 4 + 4 * 8
  moved = traffic.count_bytes(
    EXPERTS, experts.find_filled_share(4096, experts=64, top=8, P=8)
  )
  assert moved == 2 * found.bytes + products


NESTED = """HloModule jit_step, is_scheduled=true

%laid_out (p.0: f32[64,8]) -> f32[64,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  ROOT %copy.0 = f32[64,8]{0,1} copy(%p.0)
}

%row (p.1: f32[64,8], i.1: s32[]) -> f32[1,8] {
  %p.1 = f32[64,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %slice.1 = f32[1,8]{1,0} dynamic-slice(%p.1, %i.1, %zero.1), dynamic_slice_sizes={1,8}
}

%written (p.2: f32[64,8], q.2: f32[64,8], i.2: s32[]) -> f32[64,8] {
  %p.2 = f32[64,8]{1,0} parameter(0)
  %q.2 = f32[64,8]{1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %all.2 = f32[64,8]{0,1} fusion(%p.2), kind=kLoop, calls=%laid_out
  %row.2 = f32[1,8]{1,0} fusion(%q.2, %i.2), kind=kLoop, calls=%row
  ROOT %new.2 = f32[64,8]{0,1} dynamic-update-slice(%all.2, %row.2, %i.2, %zero.2)
}

ENTRY %main (a: f32[64,8], b: f32[64,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %end = f32[64,8]{0,1} fusion(%a, %b, %i), kind=kLoop, calls=%written
}
"""  # noqa: E501


def test_of_what_fusions_in_a_fusion_slice_only_the_slice_moves():
  # a row is read, a row is written, and the index is read
  assert traffic.count_bytes(NESTED) == 2 * 4 * 8 + 4


def test_a_loop_of_unknown_length_is_named():
  text = HIDDEN.replace('constant(12)', 'parameter(1)')
  assert hlo.find_unknown_loops(text) == ['loop']


def test_the_chips_own_memory_is_no_traffic():
  slow = HIDDEN.replace('S(1)', '')
  assert (
    traffic.count_bytes(slow) - traffic.count_bytes(HIDDEN) == 10 * 2 * 32 * 8
  )


@pytest.mark.parametrize(
  'text, group',
  [
    ('replica_groups={{0,2},{1,3}}, x', (0, 2)),
    ('replica_groups=[2,4]<=[8], x', (0, 1, 2, 3)),
    ('replica_groups=[4,2]<=[2,4]T(1,0), x', (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", (0, 1, 4, 5)),
    ('source_target_pairs={{3,1},{1,0}}, x', (3, 1)),
    ('replica_groups={}, x', ()),
  ],
)
def test_the_first_group_is_read_in_every_notation(text, group):
  assert hlo.parse_group(text) == group


def test_operations_inside_a_shard_map_are_those_of_all_devices():
  inside = jax.shard_map(
    lambda x, w: x @ w,
    mesh=_mesh(),
    in_specs=(PartitionSpec(('data', 'fsdp')), PartitionSpec()),
    out_specs=PartitionSpec(('data', 'fsdp')),
  )
  args = jnp.zeros((N, 16)), jnp.zeros((16, 32))
  assert flops.count_operations(inside, *args) == flops.count_operations(
    jnp.matmul, *args
  )


# ------------------------------------------------------------------ chips
