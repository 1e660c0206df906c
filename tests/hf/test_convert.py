"""Released weights go to Orbax and come back, interrupted or not."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.hf import convert, converted, files, output, pieces, store
from deltanet_jax.hf.names import INDEX
from deltanet_jax.parallel import sharding
from tests import weights
from tests.parity import FIXTURES, quantize

pytestmark = pytest.mark.slow


def write(folder, tensors, shard_bytes, config):
  """A released folder of several files."""
  folder.mkdir()
  described = {k: (v.dtype, v.shape) for k, v in tensors.items()}
  store.write_files(folder, described, tensors.get, shard_bytes)
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  return folder


def read_json(path):
  return json.loads(path.read_text())


def read_config(name):
  return read_json(FIXTURES / name / 'config.released.json')


@pytest.fixture
def source(tmp_path):
  """Qwen3-Next in several files."""
  tensors = load_file(FIXTURES / 'qwen3_next' / 'model.safetensors')
  folder = write(tmp_path / 'many', tensors, 100_000, read_config('qwen3_next'))
  (folder / 'tokenizer.json').write_text('{}')
  return folder


def assert_same_folders(found, wanted):
  names = {path.name for path in wanted.glob('*.safetensors')}
  assert {path.name for path in found.glob('*.safetensors')} == names
  for name in names:
    ours, theirs = load_file(found / name), load_file(wanted / name)
    assert ours.keys() == theirs.keys()
    for key in theirs:
      np.testing.assert_array_equal(ours[key], theirs[key])
  for name in ('config.json', 'tokenizer.json', INDEX):
    assert read_json(found / name) == read_json(wanted / name)


def test_there_and_back_and_loaded_over_devices(source, tmp_path):
  convert.convert_to_orbax(source, tmp_path / 'orbax')
  convert.convert_to_released(tmp_path / 'orbax', tmp_path / 'back')
  assert_same_folders(tmp_path / 'back', source)
  model, wanted = hf.load_model(source)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  again, params = hf.load_model(tmp_path / 'orbax', mesh=mesh)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  shardings = sharding.make_param_shardings(model, mesh)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings


@pytest.fixture(params=['deepseek_v3', 'minimax_m2'])
def float8(request, tmp_path):
  """A block-scaled float8 folder in several files."""
  path = FIXTURES / request.param / 'model.safetensors'
  config = read_config(request.param)
  config |= {'quantization_config': {'weight_block_size': [128, 128]}}
  return write(tmp_path / 'float8', quantize(load_file(path)), 30_000, config)


def bytes_of(folder):
  """{tensor: (its file, type, shape, bytes)}, with float8 and its scales."""
  source = files.FolderTensors(folder)
  return {
    name: (
      file,
      source.dtype(name),
      source.shape(name),
      source.read_raw(name).tobytes(),
    )
    for name, file in source.names.items()
  }


def test_float8_goes_there_and_back_with_its_scales(float8, tmp_path):
  convert.convert_to_orbax(float8, tmp_path / 'orbax')
  convert.convert_to_released(tmp_path / 'orbax', tmp_path / 'back')
  wanted = bytes_of(float8)
  assert sum(kind.itemsize == 1 for _, kind, _, _ in wanted.values()) > 20
  assert bytes_of(tmp_path / 'back') == wanted
  found, config = (
    read_json(at / 'config.json') for at in (tmp_path / 'back', float8)
  )
  assert found == config and 'quantization_config' in config
  record = converted.read_record(tmp_path / 'orbax')
  kinds = {kind for _, kind, _ in record['tensors'].values()}
  assert kinds == {'bfloat16', 'float32'}  # of a model trained further
  _, params = hf.load_model(float8)
  _, again = hf.load_model(tmp_path / 'orbax')
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize('float8', ['minimax_m2'], indirect=True)
def test_a_damaged_scale_is_an_error(float8, tmp_path):
  convert.convert_to_orbax(float8, tmp_path / 'orbax')
  path = tmp_path / 'orbax' / converted.BESIDE
  path.write_bytes(path.read_bytes()[:-1] + b'\x11')
  with pytest.raises(convert.ConversionError, match='from its checksum'):
    hf.load_model(tmp_path / 'orbax')


def test_experts_lie_in_pieces_of_a_bounded_size(source, tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, 'PIECE', 3 * 16 * 32)  # three of four experts
  target = tmp_path / 'orbax'
  convert.convert_to_orbax(source, target)
  names = {path.name for path in (target / pieces.FOLDER).iterdir()}
  at = 'backbone.period.layer_0.ffn.up.1'
  found = sorted(name for name in names if name.startswith(at))
  assert found == [f'{at}.0', f'{at}.3']
  assert names == set(pieces.read_sums(target))
  convert.convert_to_released(target, tmp_path / 'back')
  assert_same_folders(tmp_path / 'back', source)


def test_a_killed_conversion_goes_on(source, tmp_path, monkeypatch):
  target, save, calls = tmp_path / 'orbax', pieces.PieceWriter._save, []

  def killed(self, name, array):
    if len(calls) == 7:
      raise KeyboardInterrupt
    calls.append(name)
    save(self, name, array)

  monkeypatch.setattr(pieces.PieceWriter, '_save', killed)
  with pytest.raises(KeyboardInterrupt):
    convert.convert_to_orbax(source, target)
  first = list(calls)
  with pytest.raises(ConfigError, match='not finished; run the conversion'):
    convert.convert_to_released(target, tmp_path / 'early')
  monkeypatch.setattr(
    pieces.PieceWriter,
    '_save',
    lambda self, name, array: (calls.append(name), save(self, name, array)),
  )
  convert.convert_to_orbax(source, target)
  assert len(first) == 7
  assert len(set(calls)) == len(calls)
  convert.convert_to_released(target, tmp_path / 'back')
  assert_same_folders(tmp_path / 'back', source)


def test_another_model_in_the_target_is_refused(source, tmp_path):
  (tmp_path / 'orbax').mkdir()
  (tmp_path / 'orbax' / converted.RECORD).write_text('{}')
  with pytest.raises(ConfigError, match='conversion of another folder'):
    convert.convert_to_orbax(source, tmp_path / 'orbax')


def test_a_piece_with_a_wrong_checksum_is_an_error(source, tmp_path):
  target = tmp_path / 'orbax'
  convert.convert_to_orbax(source, target)
  lines = (target / pieces.SUMS).read_text().splitlines()
  name, crc = json.loads(lines[-1])
  (target / pieces.SUMS).write_text(
    '\n'.join([*lines[:-1], json.dumps([name, crc + 1])])
  )
  with pytest.raises(convert.ConversionError, match='from its checksum'):
    convert.convert_to_released(target, tmp_path / 'back')


def test_what_does_not_read_back_is_an_error(source, tmp_path, monkeypatch):
  read = pieces._restore
  monkeypatch.setattr(
    pieces, '_restore', lambda *args: np.nextafter(read(*args), np.inf)
  )
  with pytest.raises(convert.ConversionError, match='does not read back'):
    convert.convert_to_orbax(source, tmp_path / 'orbax')
  monkeypatch.setattr(pieces, '_restore', read)
  convert.convert_to_orbax(source, tmp_path / 'orbax')
  write = output.write_file
  monkeypatch.setattr(
    output, 'write_file', lambda path, *args: (write(path, *args), spoil(path))
  )
  with pytest.raises(convert.ConversionError, match='does not read back'):
    convert.convert_to_released(tmp_path / 'orbax', tmp_path / 'back')
  assert not list((tmp_path / 'back').glob('*.safetensors'))


def spoil(path):
  found = bytearray(path.read_bytes())
  found[-3] ^= 1
  path.write_bytes(found)


def test_a_conversion_of_an_older_format_is_refused(tmp_path):
  (tmp_path / 'orbax').mkdir()
  (tmp_path / 'orbax' / converted.RECORD).write_text('{}')
  with pytest.raises(ConfigError, match='convert the released folder again'):
    hf.load_model(tmp_path / 'orbax')


EMBED = 'model.embed_tokens.weight'


def with_subfolders(folder):
  parts = ['a/model-1.safetensors', 'b/c/model-2.safetensors', 'x.safetensors']
  return weights.write(folder, 'qwen3', files=parts)


def with_more_rows(folder):
  found = weights.tensors('qwen3')
  rows = np.arange(96, dtype=np.float32).reshape(3, 32)
  found[EMBED] = np.concatenate([found[EMBED], rows])
  found['lm_head.weight'] = np.concatenate([found[EMBED][:64], rows[:1]])
  return weights.write(folder, 'qwen3', found)


def with_a_prefix_and_two_layouts(folder):
  found = weights.tensors('qwen3_moe')
  at = 'model.layers.1.mlp.experts.'
  take = lambda part: [found.pop(f'{at}{e}.{part}.weight') for e in range(4)]
  gate, up = take('gate_proj'), take('up_proj')
  found[f'{at}gate_up_proj'] = np.concatenate([gate, up], axis=1)
  moved = {f'language_model.{name}': x for name, x in found.items()}
  return weights.write(folder, 'qwen3_moe', moved)


def with_exponents(stored):
  def make(folder):
    found = quantize(weights.tensors('deepseek_v3'))
    noise = np.random.default_rng(0)
    for name in [name for name in found if name.endswith('_scale_inv')]:
      found[name] = noise.integers(110, 130, found[name].shape, np.uint8).view(
        stored
      )
    config = {'quant_method': 'fp8', 'scale_fmt': 'ue8m0'}
    return weights.write(
      folder, 'deepseek_v3', found, quantization_config=config
    )

  return make


@pytest.mark.filterwarnings('ignore:.*beyond the vocab_size')
@pytest.mark.parametrize(
  'make',
  [
    with_subfolders,
    with_more_rows,
    with_a_prefix_and_two_layouts,
    with_exponents(np.uint8),
    with_exponents(ml_dtypes.float8_e8m0fnu),
  ],
)
def test_folders_as_they_are_found_come_back_as_they_were(make, tmp_path):
  source = make(tmp_path / 'source')
  convert.convert_to_orbax(source, tmp_path / 'orbax')
  convert.convert_to_released(tmp_path / 'orbax', tmp_path / 'back')
  assert bytes_of(tmp_path / 'back') == bytes_of(source)
  config, found = (
    read_json(x / 'config.json') for x in (source, tmp_path / 'back')
  )
  assert found == config
  _, wanted = hf.load_model(source)
  for again in ('orbax', 'back'):
    _, params = hf.load_model(tmp_path / again)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
  convert.convert_to_released(
    tmp_path / 'orbax', tmp_path / 'back'
  )  # finds all done


def files_of(folder):
  """{path: content} of all that is there."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize('there', ['nothing', 'an empty folder'])
