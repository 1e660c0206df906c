"""WORKSPACE.md's recipes for a rule, a mixer, an objective and a family work: a
toy of each is added to a copy of the sources and passes the contracts."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.slow

MIXER_CONFIG = '''

@dataclasses.dataclass(frozen=True)
class HalvedConfig(GatedDeltaNetConfig):
  """Half of what a Gated DeltaNet makes of its tokens."""

  module = 'deltanet_jax.mixers.halved:Halved'
'''
MIXER = '''"""Half of a Gated DeltaNet."""

from deltanet_jax.mixers.gated_deltanet import GatedDeltaNet


class Halved(GatedDeltaNet):
  def __call__(self, x, ctx, cache=None):
    y, aux = super().__call__(x, ctx, cache)
    return y / 2, aux
'''
OBJECTIVE_CONFIG = '''

@dataclasses.dataclass(frozen=True)
class DoubledConfig(ObjectiveConfig):
  """Twice the next token's loss."""

  module = 'deltanet_jax.objectives.doubled:Doubled'
'''
OBJECTIVE = '''"""Twice the next token's loss."""

from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.objectives.next_token import NextToken


class Doubled(NextToken):
  def __init__(self, weights, cfg, dtype):
    super().__init__(NextTokenConfig(next=2.0), cfg, dtype)
'''


@pytest.fixture
def clone(tmp_path):
  skipped = shutil.ignore_patterns('.*', '__pycache__', 'runs')
  shutil.copytree(ROOT, tmp_path / 'clone', ignore=skipped)
  return tmp_path / 'clone'


def append(path, text):
  path.write_text(path.read_text() + text)


def passes(clone, *args):
  """Runs pytest in the copy; the names of the tests that passed."""
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-n0', '-rA', '-q', *args],
    cwd=clone,
    text=True,
    capture_output=True,
    env={**os.environ, 'PYTHONPATH': ''},
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  lines = done.stdout.splitlines()
  return [line.removeprefix('PASSED ') for line in lines if 'PASSED' in line]


def test_a_mixer_is_its_configuration_and_its_module(clone):
  append(clone / 'deltanet_jax/config/mixers.py', MIXER_CONFIG)
  (clone / 'deltanet_jax/mixers/halved.py').write_text(MIXER)
  names = passes(
    clone, 'tests/mixers/test_mixer_contract.py', '-k', 'HalvedConfig'
  )
  assert len(names) > 5


@pytest.mark.long
def test_an_objective_is_its_configuration_and_its_module(clone):
  append(clone / 'deltanet_jax/config/objectives.py', OBJECTIVE_CONFIG)
  (clone / 'deltanet_jax/objectives/doubled.py').write_text(OBJECTIVE)
  names = passes(
    clone, 'tests/objectives/test_objective_contract.py', '-k', 'Doubled'
  )
  assert len(names) == 4


def replace(path, old, new):
  text = path.read_text()
  assert text.count(old) == 1, old
  path.write_text(text.replace(old, new))


def test_a_rule_is_its_file_its_names_and_its_row(clone):
  rule = (clone / 'deltanet_jax/ops/linear_attention.py').read_text()
  (clone / 'deltanet_jax/ops/copied.py').write_text(rule)
  forms = clone / 'deltanet_jax/config/forms.py'
  replace(forms, 'FORMS = {', "FORMS = {\n  'copied': OWN,")
  contract = clone / 'tests/ops/test_ops_contract.py'
  replace(contract, "  'kda': kda,\n", "  'kda': kda,\n  'copied': copied,\n")
  row = "  'copied': ('copied', 2, {'g': 'token'}),\n"
  replace(contract, "  'delta': (", f"{row}  'delta': (")
  replace(contract, 'import attention, ', 'import attention, copied, ')
  append(clone / 'tests/float64.py', '\n\ncopied = linear_attention\n')
  names = passes(
    clone, 'tests/ops/test_ops_contract.py', '-k', 'copied or every_module'
  )
  assert len(names) > 5


def test_a_family_is_its_file(clone):
  folder = clone / 'deltanet_jax/hf/families'
  source = (folder / 'qwen3.py').read_text()
  (folder / 'toy.py').write_text(
    source.replace("'qwen3", "'toy").replace('Qwen3', 'Toy')
  )
  script = """
import json, pathlib, shutil, sys
from deltanet_jax import hf
from deltanet_jax.hf import families
source, target = map(pathlib.Path, sys.argv[1:])
shutil.copytree(source, target)
path = target / 'config.json'
settings = json.loads(path.read_text()) | {'model_type': 'toy'}
path.write_text(json.dumps(settings))
model, params = hf.load_model(target)
hf.save_model(target / 'again', model, params, family='toy')
written = json.loads((target / 'again' / 'config.json').read_text())
assert written['model_type'] == 'toy', written
assert hf.load_model(target / 'again')[0].cfg == model.cfg
"""
  done = subprocess.run(
    [sys.executable, '-c', script, ROOT / 'tests/fixtures/qwen3',
     clone / 'model'],
    cwd=clone, text=True, capture_output=True,
    env={**os.environ, 'PYTHONPATH': ''},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
