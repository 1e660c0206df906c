"""Sampling, generation from the cache, and text in whole characters."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
)
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.data.tokenizer import ByteTokenizer, FileTokenizer
from deltanet_jax.infer import cache_growth, text
from deltanet_jax.infer.generate import generate, make_advance
from deltanet_jax.infer.sampling import keep_likely, make_key, sample_tokens
from deltanet_jax.infer.text import TextStream
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding
from deltanet_jax.runs.source import Source
from tests import token_folders

pytestmark = pytest.mark.usefixtures('quick_compile')

GREEDY = Sampling(temperature=0.0)
LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def _kept(top_k, top_p):
  return np.isfinite(keep_likely(LOGITS, top_k, top_p)).nonzero()[0].tolist()


@pytest.mark.parametrize(
  'top_k, top_p, kept',
  [
    (0, 1.0, [0, 1, 2, 3, 4]),
    (1, 1.0, [1]),
    (3, 1.0, [1, 3, 4]),
    (9, 1.0, [0, 1, 2, 3, 4]),
    (0, 0.01, [1]),
    (0, 0.39, [1]),
    (0, 0.6, [1, 3]),
    (0, 0.8, [1, 3, 4]),
    # of the two tokens that top_k leaves, the first has 4/7 = 0.57
    (2, 0.5, [1]),
    (2, 0.6, [1, 3]),
  ],
)
def test_top_k_and_top_p_keep_the_most_likely(top_k, top_p, kept):
  assert _kept(top_k, top_p) == kept


def test_equal_logits_keep_exactly_k():
  assert np.isfinite(keep_likely(jnp.zeros(6), 2, 1.0)).sum() == 2


def test_samples_follow_the_distribution_of_the_temperature():
  keys = jax.random.split(jax.random.key(0), 20_000)

  def frequencies(sampling):
    ids = jax.vmap(lambda key: sample_tokens(LOGITS, key, sampling))(keys)
    return np.bincount(ids, minlength=5) / len(keys)

  p = np.exp(np.asarray(LOGITS))
  np.testing.assert_allclose(frequencies(Sampling()), p, atol=0.015)
  cold = p**2 / (p**2).sum()
  np.testing.assert_allclose(frequencies(Sampling(0.5)), cold, atol=0.015)
  two = np.where(p > 0.2, p, 0) / 0.7
  np.testing.assert_allclose(frequencies(Sampling(1.0, 2)), two, atol=0.015)
  assert frequencies(GREEDY)[1] == 1


@pytest.mark.parametrize(
  'temperature', [1e-30, 1.2e-38, 1e-38, 1e-40, 1e-45, 1e-46, 1e-300, 5e-324]
)
@pytest.mark.parametrize('rest', [(), (3,), (0, 0.9)])
def test_a_temperature_near_zero_gives_the_most_likely_token(temperature, rest):
  logits = jnp.array([[-3e3, 2.0, 2.0 + 1e-5, -7.0], [5.0, -9.0, 4.0, -4e9]])
  sampling = Sampling(temperature, *rest)
  sampling.check()
  for seed in range(3):
    ids = sample_tokens(logits, jax.random.key(seed), sampling)
    assert ids.tolist() == [2, 0]


@pytest.mark.parametrize('temperature', [1e38, 1e39, 1e300])
def test_a_temperature_beyond_float32_makes_all_tokens_alike(temperature):
  keys = jax.random.split(jax.random.key(0), 4000)
  hot = Sampling(temperature)
  ids = jax.vmap(lambda key: sample_tokens(LOGITS, key, hot))(keys)
  counts = np.bincount(ids, minlength=5)
  np.testing.assert_allclose(counts / 4000, 0.2, atol=0.03)


@pytest.mark.parametrize('top_k, top_p', [(0, 1e-46), (0, 5e-324), (1, 1e-50)])
def test_the_most_likely_token_is_always_kept(top_k, top_p):
  assert _kept(top_k, top_p) == [1]


def test_top_k_beyond_any_vocabulary_keeps_all():
  assert _kept(2**70, 1.0) == [0, 1, 2, 3, 4]


def test_every_seed_is_another_key_and_others_are_refused():
  seeds = 0, 1, 2**31 - 1, 2**31, 2**32 - 1
  made = [jax.random.key_data(make_key(seed)).tolist() for seed in seeds]
  # threefry's key is the 64 bits of the seed
  assert made == [[0, seed] for seed in seeds]
  for seed in -1, 2**32, 2**32 + 1, 2**63, 2**70:
    with pytest.raises(ValueError, match=f'{seed}; give 0 to 4294967295'):
      make_key(seed)


@pytest.mark.parametrize(
  'bad', [Sampling(-1.0), Sampling(1.0, -1), Sampling(1.0, 0, 0.0),
          Sampling(1.0, 0, 1.5), Sampling(float('nan'))]
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(bad):
  with pytest.raises(ValueError, match='give'):
    bad.check()


@pytest.fixture(scope='module')
def model():
  delta = GatedDeltaNetConfig(
    key_heads=1, value_heads=2, key_dim=8, value_dim=8, chunk=16
  )
  attention = AttentionConfig(heads=2, kv_heads=1, head_dim=8, rotary_dim=4)
  layers = tuple(Layer(x, MLPConfig(16)) for x in (delta, attention))
  cfg = ModelConfig(264, 16, layers, repeats=2)
  mesh = sharding.make_mesh(MeshConfig())
  params = sharding.init_params(HybridLM(cfg), jax.random.key(0), mesh)
  # flat fresh logits would leave the argmax to rounding
  return cfg, jax.tree.map(lambda x: x * 3, params)


def _generate(model, prompt, max_tokens, sampling=GREEDY, seed=0, vocab=264):
  cfg, params = model
  return list(
    generate(
      params, cfg, prompt, max_tokens=max_tokens, sampling=sampling,
      key=jax.random.key(seed), dtype=jnp.float32,
      vocab=vocab,
    )
  )  # fmt: skip


@pytest.mark.parametrize('length', [1, 37])
def test_greedy_tokens_are_those_of_the_whole_model(model, length):
  cfg, params = model
  prompt = np.random.default_rng(0).integers(0, 256, length).tolist()
  made = _generate(model, prompt, 6)
  logits, _ = jax.jit(HybridLM(cfg).apply)(
    {'params': params}, jnp.array([prompt + made])
  )
  want = jnp.argmax(logits[0], -1)[length - 1 : -1]
  assert made == want.tolist() and len(set(made)) > 1


def test_attention_in_a_layer_that_is_not_scanned(model):
  # its cache is donated array by array
  cfg, _ = model
  cfg = dataclasses.replace(cfg, prefix=cfg.period, period=(), repeats=0)
  mesh = sharding.make_mesh(MeshConfig())
  params = sharding.init_params(HybridLM(cfg), jax.random.key(0), mesh)
  assert len(_generate((cfg, params), [1, 2], 2)) == 2


def test_a_seed_gives_one_text_and_another_seed_another(model):
  first, again, other = (
    _generate(model, [1, 2, 3], 12, Sampling(), seed) for seed in (0, 0, 1)
  )
  assert first == again != other


def test_a_longer_text_begins_with_the_shorter(model):
  short, longer = (_generate(model, [5], n, Sampling()) for n in (4, 8))
  assert longer[:4] == short


def test_tokens_do_not_depend_on_slots_or_pieces(model, monkeypatch):
  prompt = np.random.default_rng(0).integers(0, 256, 37).tolist()
  want = _generate(model, prompt, 40)
  monkeypatch.setattr(cache_growth, 'LEAST', 8)
  monkeypatch.setattr(cache_growth, 'PIECE', 16)
  grown, grow = [], cache_growth.grow_cache
  monkeypatch.setattr(
    cache_growth,
    'grow_cache',
    lambda *args: grown.append(args[3]) or grow(*args),
  )
  assert _generate(model, prompt, 40) == want and len(set(want)) > 2
  # 64 slots for the prompt, doubled, but never beyond prompt + tokens
  assert grown == [77]


def test_decoding_updates_the_cache_in_place(model):
  cfg, params = model
  advance = make_advance(cfg, jnp.float32, GREEDY, 264)
  cache = init_cache(cfg, 1, 7, jnp.float32)
  given = params, cache, jnp.zeros((1, 1), jnp.int32), jax.random.key(0)
  sizes = advance.lower(*given).compile().memory_analysis()
  held = sum(x.nbytes for x in jax.tree.leaves(cache))
  assert sizes.alias_size_in_bytes == held


def test_ids_beyond_the_vocabulary_never_come(model):
  hot = Sampling(temperature=100.0)
  assert max(_generate(model, [5], 40, hot)) > 9
  assert max(_generate(model, [5], 40, hot, vocab=10)) <= 9


def test_an_empty_prompt_is_refused(model):
  with pytest.raises(ValueError, match='no token'):
    _generate(model, [], 1)


def test_text_appears_in_whole_characters():
  stream = TextStream(ByteTokenizer().decode)
  text = 'a\u00e9\u20ac\U0001f600b'
  parts = [stream.push(byte) for byte in text.encode()]
  assert [p for p in parts if p] == list(text)
  assert stream.close() == ''


def test_broken_utf8_is_shown_once_it_is_certain():
  stream = TextStream(ByteTokenizer().decode)
  parts = [stream.push(byte) for byte in b'x\xe2\x82y\xe2']
  assert parts == ['x', '', '', '\ufffdy', '']
  assert stream.close() == '\ufffd'


WORDS = '\u2581 \u2581hello \u2581world hello world ! \u2581a'.split()
BYTES = [f'<0x{i:02X}>' for i in range(256)]


def _streamed(path, prompt, added):
  """(text of the prompt, pieces after it, the text of all ids)."""
  tokenizer = FileTokenizer(path)
  stream = TextStream(tokenizer.decode, prompt)
  pieces = [stream.push(token) for token in added] + [stream.close()]
  whole = tokenizer.decode([*prompt, *added])
  return tokenizer.decode(prompt), ''.join(pieces), whole


@pytest.mark.parametrize('llama', [False, True])
@pytest.mark.parametrize(
  'prompt, added, want',
  [
    ('hello', '\u2581world !', ' world!'),
    ('hello', 'world', 'world'),
    ('hello', '\u2581 \u2581world', '  world'),
    ('\u2581hello \u2581', '\u2581world', ' world'),
    ('\u2581hello </s>', '\u2581world', ' world'),
    ('\u2581hello' * 40, '\u2581world', ' world'),
    ('\u2581a ' * 40 + '</s> ' * 40, '\u2581world', ' world'),
    ('', '\u2581world \u2581a', 'world a'),
  ],
)
def test_the_space_after_a_prompt_stays(tmp_path, llama, prompt, added, want):
  names = WORDS + (BYTES if llama else [])
  made = token_folders.words(names, llama)
  path = token_folders.write(tmp_path, made)
  ids = [
    [
      made.token_to_id(name)
      for name in text.replace('o\u2581', 'o \u2581').split()
    ]
    for text in (prompt, added)
  ]
  before, found, whole = _streamed(path, *ids)
  assert found == want
  assert before + found == whole


@pytest.mark.parametrize('count', [1, 3, 30])
@pytest.mark.parametrize(
  'added', ['\U0001f600b', '\u4f60 \u597d', 'e\u0301', '\ufffdx', ' a']
)
def test_pieces_after_a_prompt_join_to_the_text_of_all(tmp_path, count, added):
  prompt = '\U0001f600\u4f60\ufffd' * count
  llama = token_folders.words(WORDS + BYTES, llama=True)
  for made in llama, token_folders.byte_level():
    path = token_folders.write(tmp_path, made)
    encode = FileTokenizer(path).encode
    given = encode(prompt).tolist(), encode(added).tolist()
    before, found, whole = _streamed(path, *given)
    assert before == prompt and before + found == whole
    assert found.lstrip() == added.lstrip()


def test_broken_bytes_after_a_prompt_are_shown_once_they_are_certain(tmp_path):
  made = token_folders.words(WORDS + BYTES, llama=True)
  path = token_folders.write(tmp_path, made)
  first = made.token_to_id('<0x00>')
  broken = [first + byte for byte in b'\xe2\x82'] + [made.token_to_id('!')]
  hello = [made.token_to_id('hello')]
  assert _streamed(path, hello, broken)[1:] == (
    '\ufffd\ufffd!',
    'hello\ufffd\ufffd!',
  )


@pytest.mark.parametrize('end', [7, 257, 300])
def test_a_run_ends_texts_as_its_documents_or_as_its_release(
  tmp_path, monkeypatch, end
):
  token_folders.write(
    tmp_path / 'tokenizer', tokenizer_config={'eos_token': '</s>'}
  )
  released = {'config': {'text_config': {'eos_token_id': [7]}}}
  (tmp_path / 'start.json').write_text(json.dumps({'released': released}))
  given = []
  model = types.SimpleNamespace(vocab=300)
  source = Source(
    'run', model, str(tmp_path / 'tokenizer' / 'tokenizer.json'), None,
    trained=True,
  )  # fmt: skip

  def chosen(params, cfg, prompt, **how):
    given.extend(prompt)
    yield from (54, 71, end, 88)

  monkeypatch.setattr(text, 'generate', chosen)
  monkeypatch.setattr(Source, 'load', lambda *args, **kwargs: None)
  how = {'max_tokens': 4, 'sampling': GREEDY, 'seed': 0}
  parts = list(text.continue_text(source, 'y', **how))
  assert ''.join(parts) == ('Wh' if end < 300 else 'Why')
  assert given == [257, 88]
  with pytest.raises(ValueError, match='seed is -1'):
    next(text.continue_text(source, 'y', **(how | {'seed': -1})))
