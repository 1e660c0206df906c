"""Released models compute what the public reference classes compute.

The folders under fixtures/ hold weights, both kinds of config.json and the
references; fixtures/make.py made them and can make them again.
"""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import hf, sharding
from deltanet_jax.experiment import MeshConfig
from deltanet_jax.hf import families, plan, store
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.mixers.base import Context
from deltanet_jax.model import Block, HybridLM, init_cache

pytestmark = pytest.mark.slow

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
SYSTEMS = [family.name for family in families.FAMILIES]
every_system = pytest.mark.parametrize('name', SYSTEMS)


def config_files(name):
  files = [FIXTURES / name / 'config.json']
  files.append(FIXTURES / name / 'config.released.json')
  return [file for file in files if file.is_file()]


def folder_of(name, tmp_path, config=-1):
  """A copy of the fixture that has one config.json, the released by default."""
  shutil.copy(FIXTURES / name / 'model.safetensors', tmp_path)
  shutil.copy(config_files(name)[config], tmp_path / 'config.json')
  return tmp_path


@pytest.fixture
def system(name, tmp_path):
  """(model, params, reference)"""
  model, params = hf.load(folder_of(name, tmp_path))
  return model, params, np.load(FIXTURES / name / 'reference.npz')


def tolerance(reference):
  own = np.abs(reference['logits'] - reference['logits_f64']).max()
  return max(2 * own, 5e-5)


def hidden_states(cfg, params, tokens):
  """The embedding, then the residual stream after each layer; the last one
  normed, as the reference keeps it."""
  x = params['backbone']['embed'][tokens]
  found = [x]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  for i, layer in enumerate(cfg.layers):
    path, index = plan.place(cfg, i)
    weights = jax.tree.map(lambda w, i=index: w[i], plan.leaf(params, path))
    depth = jnp.float32(i / max(1, len(cfg.layers) - 1))
    context = Context(positions, None, depth)
    block = Block(cfg, layer, jnp.float32)
    x, _ = block.apply({'params': weights}, x, context, None)
    found.append(x)
  norm = RMSNorm(cfg.norm_eps, cfg.zero_centred)
  found[-1] = norm.apply({'params': params['backbone']['norm']}, x)
  return found


def test_fixtures_are_what_the_reference_classes_make(tmp_path):
  """Runs where torch and transformers are installed."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  subprocess.run(
    [sys.executable, FIXTURES / 'make.py', f'--out={tmp_path}'], check=True
  )
  for name in SYSTEMS:
    stored, made = (
      np.load(folder / name / 'reference.npz')
      for folder in (FIXTURES, tmp_path)
    )
    assert sorted(stored) == sorted(made)
    for key in stored:
      np.testing.assert_allclose(
        made[key], stored[key], rtol=1e-4, atol=1e-5, err_msg=f'{name} {key}'
      )


def test_every_fixture_has_its_system():
  folders = [path.name for path in FIXTURES.iterdir() if path.is_dir()]
  assert set(SYSTEMS) <= set(folders)


@every_system
def test_both_kinds_of_config_say_the_same(name, tmp_path):
  read = [
    families.read(folder_of(name, tmp_path, i))
    for i in range(len(config_files(name)))
  ]
  assert all(pair == read[0] for pair in read)
  family, cfg = read[0]
  assert family.name == name
  settings = families.keys.Keys(family.write(cfg))
  assert families.same(family.read(settings), cfg)


@every_system
def test_logits_loss_and_gradients_are_the_references_and_train(
  system, name, tmp_path, quick_compile
):
  model, params, reference = system
  tokens = jnp.asarray(reference['tokens'], jnp.int32)

  def loss(params):
    logits, _ = model.apply({'params': params}, tokens)
    known = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(known, tokens[:, 1:, None], -1).mean(), logits

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, logits), grads = run(params)
  distance = np.abs(logits - reference['logits_f64']).max()
  assert distance <= tolerance(reference)
  np.testing.assert_allclose(value, reference['loss'], rtol=2e-6)
  norms = gradient_norms(families.named(name), model.cfg, grads)
  wanted = {
    k.removeprefix('grad:'): v
    for k, v in reference.items()
    if k.startswith('grad:')
  }
  assert len(wanted) > 10
  for weight, norm in wanted.items():
    # a decay's gradient is a small rest of large terms, known to float32
    np.testing.assert_allclose(
      norms[weight], norm, rtol=1e-3, atol=3e-7, err_msg=weight
    )
  tuned = assert_a_step_lowers_the_loss(run, params, grads, value)
  hf.save(tmp_path / 'tuned', model, tuned, like=tmp_path)
  _, again = hf.load(tmp_path / 'tuned')
  jax.tree.map(np.testing.assert_array_equal, again, tuned)


def gradient_norms(family, cfg, grads):
  """By the reference's names, where experts are fused."""
  arrays, squares = dict(plan.leaves(grads)), {}
  shapes = sharding.abstract_params(HybridLM(cfg))
  for entry in plan.build(family, cfg, shapes):
    name = memory_name(entry.name)
    square = np.sum(np.square(store.joined(entry, arrays), dtype=np.float64))
    squares[name] = squares.get(name, 0.0) + square
  return {name: np.sqrt(square) for name, square in squares.items()}


