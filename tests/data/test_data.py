"""Text from files to batches: what is read, split, packed and repeated."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from deltanet_jax.config.experiment import DataConfig
from deltanet_jax.data import files, text, tokenizer
from deltanet_jax.data.rows import Rows
from deltanet_jax.data.text import TextData
from tests.token_folders import refusal

EOD = 256


@pytest.fixture
def folder(tmp_path):
  """40 documents of 0 to 60 bytes, no two alike, one of them empty."""
  draw = random.Random(0)
  for i in range(40):
    content = f'{i}:' + ''.join(draw.choices('abcdé ', k=draw.randint(0, 50)))
    path = tmp_path / 'texts' / f'{i % 3}' / f'{i}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if i else '')
  return tmp_path / 'texts'


def make(folder, **changes):
  cfg = DataConfig(path=f'{folder}/**/*.txt', seq_len=16, batch=4, heldout=0.3)
  return TextData(dataclasses.replace(cfg, **changes))


def contents(folder):
  every = [path.read_bytes() for path in folder.rglob('*.txt')]
  return sorted(content for content in every if content)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def digest(batch):
  parts = b''.join(batch[name].tobytes() for name in sorted(batch))
  return hashlib.sha256(parts).hexdigest()


def test_globs_join_and_exclude(folder, monkeypatch):
  every = files.find_files(f'{folder}/**/*.txt')
  assert len(every) == 40 and every == sorted(every)
  both = files.find_files(f'{folder}/0/*.txt, {folder}/1/*.txt,{folder}/0/**')
  assert both == [p for p in every if '/2/' not in p]
  assert both == files.find_files(f'!{folder}/2/**,{folder}/**/*.txt')
  assert both == files.find_files(f'{folder}/**/*.txt,!**/2/**')
  monkeypatch.chdir(folder)
  for exclusion in ('./2/*', '**/2/**', '**/2/*.txt', '2/[0-9]*'):
    assert both == files.find_files(f'**/*.txt,!{exclusion}'), exclusion
  assert every == files.find_files('**/*.txt,!2,!*.txt,!2/*.py,!**/texts')


def test_a_folder_without_links_gives_what_glob_gives(folder):
  import glob

  (folder / '.hidden').mkdir()
  (folder / '.hidden' / 'a.txt').write_text('a')
  (folder / '[x]').mkdir()
  (folder / '[x]' / 'b.txt').write_text('b')
  for pattern in ('**', '**/*.txt', '*/*.txt', '**/1/*', '*', '**/**/*1*'):
    matches = glob.glob(f'{folder}/{pattern}', recursive=True)
    plain = sorted({path for path in matches if pathlib.Path(path).is_file()})
    if plain:
      assert files.find_files(f'{folder}/{pattern}') == plain, pattern


def test_links_lead_to_every_file_once(folder):
  before = files.find_files(f'{folder}/**/*.txt')
  fingerprint = make(folder).fingerprint()
  # of a folder, of a file, and three loops: 2^40 ways to read every file
  (folder / 'latest').symlink_to('1')
  (folder / 'again.txt').symlink_to('1/1.txt')
  for name in ('self', 'loop', '0/up'):
    (folder / name).symlink_to(folder)
  assert files.find_files(f'{folder}/**/*.txt') == before
  assert files.find_files(f'{folder}/latest/*.txt,{folder}/**/*.txt') == before
  assert make(folder).fingerprint() == fingerprint
  # named alone, a link is the way there
  latest = files.find_files(f'{folder}/latest/*.txt')
  assert [p.replace('/latest/', '/1/') for p in latest] == files.find_files(
    f'{folder}/1/*.txt'
  )


def test_links_to_other_folders_are_followed_and_name_the_files(tmp_path):
  """As the hub's cache does: names with a suffix, contents without."""
  blob = tmp_path / 'blobs' / 'ab12'
  blob.parent.mkdir()
  blob.write_text('{"text": "one"}\n{"text": "two"}\n')
  (tmp_path / 'texts').mkdir()
  for name in ('b.jsonl', 'a.jsonl'):
    (tmp_path / 'texts' / name).symlink_to(blob)
  (tmp_path / 'all').mkdir()
  (tmp_path / 'all' / 'x').symlink_to(tmp_path / 'texts')
  found = files.find_files(f'{tmp_path}/all/**/*.jsonl')
  assert found == [f'{tmp_path}/all/x/a.jsonl']
  assert [d.content for d in files.read_documents(found, 'text')] == [
    b'one',
    b'two',
  ]