def test_a_conversion_that_finds_nan_leaves_nothing(there, tmp_path):
  found = weights.tensors('qwen3')
  found['model.norm.weight'][3] = np.nan
  last = 'model.layers.2.mlp.down_proj.weight'
  source = weights.write(tmp_path / 'source', 'qwen3', found)
  (source / 'tokenizer.json').write_text('{}')
  target = tmp_path / 'orbax'
  if there != 'nothing':
    target.mkdir()
  with pytest.raises(ConfigError, match='model.norm.weight holds NaN'):
    convert.convert_to_orbax(source, target)
  found['model.norm.weight'][3], found[last][0, 0] = 1, np.inf
  weights.write(source, 'qwen3', found)
  with pytest.raises(ConfigError, match=f'{last} holds NaN'):
    convert.convert_to_orbax(source, target)
  assert target.exists() == (there != 'nothing')
  assert not target.exists() or not list(target.iterdir())


def test_what_a_user_sees_of_more_rows_and_of_nan(tmp_path):
  def run(source, target):
    command = [sys.executable, '-m', 'launch.convert', f'--from={source}']
    return subprocess.run(
      [*command, f'--to={target}'], capture_output=True, text=True
    )

  source, found = tmp_path / 'nan', weights.tensors('qwen3')
  done = run(with_more_rows(tmp_path / 'rows'), tmp_path / 'orbax')
  assert done.returncode == 0, done.stderr
  said = [line for line in done.stderr.splitlines() if 'rows' in line]
  assert len(said) == 2 and all(x.startswith('warning: ') for x in said)
  found['model.norm.weight'][3] = np.nan
  done = run(weights.write(source, 'qwen3', found), tmp_path / 'other')
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith(
    f'error: {source}/model.safetensors: model.norm.weight'
  )
  assert not (tmp_path / 'other').exists()


