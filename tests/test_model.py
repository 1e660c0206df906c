"""The whole language model: a small 3:1 hybrid with a prefix and a suffix."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  GatedDeltaNetConfig,
  LightningConfig,
)
from deltanet_jax.mixers.base import count_positions
from deltanet_jax.model import (
  Backbone,
  HybridLM,
  get_head_weight,
  init_cache,
)
from deltanet_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

B, T, Z = 4, 16, 30
DELTA = GatedDeltaNetConfig(
  key_heads=2, value_heads=4, key_dim=8, value_dim=8, chunk=16
)
FULL = AttentionConfig(
  heads=4, kv_heads=2, head_dim=8, rotary_dim=4, qk_norm=True, gate=True
)
WINDOW = dataclasses.replace(FULL, window=5, gate=False)
LIGHTNING = LightningConfig(heads=4, head_dim=8, chunk=16)


def _layer(mixer):
  return Layer(mixer, MLPConfig(24))


HYBRID = ModelConfig(
  vocab=Z,
  d_model=16,
  repeats=2,
  period=(_layer(DELTA),) * 3 + (_layer(FULL),),
)
IRREGULAR = ModelConfig(
  vocab=Z,
  d_model=16,
  repeats=2,
  prefix=(_layer(DELTA),),
  period=(_layer(LIGHTNING), _layer(FULL)),
  suffix=(_layer(WINDOW),),
)


@functools.cache
def _params(cfg):
  """Parameters from numpy: compiling an initialization would take too long."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    normal = rng.standard_normal(x.shape, np.float32)
    centre = 1 if path[-1].key == 'scale' else 0
    return jnp.asarray(centre + 0.25 * normal)

  shapes = sharding.make_abstract_params(HybridLM(cfg))
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _apply(cfg):
  model = HybridLM(cfg)
  return jax.jit(
    lambda params, *args, **kw: model.apply({'params': params}, *args, **kw)
  )


@functools.cache
def _pull(cfg):
  """Mean next-token loss, its gradient, and the logits."""

  def loss(params, tokens, segment_ids=None):
    logits, _ = HybridLM(cfg).apply(
      {'params': params}, tokens, segment_ids=segment_ids
    )
    log_p = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)
    return -chosen.mean(), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _tokens(seed=0):
  return np.random.default_rng(seed).integers(0, Z, (B, T), np.int32)


def _close(got, want, rtol=2e-5):
  def check(a, b):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max())
    )

  jax.tree.map(check, got, want)