def test_exclusions_know_a_link_and_what_it_leads_to(folder):
  (folder / 'latest').symlink_to('1')
  every = files.find_files(f'{folder}/**/*.txt')
  by_link = f'{folder}/**/*.txt,!**/latest/**'
  assert files.find_files(by_link) == every
  without = [path for path in every if '/1/' not in path]
  for only in ('', f',{folder}/latest/*.txt'):
    real = f'{folder}/**/*.txt{only},!{folder}/1/**'
    assert files.find_files(real) == without


def test_a_link_to_nothing_is_refused_unless_excluded(folder):
  every = files.find_files(f'{folder}/**/*.txt')
  (folder / 'gone.txt').symlink_to('nowhere.txt')
  message = refusal(files.find_files, f'{folder}/**/*.txt')
  assert f'{folder}/gone.txt is a link to nowhere.txt' in message
  assert files.find_files(f'{folder}/**/*.txt,!**/gone.txt') == every


@pytest.mark.parametrize(
  'pattern',
  ['', '{}/*.no', '{}', '{}/**/*.txt,!{}/**', '{}/**/*.txt,{}/*.no', '!{}/**'],
)
def test_globs_without_a_file_are_refused(folder, pattern):
  message = refusal(files.find_files, pattern.replace('{}', str(folder)))
  assert 'no file matches' in message


def test_every_suffix_gives_its_documents(tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  (tmp_path / 'a.jsonl').write_text(
    '{"body": "one", "n": 1}\n\n{"body": ""}\n{"body": null}\n{"body": "é"}\n'
  )
  table = pa.table({'body': ['two', '', None, 'lines\n'], 'n': [1, 2, 3, 4]})
  pq.write_table(table, tmp_path / 'b.parquet', row_group_size=2)
  (tmp_path / 'c.py').write_bytes(b'\xff\x00not utf-8')
  (tmp_path / 'd.txt').write_bytes(b'')
  found = list(files.read_documents(files.find_files(f'{tmp_path}/*'), 'body'))
  assert [document.content for document in found] == [
    b'one',
    'é'.encode(),
    b'two',
    b'lines\n',
    b'\xff\x00not utf-8',
  ]
  assert [d.source.removeprefix(f'{tmp_path}/') for d in found] == [
    'a.jsonl:1',
    'a.jsonl:5',
    'b.parquet row 1',
    'b.parquet row 4',
    'c.py',
  ]


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('a.jsonl', b'{"text": "a"}\n{"body": "b"}\n', 'a.jsonl:2: no field'),
    ('a.jsonl', b'{"text": "a"}\n{"text": \n', 'a.jsonl:2: not JSON'),
    ('a.jsonl', b'{"text": "\xff"}\n', 'a.jsonl:1: not JSON'),
    (
      'a.jsonl',
      b'{}'.replace(b'}', b'"a":' + b'[' * 10**5),
      'a.jsonl:1: not JSON',
    ),
    (
      'a.jsonl',
      b'\n{"text": "a", "b": ' + b'[' * 10**5 + b']' * 10**5 + b'}',
      'a.jsonl:2: not JSON',
    ),
    ('a.jsonl', b'["text"]\n', "a.jsonl:1: no field 'text'"),
    ('a.jsonl', b'{"text": 3}\n', 'holds int, not text'),
    ('a.jsonl', b'{"text": "\\ud800"}\n', 'a.jsonl:1: not valid text'),
    ('a.parquet', b'nonsense', 'not a parquet file'),
    ('a.txt.gz', b'x', '.gz files are not supported'),
  ],
)
def test_unreadable_files_are_refused_by_place(tmp_path, name, content, words):
  path = tmp_path / name
  path.write_bytes(content)
  assert words in refusal(list, files.read_documents([str(path)], 'text'))