def test_a_target_that_holds_something_else_is_refused_and_left(
  source, tmp_path
):
  target = tmp_path / 'orbax'
  target.mkdir()
  (target / 'notes.txt').write_text('mine')
  with pytest.raises(ConfigError, match='holds something else'):
    convert.convert_to_orbax(source, target)
  assert files_of(target) == {'notes.txt': b'mine'}


@pytest.fixture
def orbax(tmp_path):
  source = weights.write(
    tmp_path / 'source', 'qwen3', files=['a/1.safetensors', '2.safetensors']
  )
  convert.convert_to_orbax(source, tmp_path / 'orbax')
  return tmp_path / 'orbax'


def test_what_would_be_mixed_with_other_weights_is_refused(orbax, tmp_path):
  def tried(name, make):
    target = tmp_path / name
    target.mkdir()
    make(target)
    before = files_of(target)
    with pytest.raises(ConfigError) as caught:
      convert.convert_to_released(orbax, target)
    assert '\n' not in str(caught.value) and str(target) in str(caught.value)
    assert files_of(target) == before

  other = {'x': np.zeros(3, np.float32)}
  write_to = lambda name: lambda at: weights.write_file(at / name, other)
  tried('one', write_to('model.safetensors'))
  tried('same', write_to('2.safetensors'))
  tried('below', write_to('a/1.safetensors'))
  tried('config', lambda at: (at / 'config.json').write_text('{"a": 1}'))
  outside = tmp_path / 'outside'
  outside.mkdir()
  tried('link', lambda at: (at / 'a').symlink_to(outside))
  for name in ('config.json.tmp', INDEX, '2.safetensors.part.tmp'):
    tried(name, lambda at, x=name: (at / x).symlink_to(outside / 'file'))
  assert not list(outside.iterdir())


def test_an_unfinished_or_damaged_conversion_gives_no_finished_folder(
  orbax, tmp_path
):
  path = orbax / pieces.SUMS
  lines = path.read_text().splitlines()
  path.write_text('\n'.join(lines[:-1]))
  with pytest.raises(ConfigError, match='is not finished'):
    convert.convert_to_released(orbax, tmp_path / 'back')
  assert not (tmp_path / 'back').exists()
  name, crc = json.loads(lines[-1])
  path.write_text('\n'.join([*lines[:-1], json.dumps([name, crc + 1])]))
  with pytest.raises(convert.ConversionError, match='from its checksum'):
    convert.convert_to_released(orbax, tmp_path / 'back')
  left = files_of(tmp_path / 'back')
  assert all(file.endswith('.safetensors') for file in left)
  with pytest.raises(ConfigError, match='config.json: no such file'):
    hf.load_model(tmp_path / 'back')
  path.write_text('\n'.join(lines))
  convert.convert_to_released(orbax, tmp_path / 'back')
  assert bytes_of(tmp_path / 'back') == bytes_of(tmp_path / 'source')
