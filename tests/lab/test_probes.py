"""The recurrences hold what they should: orderings that need no training."""

import functools
import json

import numpy as np
import pytest

from deltanet_jax.lab.probes import probes, report
from deltanet_jax.lab.probes.probes import ProbeResult


@functools.cache
def found():
  return probes.run_probes('recurrent')


def value(probe, rule, at, what='accuracy'):
  (finding,) = [f for f in found() if f[:4] == (probe, rule, at, what)]
  return finding.value


@pytest.mark.parametrize('rule', ['delta', 'gdn', 'kda'])
def test_the_delta_rules_keep_the_latest_of_eight_values(rule):
  assert value('rebinding', rule, 8) >= 0.93


def test_without_erasing_the_latest_value_drowns():
  assert value('rebinding', 'linear', 8) <= 0.2
  assert 0.2 <= value('rebinding', 'lightning', 8) <= 0.6
  # attention alone cannot tell which came last; with positions it can
  assert value('rebinding', 'softmax', 8) <= 0.2
  assert value('rebinding', 'softmax, recent first', 8) == 1
  for rule in ('linear', 'lightning', 'delta', 'gdn', 'kda', 'softmax'):
    assert value('rebinding', rule, 1) >= 0.95


def test_more_pairs_than_the_state_is_wide_lose_the_old_or_a_part_of_all():
  n = 2 * probes.D
  for rule in ('delta', 'gdn', 'kda', 'lightning'):
    assert value('overload', rule, n, 'last quarter') >= 0.8
    assert value('overload', rule, n, 'first quarter') <= 0.2
  first = value('overload', 'linear', n, 'first quarter')
  last = value('overload', 'linear', n, 'last quarter')
  assert abs(first - last) <= 0.1 and 0.4 < first < 0.8
  for n in probes.PAIRS:
    assert value('overload', 'softmax', n) == 1


def test_keys_at_right_angles_are_read_back_exactly():
  for rule in ('linear', 'delta'):
    assert value('orthonormal keys', rule, 16, 'relative error') <= 1e-5
  # where keys share a half, erasing what is known leaves less error
  error = lambda rule: value('cosine 1/2', rule, 8, 'relative error')
  assert error('delta') < 0.8 * error('linear')


@pytest.mark.parametrize('form', ['recurrent', 'chunked'])
def test_parity_and_permutations_need_beta_two(form):
  states = probes.probe_parity(form) + probes.probe_permutations(form)
  got = {(f.probe, f.rule, f.what): f.value for f in states}
  for beta in ('0.5', '1', '1.5', '2'):
    late = {
      probe: got[probe, f'beta {beta}', 'last quarter']
      for probe in ('parity', 'swaps', 'S5')
    }
    if beta == '2':
      assert late == {'parity': 1, 'swaps': 1, 'S5': 1}
      assert got['parity', 'beta 2', 'accuracy'] == 1
      assert got['swaps', 'beta 2', 'largest error'] < 1e-3
    else:
      assert 0.45 < late['parity'] < 0.55
      assert late['swaps'] < 0.05 and late['S5'] < 0.05


def test_rules_that_are_one_rule_agree():
  cases = [f for f in found() if f.probe == 'special cases']
  assert len(cases) == 3
  for f in cases:
    assert f.value < 1e-5, f


def test_only_the_caches_of_attention_grow():
  sizes = {}
  for f in found():
    if f.probe == 'cache':
      sizes.setdefault(f.rule, []).append(f.value)
  assert len(sizes) >= 7
  for rule, (short, middle, long) in sizes.items():
    if rule in ('Attention', 'MLA'):
      assert long - middle == 2 * (middle - short) > 0
    else:
      assert short == middle == long > 0


def test_every_table_says_what_it_shows():
  tables = {(f.probe, f.what) for f in found()}
  assert tables == report.NOTES.keys()
  text = report.format_text(found())
  assert max(map(len, text.splitlines())) <= 79
  for title, note in report.NOTES.values():
    assert title in text and note in ' '.join(text.split())


def test_every_permutation_takes_four_swaps_at_most():
  table = probes._reflections(4)
  for p, keys in enumerate(table):
    state = np.eye(5)
    for k in keys:
      state = state - 2 * np.outer(k, k @ state)
    places = probes.tracking.PERMUTATIONS[p]
    np.testing.assert_allclose(np.arange(5) @ state, places, atol=1e-6)
  swaps = np.abs(table).sum((1, 2)) / 2**0.5
  assert sorted(set(np.rint(swaps))) == [0, 1, 2, 3, 4]


def test_the_report_holds_every_finding(tmp_path):
  few = [
    ProbeResult('rebinding', 'linear', 1, 'accuracy', 0.5),
    ProbeResult('rebinding', 'linear', 2, 'accuracy', np.float32(0.25)),
    ProbeResult('cache', 'KDA', 64, 'bytes', 1792),
    ProbeResult('overload', 'linear', 8, 'accuracy', float('nan')),
  ]
  text = report.format_text(few[:3])
  assert (
    'accuracy of the newest value' in text
    and '0.250' in text
    and '1,792' in text
  )
  tree = json.loads(report.format_json(few, {'form': 'chunked'}))
  assert tree['form'] == 'chunked' and len(tree['findings']) == 4
  assert tree['findings'][1]['value'] == 0.25
  assert tree['findings'][3]['value'] is None
  report.draw_results(few[:3], tmp_path / 'x.png')
  assert (tmp_path / 'x.png').stat().st_size > 1000