def test_a_parquet_file_without_the_field_is_refused(tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  path = str(tmp_path / 'a.parquet')
  pq.write_table(pa.table({'body': ['a'], 'n': [1]}), path)
  message = refusal(list, files.read_documents([path], 'text'))
  assert "no field 'text'; it has body, n" in message
  assert 'holds int' in refusal(list, files.read_documents([path], 'n'))


def test_bytes_round_trip_and_eod_is_silent():
  bytes_ = tokenizer.load_tokenizer('bytes')
  ids = bytes_.encode('é a\n')
  assert ids.dtype == np.int32 and ids.tolist() == [195, 169, 32, 97, 10]
  assert bytes_.decode([EOD, *ids, EOD]) == 'é a\n'
  assert bytes_.decode([195]) == '\ufffd'


@pytest.fixture
def vocabulary(tmp_path):
  """A byte-level tokenizer.json of 300 tokens and <|endoftext|>."""
  return write_tokenizer(tmp_path / 'tokenizer.json', ['<|endoftext|>'])


def write_tokenizer(path, special):
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(['the cat sat on the mat, the rat ran'] * 9, trainer)
  made.enable_truncation(2)
  made.enable_padding(length=9)
  made.save(str(path))
  return str(path)


def test_a_tokenizer_file_round_trips_and_knows_its_end_of_text(vocabulary):
  loaded = tokenizer.load_tokenizer(vocabulary)
  written = 'the cat é <|endoftext|> the mat'
  ids = loaded.encode(written)
  assert ids.dtype == np.int32 and ids.max() < loaded.vocab_size
  assert 9 < len(ids) < len(written.encode())
  assert len(loaded.encode('t')) == 1  # the file's own padding is off
  assert loaded.eod not in ids
  assert loaded.decode([*ids, loaded.eod]) == written


def test_documents_are_encoded_alike_in_slices(vocabulary, monkeypatch, capsys):
  loaded = tokenizer.load_tokenizer(vocabulary)
  texts = [f'the cat {i}' for i in range(20)]
  documents = [files.Document(t, t.encode()) for t in texts]
  whole = loaded.encode_documents(documents)
  assert capsys.readouterr().err == ''
  monkeypatch.setattr(tokenizer, 'SLICE_BYTES', 35)
  sliced = loaded.encode_documents(documents)
  assert 'tokenized 0/0 MB' in capsys.readouterr().err
  for t, a, b in zip(texts, whole, sliced, strict=True):
    assert a.tolist() == b.tolist() == loaded.encode(t).tolist()


def test_tokenizers_that_cannot_serve_are_refused(tmp_path, folder, vocabulary):
  assert 'no such file' in refusal(
    tokenizer.load_tokenizer, str(tmp_path / 'x.json')
  )
  nothing = tmp_path / 'nothing.json'
  nothing.write_text('{}')
  assert 'holds no tokenizer' in refusal(tokenizer.load_tokenizer, str(nothing))
  endless = write_tokenizer(tmp_path / 'endless.json', ['<|pad|>'])
  assert 'no end-of-document token' in refusal(
    tokenizer.load_tokenizer, endless
  )
  (folder / 'odd.txt').write_bytes(b'the\xff')
  message = refusal(lambda: make(folder, tokenizer=vocabulary))
  assert f'{folder}/odd.txt: not UTF-8 text (byte 3)' in message


@pytest.mark.parametrize('token', ['<end>', {'content': '<end>'}])
def test_the_end_of_text_may_be_named_beside_the_tokenizer(tmp_path, token):
  path = write_tokenizer(tmp_path / 'tokenizer.json', ['<pad>', '<end>'])
  settings = tmp_path / 'tokenizer_config.json'
  settings.write_text(json.dumps({'eos_token': token}))
  assert tokenizer.load_tokenizer(path).eod == 1
  settings.write_text(json.dumps({'eos_token': None}))
  assert 'no end-of-document token' in refusal(tokenizer.load_tokenizer, path)


def test_a_tokenizer_file_gives_rows_of_its_ids(folder, vocabulary):
  data = make(folder, tokenizer=vocabulary, batch=1)
  loaded = data.tokenizer
  scored = [
    b['targets'][b['weights'] == 1] for b in data.make_heldout_batches(2)
  ]
  expected = [
    id
    for d in data.heldout_documents
    for id in [*loaded.encode(d.decode()), loaded.eod]
  ]
  assert np.concatenate(scored).tolist() == expected
  assert data.heldout_bytes == sum(len(d) for d in data.heldout_documents)


def test_every_document_is_on_one_side(folder):
  data = make(folder)
  train, heldout = list(data.train_documents), list(data.heldout_documents)
  assert len(train) > 20 and len(heldout) > 4
  assert sorted(train + heldout) == contents(folder)
  assert data.train_bytes == sum(map(len, train))
  assert data.heldout_bytes == sum(map(len, heldout))


def test_more_files_move_no_document_and_equal_ones_stay_together(folder):
  before = set(make(folder).heldout_documents)
  for i, content in enumerate([b'new 1', b'new 2', *contents(folder)]):
    (folder / f'more{i}.txt').write_bytes(content)
  data = make(folder)
  after = set(data.heldout_documents)
  assert after - {b'new 1', b'new 2'} == before
  assert not after & set(data.train_documents)


def test_the_seed_decides_the_split(folder):
  a, b = make(folder), make(folder, seed=1)
  assert set(a.heldout_documents) != set(b.heldout_documents)


@pytest.mark.parametrize('heldout, side', [(1e-6, 'held-out'), (0.9999, 'tr')])
def test_a_split_with_an_empty_side_is_answered_by_one_that_will_do(
  folder, heldout, side
):
  message = refusal(lambda: make(folder, heldout=heldout))
  assert f'none of them {side}' in message
  value = float(re.search(r'\(([0-9.e-]+) would do\)', message)[1])
  data = make(folder, heldout=value, batch=1)
  assert len(list(data.heldout_documents)) and len(list(data.train_documents))
  # no longer than it must be, and on the side of what was asked for
  assert len(str(value)) < 6 and (value < 0.5) == (heldout < 0.5)


def test_one_document_is_refused_with_a_way_to_cut_it(folder):
  one = f'{folder}/1/1.txt'
  messages = {
    refusal(lambda seed=s: make(folder, path=one, heldout=0.5, seed=seed))
    for s in range(8)
  }
  assert len(messages) == 1
  assert 'has one document' in min(messages) and 'split -C' in min(messages)


def test_too_little_text_is_refused(folder):
  message = refusal(lambda: make(folder, batch=1000))
  assert 'less than one batch of 1000 rows x 16' in message


def test_a_row_is_the_window_of_the_stream_that_it_says():
  rows = Rows([np.array([1, 2, 3]), np.array([4]), np.array([5, 6])], 9, 10, 4)
  # stream 9 1 2 3 | 9 4 9 5 | 6 9
  assert (len(rows), rows.full, rows.tokens) == (3, 2, 9)
  expected = [
    ([9, 1, 2, 3], [1, 2, 3, 9], [1, 1, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1]),
    ([9, 4, 9, 5], [4, 9, 5, 6], [1, 1, 2, 2], [0, 1, 0, 1], [1, 1, 1, 1]),
    ([6, 9, 9, 9], [9, 9, 9, 9], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]),
  ]
  names = 'tokens', 'targets', 'segment_ids', 'positions', 'weights'
  for row, arrays in zip(rows, expected, strict=True):
    assert row.keys() == set(names)
    assert tuple(row[name].tolist() for name in names) == arrays
    assert row['weights'].dtype == np.float32
    assert {row[name].dtype for name in names[:4]} == {np.dtype(np.int32)}


