"""Released folders with mutated files: a model, or one line that says why."""

import copy
import functools
import json
import pathlib
import tempfile
import warnings

import pytest
from hypothesis import given, settings, strategies as st

from deltanet_jax import hf
from deltanet_jax.config import ConfigError
from deltanet_jax.hf import files, names
from deltanet_jax.parallel import sharding
from tests import weights

BYTES = (weights.FIXTURES / 'qwen3' / 'model.safetensors').read_bytes()
SIZE = int.from_bytes(BYTES[:8], 'little')
HEADER, DATA = json.loads(BYTES[8 : 8 + SIZE]), BYTES[8 + SIZE :]
TENSORS = [name for name in HEADER if name != '__metadata__']
FEW = settings(derandomize=True, database=None, deadline=None, max_examples=60)

LEAVES = (
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
)
JSON = st.recursive(
  LEAVES,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)
PATHS = st.text('./\\~a\0\n', max_size=6) | st.sampled_from(
  [
    'model.safetensors', '../model.safetensors', '/model.safetensors',
    'a/model.safetensors', './model.safetensors', 'model.safetensors/.',
    'loop.safetensors', 'loop/model.safetensors', 'out/model.safetensors',
    'a' * 300 + '.safetensors', 'folder.safetensors', 'nan.safetensors',
  ]
)  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def shapes_once():
  """Tracing a model takes longer than reading its files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding,
      'make_abstract_params',
      functools.cache(sharding.make_abstract_params),
    )
    yield


def outcome(write):
  """'read', or the one line with which a folder is refused.

  write: folder -> None, changes a good one
  """
  with (
    tempfile.TemporaryDirectory() as parent,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter('ignore')
    folder = pathlib.Path(parent) / 'model'
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(BYTES)
    config = weights.FIXTURES / 'qwen3' / 'config.released.json'
    (folder / 'config.json').write_bytes(config.read_bytes())
    write(folder)
    try:
      hf.load_model(folder)
    except ConfigError as error:
      line = str(error)
      assert line.isprintable() and parent in line, line
      return line
    return 'read'


def spoilt(draw, data, most):
  """Bytes with some of their first `most` changed, cut or put in."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, min(most, len(data))))
    few = draw(st.binary(max_size=4))
    how = draw(st.sampled_from(['change', 'insert', 'delete', 'cut']))
    if how == 'cut':
      del data[at:]
    elif how == 'delete':
      del data[at : at + len(few)]
    else:
      data[at : at + (len(few) if how == 'change' else 0)] = few
  return bytes(data)


def test_an_unchanged_folder_is_read():
  assert outcome(lambda folder: None) == 'read'


@FEW
@given(st.data())
def test_an_index_of_any_content_is_read_or_refused(data):
  draw = data.draw
  found = {'weight_map': dict.fromkeys(TENSORS, 'model.safetensors')}
  how = draw(st.sampled_from(['json', 'map', 'names', 'bytes']))
  if how == 'json':
    found = draw(JSON)
  elif how == 'map':
    found['weight_map'] = draw(JSON)
  else:
    for name in draw(st.lists(st.sampled_from(TENSORS), max_size=3)):
      found['weight_map'][name] = draw(PATHS | JSON)
  text = json.dumps(found).encode()
  if how == 'bytes':
    text = spoilt(draw, text, len(text))

  def write(folder):
    (folder / names.INDEX).write_bytes(text)
    (folder / 'loop').symlink_to('loop')
    (folder / 'loop.safetensors').symlink_to('loop.safetensors')
    (folder / 'out').symlink_to('..')
    (folder / 'folder.safetensors').mkdir()

  outcome(write)


@FEW
@given(st.data())
def test_a_header_of_any_content_is_read_or_refused(data):
  draw, header = data.draw, copy.deepcopy(HEADER)
  for _ in range(draw(st.integers(1, 3))):
    name = draw(st.sampled_from(list(header)))
    kinds = [*'IUF', *weights.KINDS.values(), 'I64', 'F4', 'F8_E5M2', 'C64']
    change = draw(
      st.sampled_from(
        ['dtype', 'shape', 'data_offsets', 'name', 'drop', 'add', 'any']
      )
    )
    if change in ('drop', 'name'):
      value = header.pop(name)
      if change == 'name':
        header[draw(st.text(max_size=8) | st.sampled_from(TENSORS))] = value
      if not header:
        break
    elif change == 'add':
      header[draw(st.text(max_size=8))] = {
        'dtype': draw(st.sampled_from(kinds)),
        'shape': draw(st.lists(st.integers(0, 3), max_size=2)),
        'data_offsets': [len(DATA), len(DATA)],
      }
    elif change == 'any' or not isinstance(header[name], dict):
      header[name] = draw(JSON)
    elif change == 'dtype':
      header[name]['dtype'] = draw(st.sampled_from(kinds) | JSON)
    else:
      sizes = st.integers(-1, 2**64) | st.integers(0, 64)
      header[name][change] = draw(st.lists(sizes, max_size=3) | JSON)
  packed = weights.packed(json.dumps(header).encode(), DATA)
  outcome(lambda folder: (folder / 'model.safetensors').write_bytes(packed))


@FEW
@given(st.data())
def test_a_file_of_any_bytes_is_read_or_refused(data):
  most = data.draw(st.sampled_from([8, 8 + SIZE, len(BYTES)]))
  found = spoilt(data.draw, BYTES, most)
  outcome(lambda folder: (folder / 'model.safetensors').write_bytes(found))


@FEW
@given(
  st.dictionaries(
    st.text(max_size=5),
    JSON
    | st.tuples(
      PATHS | JSON,
      st.sampled_from(['float32', 'uint8', 'int32', 'f4', 'f4,(', '']) | JSON,
      st.lists(st.integers(-1, 3), max_size=2) | JSON,
    ).map(list),
    max_size=2,
  )
)
def test_tensors_that_a_file_recorded_are_taken_or_refused(found):
  try:
    source = files.RecordedTensors(found, {}, '/gone', 'converted.json')
  except ConfigError as error:
    assert str(error).isprintable() and 'converted.json' in str(error)
    return
  for name, file in source.names.items():
    assert (source.path / file).resolve().is_relative_to('/gone')
    assert source.dtype(name).itemsize * sum(source.shape(name)) >= 0
