"""Folders that an earlier version wrote are read by this one.

`fixtures/stored.tar.xz` was written by commit 87c454a: a run stopped after step
5 of 8, a run that began with it, released weights converted to Orbax, a study;
of each model the greedy text and the score, and the metrics of the run that was
not stopped.
"""

import io
import json
import pathlib
import tarfile

import jax.numpy as jnp
import pytest

from deltanet_jax import config
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.data import files
from deltanet_jax.data.text import TextData
from deltanet_jax.data.tokenizer import load_tokenizer
from deltanet_jax.evals import perplexity
from deltanet_jax.infer import text
from deltanet_jax.lab.study import matrix, results
from deltanet_jax.parallel.sharding import make_mesh
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.source import open_model, read_start
from deltanet_jax.train import loop

ARCHIVE = pathlib.Path(__file__).parents[1] / 'fixtures' / 'stored.tar.xz'


@pytest.fixture
def folder(tmp_path, monkeypatch):
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter='data')
  monkeypatch.chdir(tmp_path)  # the paths in it are relative
  return tmp_path


def test_a_run_is_what_its_configuration_file_says(folder):
  # whose imports have moved since
  source = pathlib.Path('config.py').read_text()
  source = source.replace('.experiment ', '.config.experiment ')
  pathlib.Path('config.py').write_text(
    source.replace('.mixers.config ', '.config.mixers ')
  )
  cfg = config.load('config.py')
  # the default was another
  was = [('model.period.0.mixer.form', 'chunked')]
  assert Workdir('run').read() == config.override_fields(cfg, was)
  Workdir('run').check(cfg)
  # and is stored again in today's words, without a module
  stored = config.to_json(cfg)
  assert '"_type": "GatedDeltaNetConfig"' in stored and ':G' not in stored
  assert config.from_json(stored) == cfg


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder):
  cfg, workdir = Workdir('run').read(), Workdir('run')
  workdir.check(cfg)
  loop.train(cfg, workdir, TextData(cfg.data), io.StringIO())
  workdir.unlock()
  lines = [
    [json.loads(line) for line in pathlib.Path(name).read_text().splitlines()]
    for name in ('run/metrics.jsonl', 'unbroken.jsonl')
  ]
  assert len(lines[0]) == len(lines[1]) == 10
  for new, old in zip(*lines, strict=True):
    assert new == pytest.approx(old, rel=1e-5)


@pytest.mark.parametrize('name', ['run', 'tuned', 'converted'])
def test_a_stored_model_scores_a_text_as_it_did(folder, name):
  begun = open_model(name)
  documents = list(files.read_documents(files.find_files('text/*.txt'), 'text'))
  mesh = make_mesh(MeshConfig())
  params = begun.load(mesh, jnp.float32)
  score = perplexity.score_documents(
    begun.model, params, documents, load_tokenizer(begun.tokenizer),
    dtype='float32', mesh=mesh, seq_len=32, batch=1,
  )  # fmt: skip
  stored = json.loads(pathlib.Path(f'{name}.score.json').read_text())
  assert score.loss == pytest.approx(stored['loss'], rel=1e-5)
  assert score.tokens == stored['tokens']


@pytest.mark.parametrize('name', ['run', 'tuned', 'converted'])
def test_a_stored_model_continues_a_text_as_it_did(folder, name):
  how = {'max_tokens': 12, 'sampling': Sampling(temperature=0), 'seed': 0}
  parts = text.continue_text(open_model(name), 'the cat', **how)
  stored = pathlib.Path(f'{name}.text').read_text()
  assert 'the cat' + ''.join(parts) + '\n' == stored


def test_a_tuned_run_knows_what_it_began_with(folder):
  begun = read_start(Workdir('tuned'))
  assert begun.name == 'run' and begun.model == Workdir('run').read().model


def test_a_study_is_known_again_and_its_cells_are_read(folder):
  study = results.StudyFolder('study')
  study.check(matrix.SIZES['smoke'])
  with pytest.raises(ConfigError, match='of other sizes'):
    study.check(matrix.SIZES['study'])
  cells = matrix.list_jobs(matrix.SIZES['smoke'], 'smoke', ['full'], ['mqar'])
  before = study.summary.read_text()
  assert study.done(cells[0])
  study.collect(cells)
  assert study.summary.read_text() == before
