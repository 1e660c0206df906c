"""The contract of every token mixer: each *Config of config/mixers.py with a
`tiny()`, found by name, and the options below."""

import dataclasses
import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config
from deltanet_jax.config import mixers
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.config.forms import OWN
from deltanet_jax.layers.proj import AXES
from deltanet_jax.mixers.base import Context
from deltanet_jax.parallel import sharding

B, T, D = 4, 24, 16
FIRST = T // 2  # tokens of each of two parts: one program for both

YARN = mixers.YarnConfig(
  factor=4.0, original=16, mscale=1.0, mscale_all_dim=0.5
)
OPTIONS = {
  'AttentionConfig': (
    {'window': 5},
    {'qk_norm': False, 'gate': False, 'rotary_dim': 0},
    {'joint_norm': True, 'interleaved': True, 'yarn': YARN},
  ),
  'MLAConfig': (
    {'rotary': False, 'query_latent': None, 'gate': 'none'},
    {'gate': 'head', 'yarn': YARN, 'interleaved': False},
  ),
  'DSAConfig': ({'top': 24}, {'stage': 'dense', 'rotary': False}),
  'LinearAttentionConfig': ({'conv': 3},),
  'DeltaNetConfig': ({'conv': 0, 'negative_eigenvalues': True},),
  'GatedDeltaNetConfig': (
    {'conv': 0},
    {'negative_eigenvalues': True, 'key_heads': 4},
  ),
  'KDAConfig': (
    {'lower_bound': -5.0, 'gate_rank': None},
    {'separate_gates': True, 'conv': 0},
  ),
}
# options that change the inputs of a rule
RULE_OPTIONS = {'KDAConfig': ({'separate_gates': True},)}


def _configs(options):
  for name, cls in inspect.getmembers(mixers, inspect.isclass):
    if hasattr(cls, 'tiny'):
      for changes in ({}, *options.get(name, ())):
        cfg = dataclasses.replace(cls.tiny(), **changes)
        if hasattr(cfg, 'chunk'):
          # options in the form that compiles fastest; the forms agree
          form = 'recurrent' if changes else cfg.form
          cfg = dataclasses.replace(cfg, chunk=16, form=form)
        yield pytest.param(cfg, id='-'.join([name, *changes]))


pytestmark = pytest.mark.usefixtures('quick_compile')
every_class = pytest.mark.parametrize('cfg', list(_configs({})))
every_mixer = pytest.mark.parametrize('cfg', list(_configs(OPTIONS)))


def _call(cfg, params, x, segment_ids=None, cache=None, start=0, lengths=None):
  index = jnp.arange(x.shape[1], dtype=jnp.int32)
  positions = jnp.broadcast_to(index, x.shape[:2]) + start
  if segment_ids is not None:
    run = jnp.cumsum(jnp.diff(segment_ids, prepend=0) != 0, 1)
    positions -= (run[:, None] == run[:, :, None]).argmax(-1)
  ctx = Context(positions, segment_ids, jnp.float32(0.5), lengths)
  module = cfg.make(d_model=D, dtype=x.dtype)
  y, aux = module.apply({'params': params}, x, ctx, cache)
  return y, aux.cache


@functools.cache
def _apply(cfg):
  return jax.jit(functools.partial(_call, cfg))


@functools.cache
def _pull(cfg):
  """(params, x, w, segment_ids) -> y, and the gradients of sum(w y)."""

  def loss(params, x, w, segment_ids):
    y, _ = _call(cfg, params, x, segment_ids)
    return jnp.sum(w * y), y

  grad = jax.value_and_grad(loss, (0, 1), has_aux=True)

  def run(params, x, w, segment_ids=None):
    (_, y), grads = grad(params, x, w, segment_ids)
    return y, grads

  return jax.jit(run)


def _boxed(cfg):
  module = cfg.make(d_model=D)
  x = jnp.zeros((1, 1, D))
  ctx = Context(jnp.zeros((1, 1), jnp.int32), None, jnp.float32(0.5))
  return lambda: module.init(jax.random.key(0), x, ctx)['params']


@functools.cache
def _params(cfg):
  params = jax.jit(lambda: nn.unbox(_boxed(cfg)()))()
  # no weight keeps its initial value: a norm of ones would hide a lost weight
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  return tree.unflatten(
    [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
  )


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((2, B, T, D), np.float32)


def _close(got, want, rtol=2e-5):
  def check(a, b):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max())
    )

  jax.tree.map(check, got, want)