def test_a_document_longer_than_a_row_restarts_at_the_cut():
  rows = Rows([np.arange(7)], 9, 10, 4)
  assert rows[1]['tokens'].tolist() == [3, 4, 5, 6]
  assert rows[1]['positions'].tolist() == [0, 1, 2, 3]
  assert rows[1]['segment_ids'].tolist() == [1, 1, 1, 1]
  assert rows[1]['targets'].tolist() == [4, 5, 6, 9]


def test_large_vocabularies_keep_their_ids():
  rows = Rows([np.array([65_535, 65_536, 128_255])], 128_256, 128_257, 4)
  assert rows[0]['tokens'].tolist() == [128_256, 65_535, 65_536, 128_255]


def test_every_target_follows_from_its_own_document_only(folder):
  data = make(folder)
  documents = list(data.train_documents)
  rows = [data._train_rows[i] for i in range(data._train_rows.full)]
  opened = 0
  for row in rows:
    for segment in np.unique(row['segment_ids']):
      here = row['segment_ids'] == segment
      inside, wanted = row['tokens'][here], row['targets'][here]
      assert inside[1:].tolist() == wanted[:-1].tolist()
      assert EOD not in inside[1:]
      if inside[0] == EOD:
        start = bytes(t for t in wanted.tolist() if t != EOD)
        assert any(document.startswith(start) for document in documents)
        opened += 1
  assert len(documents) - 1 <= opened <= len(documents)