@pytest.mark.parametrize('cfg', [HYBRID, IRREGULAR], ids=['3:1', 'irregular'])
def test_prefill_then_steps_equals_full(cfg):
  tokens, params = _tokens(), _params(cfg)
  whole, none = _apply(cfg)(params, tokens)
  assert not jax.tree.leaves(none) and whole.dtype == jnp.float32
  logits, cache = _apply(cfg)(
    params, tokens[:, :9], cache=init_cache(cfg, B, T, jnp.float32)
  )
  parts = [logits]
  for t in range(9, T):
    assert (cache.length == t).all()
    logits, cache = _apply(cfg)(params, tokens[:, t : t + 1], cache=cache)
    parts.append(logits)
  _close(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize(
  'remat',
  [pytest.param('dots', marks=[pytest.mark.slow, pytest.mark.long]), 'full'],
)
def test_rematerialisation_changes_no_gradient(remat):
  args = _params(HYBRID), _tokens()
  other = dataclasses.replace(HYBRID, remat=remat)
  _close(_pull(other)(*args), _pull(HYBRID)(*args), 1e-4)
  text = [str(jax.make_jaxpr(_pull(cfg))(*args)) for cfg in (HYBRID, other)]
  assert ['policy=' in t for t in text] == [False, True]


@pytest.mark.parametrize('cfg', [HYBRID, IRREGULAR], ids=['3:1', 'irregular'])
def test_packed_documents_equal_separate_ones(cfg):
  tokens, params = _tokens(), _params(cfg)
  ids = jnp.asarray(np.repeat([[1, 2]], [7, T - 7], 1).repeat(B, 0), jnp.int32)
  packed, _ = _apply(cfg)(params, tokens, segment_ids=ids)
  # each document is followed by tokens that it cannot see
  second = np.roll(tokens, -7, 1)
  first_alone, _ = _apply(cfg)(params, tokens)
  second_alone, _ = _apply(cfg)(params, second)
  # two programs: the forms are 2e-4 of 4 apart in float32
  _close(packed[:, :7], first_alone[:, :7], 1e-4)
  _close(packed[:, 7:], second_alone[:, : T - 7], 1e-4)


def test_given_positions_replace_the_counted_ones():
  tokens, params = _tokens(), _params(HYBRID)
  count = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  plain, _ = _apply(HYBRID)(params, tokens)
  same, _ = _apply(HYBRID)(params, tokens, positions=count)
  other, _ = _apply(HYBRID)(params, tokens, positions=count * 2)
  _close(same, plain, 1e-6)
  assert np.abs(other - plain).max() > 1e-3


def test_positions_restart_in_every_segment_and_go_on_in_a_cache():
  # checked directly: rotary depends on differences, so no logit shows a restart
  ids = jnp.asarray([[5, 5, 5, 2, 2, 9], [1, 2, 2, 2, 2, 2]], jnp.int32)
  np.testing.assert_array_equal(
    count_positions(ids.shape, ids, None),
    [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]],
  )
  cache = init_cache(HYBRID, 2, T, jnp.float32)
  cache = cache._replace(length=jnp.int32([3, 0]))
  np.testing.assert_array_equal(
    count_positions(ids.shape, None, cache.length),
    [np.arange(3, 9), np.arange(6)],
  )


def test_segments_with_a_cache_are_refused():
  cache = init_cache(HYBRID, B, T, jnp.float32)
  with pytest.raises(ValueError, match='one document per row'):
    HybridLM(HYBRID).apply(
      {'params': _params(HYBRID)},
      _tokens(),
      segment_ids=jnp.ones((B, T), jnp.int32),
      cache=cache,
    )


def test_prompt_longer_than_the_cache_is_refused():
  cache = init_cache(HYBRID, B, T - 1, jnp.float32)
  with pytest.raises(ValueError, match=f'{T} tokens for a cache of'):
    HybridLM(HYBRID).apply({'params': _params(HYBRID)}, _tokens(), cache=cache)


def test_scanned_layers_equal_the_same_layers_in_a_row():
  flat = dataclasses.replace(
    IRREGULAR, prefix=IRREGULAR.layers, period=(), repeats=0, suffix=()
  )
  params = _params(IRREGULAR)
  backbone = params['backbone']
  blocks = [backbone['prefix']['layer_0']]
  for i in range(IRREGULAR.repeats):
    for name in ('layer_0', 'layer_1'):
      blocks.append(jax.tree.map(lambda x, i=i: x[i], backbone['period'][name]))
  blocks.append(backbone['suffix']['layer_0'])
  row = {f'layer_{i}': block for i, block in enumerate(blocks)}
  keep = {name: backbone[name] for name in ('embed', 'norm')}
  unrolled = {**params, 'backbone': {**keep, 'prefix': row}}
  want, _ = _apply(flat)(unrolled, _tokens())
  _close(_apply(IRREGULAR)(params, _tokens())[0], want)


def test_tied_head_is_the_embedding_table():
  tied = dataclasses.replace(HYBRID, tied=True)
  params = _params(tied)
  assert 'head' not in params
  logits, _ = _apply(tied)(params, _tokens())
  untied = {**params, 'head': {'w': params['backbone']['embed'].T}}
  _close(_apply(HYBRID)(untied, _tokens())[0], logits, 1e-6)


