"""Released weights go to Orbax and come back, interrupted or not."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from deltanet_jax import hf, sharding
from deltanet_jax.config import ConfigError
from deltanet_jax.experiment import MeshConfig
from deltanet_jax.hf import convert, files

pytestmark = pytest.mark.slow

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


@pytest.fixture
def source(tmp_path):
  """Qwen3-Next in several files."""
  one = tmp_path / 'one'
  one.mkdir()
  made = FIXTURES / 'qwen3_next'
  shutil.copy(made / 'model.safetensors', one)
  shutil.copy(made / 'config.released.json', one / 'config.json')
  (one / 'tokenizer.json').write_text('{}')
  model, params = hf.load(one)
  many = tmp_path / 'many'
  hf.save(many, model, params, like=one, shard_bytes=100_000)
  return many


def assert_same_folders(found, wanted):
  names = {path.name for path in wanted.glob('*.safetensors')}
  assert {path.name for path in found.glob('*.safetensors')} == names
  for name in names:
    ours, theirs = load_file(found / name), load_file(wanted / name)
    assert ours.keys() == theirs.keys()
    for key in theirs:
      np.testing.assert_array_equal(ours[key], theirs[key])
  for name in ('config.json', 'tokenizer.json', files.INDEX):
    assert (found / name).read_text() == (wanted / name).read_text()


def test_there_and_back_and_loaded_over_devices(source, tmp_path):
  convert.to_orbax(source, tmp_path / 'orbax')
  convert.to_released(tmp_path / 'orbax', tmp_path / 'back')
  assert_same_folders(tmp_path / 'back', source)
  model, wanted = hf.load(source)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  again, params = hf.load(tmp_path / 'orbax', mesh=mesh)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  shardings = sharding.param_shardings(model, mesh)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_a_killed_conversion_goes_on(source, tmp_path, monkeypatch):
  target, save, calls = tmp_path / 'orbax', convert._save_piece, []

  def killed(*args):
    if len(calls) == 5:
      raise KeyboardInterrupt
    calls.append(args[2])
    save(*args)

  monkeypatch.setattr(convert, '_save_piece', killed)
  with pytest.raises(KeyboardInterrupt):
    convert.to_orbax(source, target)
  first = list(calls)
  with pytest.raises(ConfigError, match='not finished; run the conversion'):
    convert.to_released(target, tmp_path / 'early')
  monkeypatch.setattr(
    convert, '_save_piece', lambda *args: (calls.append(args[2]), save(*args))
  )
  convert.to_orbax(source, target)
  assert len(first) == 5
  assert len(set(calls)) == len(calls)
  convert.to_released(target, tmp_path / 'back')
  assert_same_folders(tmp_path / 'back', source)


def test_another_model_in_the_target_is_refused(source, tmp_path):
  (tmp_path / 'orbax').mkdir()
  (tmp_path / 'orbax' / convert.RECORD).write_text('{}')
  with pytest.raises(ConfigError, match='conversion of another folder'):
    convert.to_orbax(source, tmp_path / 'orbax')


def test_a_piece_with_a_wrong_checksum_is_an_error(source, tmp_path):
  target = tmp_path / 'orbax'
  convert.to_orbax(source, target)
  lines = (target / convert.SUMS).read_text().splitlines()
  name, crc = json.loads(lines[-1])
  (target / convert.SUMS).write_text(
    '\n'.join([*lines[:-1], json.dumps([name, crc + 1])])
  )
  with pytest.raises(convert.ConversionError, match='from its checksum'):
    convert.to_released(target, tmp_path / 'back')
