"""The reference classes themselves, where torch and transformers are installed
(requirements-oracle.txt): what they compute now, on weights drawn now."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from deltanet_jax import hf
from deltanet_jax.model import get_head_weight
from tests import parity
from tests.parity import FIXTURES, SYSTEMS

pytestmark = [pytest.mark.slow, pytest.mark.oracle]


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """Runs fixtures/make.py with arguments; returns the folder it filled."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')

  def run(*args):
    out = tmp_path_factory.mktemp('made')
    command = [sys.executable, FIXTURES / 'make.py', f'--out={out}', *args]
    subprocess.run(command, check=True)
    return out

  return run


@pytest.fixture(scope='module')
def drawn(make):
  """Other weights, other tokens, other lengths than the repository's."""
  return make('--seed=11', '--rows=3', '--tokens=45')


def test_fixtures_are_what_the_reference_classes_make(make):
  made = make()
  for path in (p for name in SYSTEMS for p in (FIXTURES / name).iterdir()):
    again = made / path.relative_to(FIXTURES)
    where = f'{path.parent.name}/{path.name}'
    if path.suffix == '.json':
      assert again.read_text() == path.read_text(), where
    else:
      assert_close(*(read(file) for file in (again, path)), where)


def read(path):
  return dict(np.load(path)) if path.suffix == '.npz' else load_file(path)


def assert_close(found, wanted, where):
  """Up to the rounding of other machines, which the float32 gradients of
  decays feel most."""
  assert found.keys() == wanted.keys(), where
  for key in wanted:
    loose = key.startswith('grad32:')
    np.testing.assert_allclose(
      found[key],
      wanted[key],
      rtol=0.1 if loose else 1e-4,
      atol=1e-5,
      err_msg=f'{where} {key}',
    )


@pytest.mark.parametrize('name', SYSTEMS)
def test_fresh_weights_give_the_references_values(
  name, drawn, tmp_path, quick_compile
):
  folder = parity.folder_of(name, tmp_path, fixtures=drawn)
  model, params = hf.load_model(folder)
  reference = parity.reference_of(name, drawn)
  tokens = jnp.asarray(reference['tokens'], jnp.int32)
  assert tokens.shape == (3, 45)

  @jax.jit
  def run(params):
    hidden = parity.hidden_states(model.cfg, params, tokens)
    logits = hidden[-1] @ get_head_weight(params, model.cfg)
    return hidden, logits, parity.prediction_loss(logits, tokens)

  hidden, logits, loss = run(params)
  distance = np.abs(logits - reference['logits_f64']).max()
  assert distance <= parity.tolerance(reference)
  np.testing.assert_allclose(loss, reference['loss'], rtol=1e-6)
  assert f'hidden_{len(hidden)}' not in reference
  for i, found in enumerate(hidden):
    np.testing.assert_allclose(
      found, reference[f'hidden_{i}'], atol=1e-5, rtol=1e-5, err_msg=f'{i}'
    )