def assert_a_step_lowers_the_loss(run, params, grads, value):
  """Returns the parameters after it."""
  squares = sum(jnp.sum(x * x) for x in jax.tree.leaves(grads))
  rate = 0.05 / jnp.sqrt(squares)
  params = jax.tree.map(lambda w, g: w - rate * g, params, grads)
  (lower, _), _ = run(params)
  assert lower < value - 0.01
  return params


MEMORY_NAMES = (
  (r'experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight', 'experts.gate_up_proj'),
  (r'experts\.\d+\.(down_proj|w2)\.weight', 'experts.down_proj'),
  (r'block_sparse_moe\.', 'mlp.'),
  (r'\.attention_layer_norm\.', '.input_layernorm.'),
  (r'\.feedforward_layer_norm\.', '.post_attention_layernorm.'),
  (r'\.[qkv]_conv1d\.', '.conv1d.'),
  (r'self_attn\.(f_[ab]_proj|A_log|dt_bias)', r'self_attn.forget_gate.\1'),
)


def memory_name(name):
  for pattern, other in MEMORY_NAMES:
    name = re.sub(pattern, other, name)
  return name


@every_system
def test_every_hidden_state_is_the_references(system, quick_compile):
  model, params, reference = system
  tokens = jnp.asarray(reference['tokens'], jnp.int32)
  run = jax.jit(lambda params: hidden_states(model.cfg, params, tokens))
  found = run(params)
  assert f'hidden_{len(found)}' not in reference
  for i, hidden in enumerate(found):
    wanted = reference[f'hidden_{i}']
    np.testing.assert_allclose(
      hidden, wanted, atol=5e-5, rtol=1e-4, err_msg=f'after layer {i}'
    )


@every_system
def test_prefill_then_steps_equals_full(system, quick_compile):
  model, params, reference = system
  tokens = jnp.asarray(reference['tokens'][:1], jnp.int32)
  T, first = tokens.shape[1], 64
  full, _ = jax.jit(model.apply)({'params': params}, tokens)
  run = jax.jit(
    lambda tokens, cache: model.apply({'params': params}, tokens, cache=cache)
  )
  cache = init_cache(model.cfg, 1, T, jnp.float32)
  logits, cache = run(tokens[:, :first], cache)
  pieces = [logits]
  for t in range(first, T):
    logits, cache = run(tokens[:, t : t + 1], cache)
    pieces.append(logits)
  found = jnp.concatenate(pieces, axis=1)
  np.testing.assert_allclose(found, full, atol=2e-5, rtol=0)


@every_system
def test_packed_segments_of_any_chunk_equal_rows(system, quick_compile):
  model, params, reference = system
  cfg = with_chunk(model.cfg, 16)
  rows, cuts = reference['tokens'], (37, 23)
  tokens = np.concatenate([row[:n] for row, n in zip(rows, cuts, strict=True)])
  segments = np.repeat([1, 2], cuts)
  logits, _ = jax.jit(HybridLM(cfg).apply)(
    {'params': params},
    jnp.asarray(tokens[None], jnp.int32),
    segment_ids=jnp.asarray(segments[None], jnp.int32),
  )
  wanted = [row[:n] for row, n in zip(reference['logits'], cuts, strict=True)]
  np.testing.assert_allclose(
    logits[0], np.concatenate(wanted), atol=tolerance(reference), rtol=0
  )


def with_chunk(cfg, chunk):
  """The same model with another chunk in every recurrent mixer."""

  def change(layers):
    return tuple(
      dataclasses.replace(
        layer, mixer=dataclasses.replace(layer.mixer, chunk=chunk)
      )
      if hasattr(layer.mixer, 'chunk')
      else layer
      for layer in layers
    )

  return dataclasses.replace(
    cfg,
    prefix=change(cfg.prefix),
    period=change(cfg.period),
    suffix=change(cfg.suffix),
  )


@every_system
def test_eight_devices_compute_the_same(name, tmp_path, quick_compile):
  folder = folder_of(name, tmp_path)
  reference = np.load(FIXTURES / name / 'reference.npz')
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  model, params = hf.load(folder, mesh=mesh)
  shardings = sharding.param_shardings(model, mesh)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  tokens = np.tile(reference['tokens'], (2, 1)).astype(np.int32)
  with jax.set_mesh(mesh):
    tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
    logits, _ = jax.jit(model.apply)({'params': params}, tokens)
    logits = np.asarray(logits)
  np.testing.assert_allclose(
    logits[:2], reference['logits'], atol=tolerance(reference), rtol=0
  )
