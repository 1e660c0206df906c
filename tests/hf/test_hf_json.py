"""JSON of released and converted folders and of runs that is damaged, or says
something else than it should."""

import json

import pytest

from deltanet_jax import hf
from deltanet_jax.hf import convert, converted, pieces
from deltanet_jax.runs import start
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.source import is_run, open_model, read_start
from tests import weights
from tests.hf.test_hf_files import refused

DEEP = b'[' * 10**5 + b']' * 10**5
DAMAGED = [b'', b'{', b'3', b'[]', b'\xff', DEEP, b'{"a": ' + DEEP + b'}']


@pytest.mark.parametrize('content', DAMAGED)
def test_a_config_json_that_is_none_is_refused_by_every_reader(
  content, tmp_path
):
  folder = weights.write(tmp_path / 'a', 'qwen3')
  (folder / 'config.json').write_bytes(content)
  assert not is_run(folder)
  for read in (
    lambda: hf.load_model(folder),
    lambda: open_model(str(folder)),
    lambda: convert.convert_to_orbax(folder, tmp_path / 'orbax'),
  ):
    refused(read, str(folder / 'config.json'))
  assert not (tmp_path / 'orbax').exists()


@pytest.mark.parametrize('content', DAMAGED)
def test_a_record_that_is_no_json_is_refused_by_every_reader(content, tmp_path):
  path = tmp_path / 'converted.json'
  path.write_bytes(content)
  for read in (
    lambda: hf.load_model(tmp_path),
    lambda: open_model(str(tmp_path)),
    lambda: convert.convert_to_released(tmp_path, tmp_path / 'back'),
  ):
    (tmp_path / 'config.json').write_text('{}')
    refused(read, str(path))


@pytest.mark.parametrize('family', [None, 'gpt', 3, ['qwen3'], {}])
def test_a_record_of_no_family_is_refused(family, tmp_path):
  record = {
    'config': {},
    'tensors': {},
    'float8': {},
    'format': converted.FORMAT,
  }
  if family is not None:
    record['family'] = family
  path = tmp_path / 'converted.json'
  path.write_text(json.dumps(record))
  refused(lambda: converted.Converted(tmp_path), str(path), 'family')
  refused(lambda: open_model(str(tmp_path)), str(path), 'family')


BEGUN = {'name': 'a', 'model': {}, 'tokenizer': 'bytes', 'released': None}


@pytest.mark.parametrize(
  'content',
  [
    *DAMAGED,
    b'{}',
    json.dumps(BEGUN).encode(),
    json.dumps(BEGUN | {'model': 3}).encode(),
    json.dumps(BEGUN).replace('{}', '[' * 900 + ']' * 900).encode(),
  ],
)
def test_a_runs_start_that_is_none_is_refused(content, tmp_path):
  path = tmp_path / 'start.json'
  path.write_bytes(content)
  refused(lambda: read_start(Workdir(tmp_path)), str(path))


def test_a_run_that_began_with_no_family_is_refused(tmp_path):
  begun = open_model(str(weights.write(tmp_path / 'a', 'qwen3')))
  path = tmp_path / 'start.json'
  kept = json.loads(start.make_texts(begun, 'bytes')['start.json'])
  path.write_text(json.dumps(kept))
  assert read_start(Workdir(tmp_path)) == begun
  for released in ({}, 3, kept['released'] | {'family': 'gpt'}):
    path.write_text(json.dumps(kept | {'released': released}))
    refused(lambda: read_start(Workdir(tmp_path)), str(path))


def test_lines_that_are_no_sums_are_none(tmp_path):
  pieces.add_sum(tmp_path, 'a', 3)
  with open(tmp_path / pieces.SUMS, 'ab') as file:
    for line in (b'["b", 1', b'3', b'{}', b'["c"]', b'[[], 1]', b'\xff', DEEP):
      file.write(b'\n' + line)
  pieces.add_sum(tmp_path, 'd', 4)
  assert pieces.read_sums(tmp_path) == {'a': 3, 'd': 4}
