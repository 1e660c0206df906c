"""Olmo Hybrid's convolutions as transformers' save_pretrained cuts them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from deltanet_jax import hf
from tests import weights


def olmo(rows, value_rows):
  """Tensors and settings of an Olmo Hybrid whose q and k have `rows` rows."""
  found = weights.tensors('olmo_hybrid')
  for name in found:
    if re.search(r'linear_attn\.[qk]_(proj|conv1d)', name):
      found[name] = found[name][:rows]
    elif re.search(r'linear_attn\.(v_proj|v_conv1d|g_proj)', name):
      found[name] = found[name][:value_rows]
    elif 'linear_attn.o_proj' in name:
      found[name] = found[name][:, :value_rows]
    elif 'linear_attn.o_norm' in name:
      found[name] = found[name][: value_rows // 4]
  more = {'linear_key_head_dim': rows // 4}
  return found, more | {'linear_value_head_dim': value_rows // 4}


# rows of q, of v, of the three that torch.chunk makes of q, k and v
CHUNKS = [
  (24, 48, [32, 32, 32]),
  (20, 48, [30, 30, 28]),
  (20, 40, [27, 27, 26]),
  (24, 20, [23, 23, 22]),
  (20, 20, [20, 20, 20]),
]


@pytest.mark.parametrize('rows, value_rows, cut', CHUNKS)
def test_olmo_convolutions_are_those_that_transformers_has_cut(
  rows, value_rows, cut, tmp_path
):
  found, more = olmo(rows, value_rows)
  _, want = hf.load_model(
    weights.write(tmp_path / 'a', 'olmo_hybrid', found, **more)
  )
  for name in [name for name in found if name.endswith('q_conv1d.weight')]:
    parts = [name.replace('q_conv1d', f'{x}_conv1d') for x in 'qkv']
    whole = np.concatenate([found[x] for x in parts])
    again = np.split(whole, np.cumsum(cut)[:2])
    found |= dict(zip(parts, again, strict=True))
  again = weights.write(tmp_path / 'b', 'olmo_hybrid', found, **more)
  jax.tree.map(np.testing.assert_array_equal, hf.load_model(again)[1], want)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize('rows, value_rows, cut', CHUNKS)
def test_transformers_cuts_olmo_convolutions_so(
  rows, value_rows, cut, tmp_path
):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  more = olmo(rows, value_rows)[1]
  settings = weights.settings('olmo_hybrid') | more
  cfg = transformers.OlmoHybridConfig(**settings)
  torch.manual_seed(0)
  theirs = transformers.OlmoHybridForCausalLM(cfg).float().eval()
  theirs.save_pretrained(tmp_path)
  parts = load_file(tmp_path / 'model.safetensors')
  parts = [
    parts[f'model.layers.0.linear_attn.{x}_conv1d.weight'] for x in 'qkv'
  ]
  assert [len(x) for x in parts] == cut
  ids = torch.arange(1, 20)[None]
  with torch.no_grad():
    want = theirs(ids).logits.numpy()
  model, params = hf.load_model(tmp_path)
  got = model.apply({'params': params}, jnp.asarray(ids.numpy()))[0]
  np.testing.assert_allclose(got, want, atol=2e-5)