@pytest.mark.parametrize('cfg', list(_configs(RULE_OPTIONS)))
def test_forms_agree_in_value_and_gradient(cfg):
  x, w = _inputs()
  # 'tree' is held to the others in tests/ops
  forms = OWN[:3] if hasattr(cfg, 'chunk') else (None,)
  found = [
    _pull(dataclasses.replace(cfg, form=form) if form else cfg)(
      _params(cfg), x, w
    )
    for form in forms
  ]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  for path, leaf in jax.tree_util.tree_leaves_with_path(found[0]):
    # an indexer gets no gradient from y
    learns = "['index_" not in jax.tree_util.keystr(path)
    assert (np.abs(leaf).max() > 0) == learns
  for other in found[1:]:
    _close(other, found[0])


@every_mixer
def test_two_parts_with_a_cache_equal_the_whole(cfg):
  (x, w), params = _inputs(), _params(cfg)
  whole, _ = _pull(cfg)(params, x, w)
  cache = cfg.init_cache(B, T, jnp.float32)
  one, cache = _apply(cfg)(params, x[:, :FIRST], cache=cache, start=0)
  two, _ = _apply(cfg)(params, x[:, FIRST:], cache=cache, start=FIRST)
  _close(jnp.concatenate([one, two], 1), whole)


@every_mixer
def test_prefill_then_steps_equals_full(cfg):
  (x, w), params = _inputs(), _params(cfg)
  whole, _ = _pull(cfg)(params, x, w)
  cache = cfg.init_cache(B, T, jnp.float32)
  y, cache = _apply(cfg)(params, x[:, :FIRST], cache=cache, start=0)
  parts = [y]
  for t in range(FIRST, T):
    y, cache = _apply(cfg)(params, x[:, t : t + 1], cache=cache, start=t)
    parts.append(y)
  _close(jnp.concatenate(parts, 1), whole)


LENGTHS = (5, 17, 1, 0)  # of the rows' prompts


@every_mixer
def test_rows_of_other_lengths_equal_each_alone(cfg):
  """Prompts padded with NaN, then pieces of another length in each row."""
  (x, _), params = _inputs(), _params(cfg)
  cache = cfg.init_cache(B, T, jnp.float32)
  lengths = np.zeros(B, np.int32)
  got = [[] for _ in range(B)]
  # tokens of each row: prompts, then steps, some rows without a token
  for counts in (LENGTHS, (1, 1, 1, 1), (1, 0, 1, 0), (3, 5, 0, 4), (1,) * B):
    width = max(17 if counts == LENGTHS else 1, *counts)
    part = np.full((B, width, D), np.nan, np.float32)
    for b, n in enumerate(counts):
      part[b, :n] = x[b, lengths[b] : lengths[b] + n]
    before = cache
    y, cache = _apply(cfg)(
      params,
      part,
      cache=cache,
      start=lengths[:, None],
      lengths=jnp.int32(counts),
    )
    for b, n in enumerate(counts):
      got[b].append(y[b, :n])
      if n == 0:
        row = lambda x, b=b: x[b]
        chex.assert_trees_all_equal(
          *(jax.tree.map(row, x) for x in (cache, before))
        )
    lengths = lengths + np.int32(counts)
  for b, n in enumerate(lengths):
    alone = cfg.init_cache(1, T, jnp.float32)
    want, alone = _apply(cfg)(params, x[b : b + 1, :n], cache=alone)
    _close(jnp.concatenate(got[b]), want[0])
    _close(jax.tree.map(lambda x, b=b: x[b : b + 1], cache), alone)


@every_mixer
def test_no_gradient_reaches_a_later_token(cfg):
  x, w = _inputs()
  t = 17
  _, (_, dx) = _pull(cfg)(_params(cfg), x, w * (np.arange(T) == t)[:, None])
  sizes = np.abs(dx).max((0, 2))
  assert (sizes[t + 1 :] == 0).all()
  seen = min(t + 1, getattr(cfg, 'window', None) or T)
  if getattr(cfg, 'top', T) >= T:  # or some keys are not chosen
    assert (sizes[t + 1 - seen : t + 1] > 0).all()


@every_mixer
def test_packed_documents_equal_separate_ones(cfg):
  (x, w), params = _inputs(), _params(cfg)
  # an id that comes back is another document
  ends, ids = (0, 7, 9, 18, T), (4, 2, 4, 2)
  segment_ids = np.repeat(ids, np.diff(ends))[None].repeat(B, 0)
  y, (dparams, dx) = _pull(cfg)(
    params, x, w, jnp.asarray(segment_ids, jnp.int32)
  )
  total = jax.tree.map(jnp.zeros_like, params)
  for start, end in zip(ends[:-1], ends[1:], strict=True):
    # at the start of a row of the same length: the rest has no weight
    alone, weight = np.zeros_like(x), np.zeros_like(w)
    alone[:, : end - start] = x[:, start:end]
    weight[:, : end - start] = w[:, start:end]
    part, (dp, dpart) = _pull(cfg)(params, alone, weight)
    _close(y[:, start:end], part[:, : end - start])
    _close(dx[:, start:end], dpart[:, : end - start])
    total = jax.tree.map(jnp.add, total, dp)
  _close(dparams, total, 5e-5)


