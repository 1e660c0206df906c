"""Profiles: the plan, cells, fits, a small profile and its continuation."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig
from deltanet_jax.infer.cache_growth import grow_cache
from deltanet_jax.lab.cost import calc
from deltanet_jax.lab.profile import fit, measure, plan, report, run
from deltanet_jax.mixers.base import UNWRITTEN

FULL = AttentionConfig(heads=1, kv_heads=1, head_dim=8)
DELTA = GatedDeltaNetConfig(1, 1, 8, 8, form='recurrent')
SETTINGS = plan.ProfileSettings((128,), 'float32', 0.001, 1, 600.0, rounds=2)


def _config(*mixers, repeats=1):
  layers = tuple(Layer(m, MLPConfig(8)) for m in mixers)
  return ModelConfig(32, 8, layers, repeats=repeats, tied=True)


def _subject(cfg, **changes):
  params = {'w': jnp.zeros(10)}  # 40 bytes
  settings = dataclasses.replace(SETTINGS, **changes)
  return measure.Subject('x', cfg, params, settings)


def test_the_compared_models_are_named_and_of_one_width_and_depth():
  for size in plan.SIZES.values():
    models = plan.make_models(size, plan.MODELS)
    assert set(size.models) <= set(models)
    for cfg in models.values():
      assert (cfg.d_model, len(cfg.layers)) == (size.d_model, size.layers)
  assert report.find_pairs(plan.make_models(size, plan.MODELS)) == [
    ('gdn3', 'full'), ('kda3', 'mla'),
  ]  # fmt: skip


def test_the_largest_batch_fills_the_budget_and_no_more():
  cfg = _config(FULL, DELTA)
  used = lambda n: (
    40 + sum(calc.count_cache_bytes(cfg, 200, n, 'float32').values())
  )
  for n in (1, 3):
    exact = used(n) / 2**30
    for budget, want in ((exact, n), (exact - 2**-30, n - 1)):
      subject = _subject(cfg, budget_gib=budget, max_batch=4)
      assert subject.largest_batch(200) == (want, False)
  capped = _subject(cfg, budget_gib=1.0, max_batch=4)
  assert capped.largest_batch(200) == (4, True)


def test_a_nearly_full_cache_is_one_that_so_many_tokens_have_been_put_into():
  window = dataclasses.replace(FULL, window=50)
  cfg = _config(FULL, window, DELTA, repeats=2)
  cache = measure.make_nearly_full_cache(_subject(cfg), 3, 128)
  shapes = jax.eval_shape(
    lambda: measure.make_empty_cache(_subject(cfg), 3, 128)
  )
  assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, shapes)
  written = 128 - plan.STEPS - plan.WARM
  full, rotating, delta = cache.period
  assert (cache.length == written).all() and (full.length == written).all()
  assert full.positions[1, 2, :written].tolist() == list(range(written))
  assert (full.positions[..., written:] == UNWRITTEN).all()
  slots = rotating.positions[0, 2]
  assert sorted(slots.tolist()) == list(range(written - 50, written))
  assert (slots % 50 == jnp.arange(50)).all()
  # noise, the same for every sequence, not for every slot
  assert 0.5 < float(jnp.std(delta.state)) < 0.65
  assert (full.k[:, 0] == full.k[:, 2]).all() and len(
    set(full.k[0, 0, :, 0, 0].tolist())
  ) > 60


def test_median_lies_between_order_statistics():
  assert fit.estimate_median([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
  assert fit.estimate_median(range(9)) == (4.0, 1.0, 7.0)
  assert math.isnan(fit.estimate_median([1.0]).low)


def test_fits_find_what_made_the_points():
  x = np.array([1024, 2048, 4096, 8192, 16_384])
  noise = np.array([1.02, 0.99, 1.01, 0.98, 1.0])
  power = fit.fit_power(x, 3e-6 * x**1.5 * noise)
  assert power.low < 1.5 < power.high and power.high - power.low < 0.1
  steep, flat = (fit.fit_line(x, (2e-3 + a * x) * noise) for a in (4e-6, 1e-6))
  assert steep.w.low < 2e-3 < steep.w.high
  assert 0.01 < steep.worst < 0.03
  ratio = fit.compare_slopes(steep, flat)
  assert ratio.low < 4 < ratio.high
  # the slope of a flat line is within its error
  assert fit.compare_slopes(steep, fit.fit_line(x, 2e-3 * noise)) is None
  assert math.isnan(fit.fit_power(x[:2], x[:2]).low)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  hybrid = _config(DELTA, FULL)
  cfgs = {'twin': calc.make_attention_twin(hybrid), 'hybrid': hybrid}
  models = {name: (cfg, None) for name, cfg in cfgs.items()}
  folder = tmp_path_factory.mktemp('profile')
  jax.config.update('jax_disable_most_optimizations', True)
  text = run.run_profile(SETTINGS, models, folder)
  jax.config.update('jax_disable_most_optimizations', False)
  return models, folder, text


def _records(folder):
  return [
    json.loads(x) for x in (folder / 'results.jsonl').read_text().splitlines()
  ]


def test_a_profile_has_every_cell_and_its_bytes(small):
  models, folder, text = small
  records = _records(folder)
  assert len(records) == 2 * len(measure.WHATS)
  for r in records:
    cfg = models[r['model']][0]
    sizes = calc.count_cache_bytes(cfg, r['context'], r['batch'], 'float32')
    assert r['cache_bytes'] == sum(sizes.values())
    assert r['skipped'] is None and len(r['seconds']) == 2
    assert r['batch'] == 1 and r['capped'] == (r['what'] == 'largest' or None)
    if r['what'] != 'restore':
      assert r['program_bytes'] > r['cache_bytes']
  assert 'hybrid against twin** (attention in 1 of 2 layers)' in text
  assert (folder / 'summary.md').read_text() == text
  rows = (folder / 'summary.csv').read_text().splitlines()
  assert len(rows) == 1 + len(records)
  for name in ('ttft', 'tpot', 'throughput', 'cache', 'memory'):
    assert (folder / f'{name}.png').stat().st_size > 5000


def test_a_stopped_profile_continues_with_the_next_context(
  small, monkeypatch, tmp_path
):
  models, folder, _ = small
  first = _records(folder)
  settings = dataclasses.replace(SETTINGS, contexts=(128, 192, 256))
  asked, stop = [], {192}

  def instead(subjects, context, before, show):
    asked.append((context, before))
    if context in stop:
      stop.clear()
      raise KeyboardInterrupt
    return [r | {'context': context} for r in first]

  monkeypatch.setattr(measure, 'measure_context', instead)
  monkeypatch.setattr(
    run, 'make_random_params', lambda cfg: {'w': jnp.zeros(1)}
  )
  with pytest.raises(KeyboardInterrupt):
    run.run_profile(settings, models, tmp_path)
  assert _records(tmp_path) == first
  run.run_profile(settings, models, tmp_path)
  assert [context for context, _ in asked] == [128, 192, 192, 256]
  assert asked[2][1] == first and asked[3][1][0]['context'] == 192
  assert len(_records(tmp_path)) == 3 * len(first)
  run.run_profile(settings, models, tmp_path)
  assert len(asked) == 4


def test_a_folder_of_another_profile_is_refused(small):
  models, folder, _ = small
  other = dataclasses.replace(SETTINGS, rounds=3)
  with pytest.raises(ConfigError, match='of other settings'):
    run.run_profile(other, models, folder)
  with pytest.raises(ConfigError, match='of other models'):
    run.run_profile(SETTINGS, {'twin': models['twin']}, folder)


def test_the_stored_profile_is_known_again(tmp_path):
  stored = pathlib.Path(run.__file__).parent / 'result' / 'settings.json'
  (tmp_path / 'settings.json').write_bytes(stored.read_bytes())
  size = plan.SIZES['cpu']
  cfgs = plan.make_models(size, size.models)
  models = {name: (cfg, None) for name, cfg in cfgs.items()}
  where = json.loads(stored.read_text())['where']
  assert run._open_folder(tmp_path, size.settings, models, where) == []
  with pytest.raises(ConfigError, match='of other where'):
    run._open_folder(tmp_path, size.settings, models, where | {'jax': '0'})


def test_what_would_take_too_long_is_left_out_and_named():
  subject = _subject(_config(FULL), seconds=8.0)
  cell = measure.Measurement(subject, 'prefill', 192)
  before = {'context': 128, 'batch': 1, 'seconds': [4.0], 'skipped': None}
  cell.attempt(lambda: cell.expect(before))
  assert cell.skipped == 'would take about 9 s; the limit is 8'
  later = measure.Measurement(subject, 'prefill', 384)
  later.attempt(lambda: later.expect(cell.record()))
  assert later.skipped.startswith('not at 192: would take about 9 s')
  short = measure.Measurement(
    _subject(_config(DELTA), seconds=8.0), 'prefill', 192
  )
  short.attempt(lambda: short.expect(before))
  assert short.skipped is None


def test_a_cache_of_other_bytes_than_calculated_ends_the_profile():
  subject = _subject(_config(FULL))
  cache = measure.make_empty_cache(subject, 1, 128)
  cell = measure.Measurement(subject, 'decode', 128)
  cell._measured(1.0, cache)
  with pytest.raises(AssertionError, match='calculator says'):
    cell._measured(1.0, grow_cache(cache, subject.cfg, 1, 129, jnp.float32))
