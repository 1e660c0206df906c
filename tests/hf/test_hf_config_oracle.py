"""The reference classes on configurations that say it in other ways, and on the
folders that they save themselves (requirements-oracle.txt)."""

import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import hf
from tests import parity, reference_config as reference
from tests.parity import FIXTURES, SYSTEMS

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

TOKENS = np.arange(40)[None] * 7 % 61
YARN = reference.YARN | {'original_max_position_embeddings': 16}
DEEPSEEK = {
  'type': 'yarn',
  'factor': 8.0,
  'original_max_position_embeddings': 64,
  'mscale': 1.0,
  'mscale_all_dim': 0.7,
}

GONE = object()


def rotary(**more):
  return {'rope_parameters': more}


# changes of a fixture's config.json
CASES = {
  'qwen3': [
    {'rope_scaling': YARN | {'rope_theta': 1e6}},
    rotary(rope_theta=1e6, **YARN),
    {'rope_parameters': GONE},
    {'rms_norm_eps': GONE, 'hidden_act': 'swish'},
  ],
  'qwen3_moe': [{'norm_topk_prob': GONE}, rotary(rope_theta=5e5, **YARN)],
  'qwen3_next': [
    rotary(rope_type='default', rope_theta=1e7),
    rotary(rope_theta=1e7, **YARN),
    {'norm_topk_prob': False},
  ],
  'qwen3_5': [
    {'rope_parameters': GONE, 'rope_theta': 1e5},
    rotary(rope_theta=1e7, **YARN),
  ],
  'qwen3_5_moe': [rotary(rope_type='default', rope_theta=1e7)],
  'minimax_m2': [{'rope_scaling': YARN}, {'rope_parameters': GONE}],
  'deepseek_v3': [
    {'rope_scaling': DEEPSEEK, 'rope_parameters': GONE},
    rotary(**DEEPSEEK, attention_factor=1.7),
    rotary(rope_theta=1e4, truncate=False, **reference.LONG),
    rotary(rope_theta=1e4, mscale=0.7, **reference.YARN),
    {'routed_scaling_factor': GONE, 'norm_topk_prob': False},
    rotary(**reference.YARN) | {'original_max_position_embeddings': 16},
  ],
  'olmo_hybrid': [
    {'rope_parameters': None},
    {'rope_parameters': GONE, 'rope_theta': 5e5},
    rotary(rope_theta=1e4, **YARN),
    {'linear_allow_neg_eigval': False},
  ],
  'kimi_linear': [
    {'linear_attn_config': GONE},
    {'routed_scaling_factor': GONE, 'moe_renormalize': False},
  ],
}


def compute(folder):
  """The class's logits on a folder."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )
  with torch.no_grad():
    logits = model(torch.from_numpy(TOKENS), use_cache=False).logits
  return model, logits.numpy()


def ours(folder):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    model, params = hf.load_model(folder)
  return model.apply({'params': params}, jnp.asarray(TOKENS, jnp.int32))[0]


@pytest.mark.parametrize(
  'name, changes',
  [(name, changes) for name, each in CASES.items() for changes in each],
)
def test_logits_of_a_changed_configuration_are_the_references(
  name, changes, tmp_path, quick_compile
):
  shutil.copy(FIXTURES / name / 'model.safetensors', tmp_path)
  found = json.loads((FIXTURES / name / 'config.json').read_text()) | changes
  found = {key: value for key, value in found.items() if value is not GONE}
  (tmp_path / 'config.json').write_text(json.dumps(found))
  _, wanted = compute(tmp_path)
  np.testing.assert_allclose(ours(tmp_path), wanted, atol=3e-5)


@pytest.mark.parametrize(
  'name', [name for name in SYSTEMS if name != 'minimax_m1']
)
def test_a_folder_that_transformers_saves_computes_the_same(
  name, tmp_path, quick_compile
):
  folder = tmp_path / 'fixture'
  folder.mkdir()
  parity.folder_of(name, folder, config=0)
  model, wanted = compute(folder)
  model.save_pretrained(tmp_path / 'saved')
  if name == 'deepseek_v32':  # its class breaks ties between keys otherwise
    wanted = ours(folder)
  np.testing.assert_allclose(ours(tmp_path / 'saved'), wanted, atol=3e-5)


def test_the_lists_of_keys_are_those_of_the_installed_classes():
  pytest.importorskip('transformers')
  found = {name: reference.keys(name) for name in SYSTEMS}
  assert json.loads(json.dumps(found)) == reference.KEYS


def test_the_rotary_frequencies_are_those_of_the_installed_classes():
  pytest.importorskip('transformers')
  stored, found = reference.ROPE, reference.tables()
  assert found.keys() == stored.keys()
  for name, table in found.items():
    assert table.keys() == stored[name].keys()
    for form, values in table.items():
      wanted = stored[name][form]
      if wanted is None or isinstance(wanted, str):
        assert values == wanted, (name, form)
      else:
        for a, b in zip(values, wanted, strict=True):
          np.testing.assert_allclose(a, b, rtol=1e-6)