@every_mixer
def test_segments_with_a_cache_are_refused(cfg):
  x = jnp.zeros((B, 2, D))
  with pytest.raises(ValueError, match='one document per row'):
    _call(
      cfg,
      _params(cfg),
      x,
      jnp.ones((B, 2), jnp.int32),
      cfg.init_cache(B, T, jnp.float32),
    )


@every_mixer
def test_both_ways_is_for_attention_alone(cfg):
  (x, _), params = _inputs(), _params(cfg)
  ctx = Context(
    jnp.broadcast_to(jnp.arange(T), (B, T)),
    depth=jnp.float32(0.5),
    mode='bidirectional',
  )
  run = lambda x: cfg.make(d_model=D).apply({'params': params}, x, ctx)[0]
  if not isinstance(cfg, mixers.ATTENTION) or getattr(cfg, 'window', None):
    with pytest.raises(ValueError, match="'bidirectional'; .* causal alone"):
      run(x)
    return
  # the last token sees the same in both modes; the first sees the last
  _close(run(x)[:, -1], _apply(cfg)(params, x)[0][:, -1])
  other = run(np.concatenate([x[:, :-1], -x[:, -1:]], 1))
  assert np.abs(other - run(x))[:, 0].any()


@every_class
def test_bfloat16_input_keeps_float32_states(cfg):
  (x, w), params = _inputs(), _params(cfg)
  cache = cfg.init_cache(B, T, jnp.bfloat16)
  y, after = _apply(cfg)(
    params, jnp.asarray(x[:, :FIRST], jnp.bfloat16), cache=cache
  )
  assert y.dtype == jnp.bfloat16
  chex.assert_trees_all_equal_dtypes(after, cache)
  if hasattr(after, 'state'):
    assert after.state.dtype == jnp.float32
  whole, _ = _pull(cfg)(params, x, w)
  _close(y.astype(jnp.float32), whole[:, :FIRST], 0.06)


@every_mixer
def test_cache_of_a_recurrent_mixer_does_not_grow(cfg):
  def size(max_len):
    cache = jax.eval_shape(lambda: cfg.init_cache(1, max_len, jnp.float32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

  grows = hasattr(cfg, 'latent') or (
    hasattr(cfg, 'kv_heads') and cfg.window is None
  )
  assert (size(64) == size(4096)) != grows


@every_mixer
def test_a_cache_says_what_its_parts_hold(cfg):
  small, large = (
    jax.eval_shape(lambda n=n: cfg.init_cache(B, n, jnp.bfloat16))
    for n in (1, 3)
  )
  assert set(small.describe_parts()) == set(small._fields)
  for name, one, more in zip(small._fields, small, large, strict=True):
    if one is None:
      continue
    part = small.describe_parts()[name]
    assert (one.shape != more.shape) == (
      part == 'tokens' or name == 'positions'
    )
    assert (one.dtype == jnp.int32) == (part == 'positions')
    assert one.shape[0] == B


@every_class
def test_sharded_equals_unsharded(cfg):
  (x, w), params = _inputs(), _params(cfg)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  axes = nn.get_partition_spec(jax.eval_shape(_boxed(cfg)))
  place = lambda value, axes: jax.device_put(
    value,
    jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*(sharding.RULES[a] for a in axes))
    ),
  )
  split = jax.tree.map(place, params, axes)
  rows = sharding.make_batch_sharding(mesh)
  got = _pull(cfg)(split, *(jax.device_put(a, rows) for a in (x, w)))
  jax.block_until_ready(got)
  assert len(got[1][1].sharding.device_set) == 8
  _close(got, _pull(cfg)(params, x, w))


@every_mixer
def test_every_axis_name_is_known(cfg):
  weights = jax.tree.leaves(
    jax.eval_shape(_boxed(cfg)), is_leaf=lambda x: hasattr(x, 'names')
  )
  for weight in weights:
    assert len(weight.names) == weight.value.ndim
    assert set(weight.names) <= set(AXES)


@every_mixer
def test_config_survives_json(cfg):
  assert config.from_json(config.to_json(cfg)) == cfg
