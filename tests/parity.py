"""Our models beside the public reference classes, on the folders of fixtures/.

  python -m tests.parity

prints how far the logits and the gradients' norms are from the reference in
float64: ours, and the reference's own in float32. A few minutes on a CPU.
"""

import dataclasses
import functools
import pathlib
import re
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deltanet_jax import hf
from deltanet_jax.hf import families, plan, store
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.mixers.base import Context
from deltanet_jax.model import Block, HybridLM
from deltanet_jax.parallel import sharding

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
SYSTEMS = [family.name for family in families.FAMILIES]


def config_files(name, fixtures=FIXTURES):
  files = [fixtures / name / 'config.json']
  files.append(fixtures / name / 'config.released.json')
  return [file for file in files if file.is_file()]


def folder_of(name, at, config=-1, fixtures=FIXTURES):
  """A copy of the fixture that has one config.json, the released by default."""
  shutil.copy(fixtures / name / 'model.safetensors', at)
  shutil.copy(config_files(name, fixtures)[config], at / 'config.json')
  return at


def reference_of(name, fixtures=FIXTURES):
  return dict(np.load(fixtures / name / 'reference.npz'))


def tolerance(reference):
  """For logits, from the reference's in float64: twice its own distance in
  float32, or 1e-5 where that is larger; ours are within 2e-6."""
  return max(2 * own_distance(reference), 1e-5)


def own_distance(reference):
  return np.abs(reference['logits'] - reference['logits_f64']).max()


def prediction_loss(logits, tokens):
  """Mean of the next tokens' -log p."""
  known = jax.nn.log_softmax(logits[:, :-1])
  return -jnp.take_along_axis(known, tokens[:, 1:, None], -1).mean()


def loss_and_gradients(model, tokens):
  """A compiled function of the parameters: ((loss, logits), gradients)."""

  def loss(params):
    logits, _ = model.apply({'params': params}, tokens)
    return prediction_loss(logits, tokens), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def hidden_states(cfg, params, tokens):
  """The embedding, then the residual stream after each layer; the last one
  normed, as the reference keeps it."""
  x = params['backbone']['embed'][tokens]
  found = [x]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  for i, layer in enumerate(cfg.layers):
    path, index = plan.locate_layer(cfg, i)
    weights = jax.tree.map(lambda w, i=index: w[i], plan.get_leaf(params, path))
    depth = jnp.float32(i / max(1, len(cfg.layers) - 1))
    context = Context(positions, None, depth)
    block = Block(cfg, layer, jnp.float32)
    x, *_ = block.apply({'params': weights}, x, context, None)
    found.append(x)
  norm = RMSNorm(cfg.norm_eps, cfg.zero_centered)
  found[-1] = norm.apply({'params': params['backbone']['norm']}, x)
  return found


def gradient_norms(family, cfg, grads):
  """By the reference's names, where experts are fused."""
  arrays, squares = dict(plan.list_leaves(grads)), {}
  shapes = sharding.make_abstract_params(HybridLM(cfg))
  for entry in plan.build_plan(family, cfg, shapes):
    name = memory_name(entry.name)
    square = np.sum(
      np.square(store.join_entry(entry, arrays), dtype=np.float64)
    )
    squares[name] = squares.get(name, 0.0) + square
  return {name: np.sqrt(square) for name, square in squares.items()}


def wanted_norms(reference, key='grad:'):
  """{weight: norm of its gradient} of the reference, `grad32:` in float32."""
  return {
    k.removeprefix(key): v for k, v in reference.items() if k.startswith(key)
  }


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


def quantize(tensors):
  """Matrices of the layers in float8 with scales, as DeepSeek releases."""
  found = {}
  for name, x in tensors.items():
    if x.ndim == 2 and 'layers' in name and 'mlp.gate.' not in name:
      blocks = tuple(-(-n // 128) for n in x.shape)
      scale = np.float32(0.2 + 0.01 * (len(found) % 7))
      found[name + '_scale_inv'] = np.full(blocks, scale)
      x = (x / scale).astype(ml_dtypes.float8_e4m3fn)
    found[name] = x
  return found


def distances(name):
  """(ours, the reference's in float32) for logits, then the same for the
  gradients' norms, relative: the largest of each."""
  with tempfile.TemporaryDirectory() as at:
    model, params = hf.load_model(folder_of(name, pathlib.Path(at)))
  reference = reference_of(name)
  tokens = jnp.asarray(reference['tokens'], jnp.int32)
  (_, logits), grads = loss_and_gradients(model, tokens)(params)
  ours = np.abs(logits - reference['logits_f64']).max()
  norms = gradient_norms(families.get_family(name), model.cfg, grads)
  wanted = wanted_norms(reference)
  off = lambda found: max(abs(found[k] / n - 1) for k, n in wanted.items())
  return (
    ours,
    own_distance(reference),
    off(norms),
    off(wanted_norms(reference, 'grad32:')),
  )


def main():
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_disable_most_optimizations', True)
  show = functools.partial(print, flush=True)
  show('largest distance from the reference in float64')
  show(f'{"":14}{"logits":>10}{"":>10}{"gradient norms":>16}')
  show(f'{"system":14}' + f'{"ours":>10}{"reference":>10}' * 2)
  for name in SYSTEMS:
    show(f'{name:14}' + ''.join(f'{x:10.1e}' for x in distances(name)))


if __name__ == '__main__':
  sys.exit(main())