def test_a_batch_has_its_keys_shapes_and_types(folder):
  data = make(folder)
  ahead, heldout = next(data.iterate(0)), next(data.make_heldout_batches(4))
  for batch in (data.make_batch(0), ahead, heldout):
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
      'tokens': ((4, 16), 'int32'),
      'targets': ((4, 16), 'int32'),
      'segment_ids': ((4, 16), 'int32'),
      'positions': ((4, 16), 'int32'),
      'weights': ((4, 16), 'float32'),
    }
  assert data.make_batch(0)['weights'].all()


def test_an_iterator_from_any_step_gives_the_same_batches(folder):
  data = make(folder)
  per_epoch = data._train_rows.full / 4
  assert per_epoch % 1 and 8 < per_epoch < 40  # epochs end inside a batch
  steps = int(2.5 * per_epoch)
  unbroken = list(itertools.islice(data.iterate(0), steps))
  for start in (0, 1, int(per_epoch), steps - 3):
    resumed = make(folder).iterate(start)
    for step in range(start, steps):
      batch = next(resumed)
      assert_same(batch, unbroken[step])
      assert_same(batch, data.make_batch(step))


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order(folder):
  data = make(folder, batch=1)
  rows = data._train_rows.full
  epochs = [
    [digest(data.make_batch(e * rows + i)) for i in range(rows)]
    for e in range(2)
  ]
  every = [
    digest({name: x[None] for name, x in data._train_rows[i].items()})
    for i in range(rows)
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(every)
  assert len(set(every)) == rows
  assert epochs[0] != epochs[1] and epochs[0] != every


def test_the_seed_decides_the_order(folder):
  rows = make(folder)._train_rows
  a, b = (
    text._batches(rows, DataConfig(path='', seq_len=16, batch=4), None, seed)
    for seed in (0, 1)
  )
  assert digest(a[0]) == digest(make(folder).make_batch(0)) != digest(b[0])


def test_another_process_makes_the_same_batches(folder):
  code = (
    'import hashlib, sys\n'
    'from deltanet_jax.data.text import TextData\n'
    'from deltanet_jax.config.experiment import DataConfig\n'
    f'cfg = DataConfig(path="{folder}/**/*.txt", seq_len=16, batch=4,'
    ' heldout=0.3)\n'
    'batch = TextData(cfg).make_batch(30)\n'
    'parts = b"".join(batch[name].tobytes() for name in sorted(batch))\n'
    'print(hashlib.sha256(parts).hexdigest())\n'
  )
  root = pathlib.Path(files.__file__).parent.parent.parent
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == digest(make(folder).make_batch(30))


@pytest.mark.parametrize('rows', [1, 4, 1000])
def test_every_heldout_token_is_scored_once(folder, rows):
  data = make(folder)
  batches = list(data.make_heldout_batches(rows))
  assert {batch['tokens'].shape for batch in batches} == {(rows, 16)}
  scored = [b['targets'][b['weights'] == 1] for b in batches]
  expected = b''.join(d + b'\n' for d in data.heldout_documents)
  got = bytes(t if t < 256 else 10 for t in np.concatenate(scored).tolist())
  assert got == expected  # no document of the fixture holds a line end
  for batch in batches:
    padding = batch['weights'] == 0
    assert (batch['segment_ids'][padding] == 0).all()
    assert (batch['segment_ids'][~padding] > 0).all()
  for a, b in zip(batches, data.make_heldout_batches(rows), strict=True):
    assert_same(a, b)


def test_jsonl_and_text_files_of_the_same_documents_give_the_same_batches(
  folder, tmp_path
):
  plain = files.read_documents(files.find_files(f'{folder}/**/*.txt'), 'text')
  lines = [json.dumps({'text': d.content.decode()}) for d in plain]
  path = tmp_path / 'all.jsonl'
  path.write_text('\n'.join(lines))
  a, b = make(folder), make(folder, path=str(path))
  assert_same(a.make_batch(7), b.make_batch(7))
