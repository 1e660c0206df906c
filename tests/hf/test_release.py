"""What config.json says of weights that were trained."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deltanet_jax import hf
from deltanet_jax.data.tokenizer import FileTokenizer
from deltanet_jax.runs import checkpoint, start
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.runs.release import write_release
from deltanet_jax.runs.source import open_model
from tests import token_folders, weights
from tests.hf.test_hf_values import float8
from tests.tiny_run import make_experiment, texts

__all__ = ['texts']  # a fixture


def run_of(folder, texts, model, begun, tokenizer):
  """A run's folder before its first step."""
  found = dataclasses.replace(make_experiment(texts), model=model)
  data = dataclasses.replace(found.data, tokenizer=tokenizer)
  workdir = Workdir(folder)
  workdir.lock(
    dataclasses.replace(found, data=data), start.make_texts(begun, tokenizer)
  )
  workdir.unlock()
  return workdir


@pytest.mark.parametrize('end, want', [('</s>', {257}), ('<pad>', {258})])
def test_a_model_trained_from_nothing_says_how_its_texts_end(
  end, want, texts, tmp_path, monkeypatch
):
  path = token_folders.write(
    tmp_path / 'words', tokenizer_config={'eos_token': end}
  )
  model, params = hf.load_model(weights.write(tmp_path / 'a', 'qwen3'))
  monkeypatch.setattr(checkpoint, 'load_params', lambda *_: params)
  run = run_of(tmp_path / 'run', texts, model.cfg, None, path)
  write_release(run, tmp_path / 'out')
  assert FileTokenizer(tmp_path / 'out' / 'tokenizer.json').ends == want
  again, found = hf.load_model(tmp_path / 'out')
  assert again.cfg == model.cfg
  jax.tree.map(np.testing.assert_array_equal, found, params)
  run = run_of(tmp_path / 'bytes', texts, model.cfg, None, 'bytes')
  write_release(run, tmp_path / 'other')
  config = json.loads((tmp_path / 'other' / 'config.json').read_text())
  assert 'eos_token_id' not in config


@pytest.mark.filterwarnings('ignore:.*float8 there are written as bfloat16')
@pytest.mark.parametrize('inside', [False, True])
def test_trained_weights_are_not_said_to_be_quantized(
  inside, texts, tmp_path, monkeypatch
):
  more = float8(np.full((1, 1), 0.5, np.float32))
  folder = weights.write(
    tmp_path / 'a', 'qwen3', weights.tensors('qwen3') | more
  )
  plain = weights.settings('qwen3')
  wanted = {'model_type': 'qwen3', 'text_config': plain} if inside else plain
  config = json.loads(json.dumps(wanted))
  at = config['text_config'] if inside else config
  at['quantization_config'] = {'quant_method': 'fp8'}
  (folder / 'config.json').write_text(json.dumps(config))
  model, params = hf.load_model(folder)
  begun = open_model(str(folder))
  params = jax.tree.map(lambda x: x * 1.5, params)
  monkeypatch.setattr(checkpoint, 'load_params', lambda *_: params)
  run = run_of(tmp_path / 'run', texts, begun.model, begun, 'bytes')
  write_release(run, tmp_path / 'released')
  hf.save_model(tmp_path / 'saved', model, params, like=folder)
  for name in ('released', 'saved'):
    found = json.loads((tmp_path / name / 'config.json').read_text())
    assert found == wanted
    jax.tree.map(
      np.testing.assert_array_equal, hf.load_model(tmp_path / name)[1], params
    )
  assert 'quantization_config' in str(begun.released['config'])