@pytest.mark.parametrize('tied', [False, True])
def test_backbone_and_head_weight_give_the_logits(tied):
  cfg = dataclasses.replace(HYBRID, tied=tied)
  params = _params(cfg)
  hidden, _, reports = jax.jit(Backbone(cfg).apply)(
    {'params': params['backbone']}, _tokens()
  )
  assert not jax.tree.leaves(reports)
  logits, _ = _apply(cfg)(params, _tokens())
  _close(hidden @ get_head_weight(params, cfg), logits)


def test_eight_devices_give_the_loss_and_gradient_of_one(capfd):
  model, tokens = HybridLM(HYBRID), _tokens()
  (loss, _), grads = _pull(HYBRID)(_params(HYBRID), tokens)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  places = sharding.make_param_shardings(model, mesh)
  params = jax.device_put(_params(HYBRID), places)
  with jax.set_mesh(mesh):
    (split_loss, logits), split_grads = _pull(HYBRID)(
      params, jax.device_put(tokens, sharding.make_batch_sharding(mesh))
    )
  jax.block_until_ready(split_grads)
  assert logits.sharding.shard_shape(logits.shape)[0] == B // 4
  np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
  _close(split_grads, grads, 1e-4)
  # XLA's warning that it copies a sharded array whole
  assert 'full rematerialization' not in capfd.readouterr().err


def test_bfloat16_model_keeps_float32_weights_and_logits():
  params, tokens = _params(HYBRID), _tokens()
  model = HybridLM(HYBRID, jnp.bfloat16)
  logits, cache = jax.jit(model.apply)(
    {'params': params}, tokens, cache=init_cache(HYBRID, B, T, jnp.bfloat16)
  )
  assert logits.dtype == jnp.float32
  assert cache.period[0].state.dtype == jnp.float32
  assert cache.period[3].k.dtype == jnp.bfloat16
  want, _ = _apply(HYBRID)(params, tokens)
  # not closer: a norm follows the delta rule, and a small output's rounding
  # becomes a large one's
  assert np.corrcoef(logits.ravel(), want.ravel())[0, 1] > 0.9


def test_cache_grows_with_the_attention_layers_only():
  def size(cfg, max_len):
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, max_len, jnp.bfloat16))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

  # keys and values, and an int32 position, of 2 rows in each of two layers
  slot = 2 * 2 * (2 * 2 * 8 * 2 + 4)
  assert size(HYBRID, 512) - size(HYBRID, 256) == 256 * slot
  pure = dataclasses.replace(HYBRID, period=(_layer(DELTA),))
  assert size(pure, 1 << 18) == size(pure, 1)


def test_depth_runs_from_zero_to_one_over_all_layers():
  # Lightning's decay shows the depth: it is almost none in the last layer
  cfg = dataclasses.replace(
    HYBRID,
    prefix=(_layer(LIGHTNING),),
    period=(_layer(LIGHTNING),),
    repeats=2,
    suffix=(_layer(LIGHTNING),),
  )
  cache = init_cache(cfg, 1, 4, jnp.float32)
  ones = jax.tree.map(
    lambda x: jnp.ones_like(x) if x.dtype == jnp.float32 else x, cache
  )
  # values of zero: the states only decay
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x * ('v' not in [key.key for key in path]), _params(cfg)
  )
  _, after = _apply(cfg)(params, _tokens()[:1, :1], cache=ones)
  states = [
    after.prefix[0].state,
    *after.period[0].state,
    after.suffix[0].state,
  ]
  got = [-np.log(state.reshape(4, -1)[:, 0]) for state in states]
  head = 2.0 ** (-8 * np.arange(1, 5) / 4)
  for i, decay in enumerate(got):
    np.testing.assert_allclose(
      decay, head * (1 - i / 3 + 1e-5), rtol=1e-3, atol=1e-6
    )


def test_parameter_paths_are_the_checkpoint_format():
  golden = pathlib.Path(__file__).parent / 'golden_params.txt'
  paths = [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} {x.shape}'
    for path, x in jax.tree_util.tree_leaves_with_path(
      sharding.make_abstract_params(HybridLM(IRREGULAR))
    )
  ]
  assert paths == golden.read_text().splitlines()
