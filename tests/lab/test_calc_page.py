"""The calculator's page against the calculator, in a real browser."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from deltanet_jax import config
from deltanet_jax.config.mixers import DSAConfig, GatedDeltaNetConfig
from deltanet_jax.lab.cost import arguments, calc, page
from tests import browser

ROOT = pathlib.Path(__file__).parents[2]
START = 'qwen3_next:80b_a3b'
DTYPES = {
  'bfloat16': 'bfloat16',
  'float32': 'float32',
  'float8': 'float8_e4m3fn',
}

with_browser = pytest.mark.skipif(
  browser.find() is None, reason='needs a Chromium; apt-get install chromium'
)


@pytest.fixture(scope='module')
def presets():
  return page.list_models()


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  file = tmp_path_factory.mktemp('page') / 'calc.html'
  file.write_text(page.build_page(START))
  return file.as_uri()


@pytest.fixture(scope='module')
def tab(tmp_path_factory):
  tab = browser.Browser(tmp_path_factory.mktemp('profile'))
  tab.window(1280, 900)
  yield tab
  tab.close()


def _shown(tab):
  """The page's table: {row: [bytes a token more, constant, in all]}."""
  return tab.run(
    'Object.fromEntries([...document.querySelectorAll("#rows tr")].map('
    'row => [row.id.slice(4), row.dataset.bytes.split(" ").map(Number)]))'
  )


def _command(tab):
  """The flags of the command that the page shows."""
  text = tab.run('document.getElementById("command").value')
  words = shlex.split(text.replace('\\\n', ''))
  assert words[:3] == ['python', '-m', 'launch.calc']
  return dict(word.removeprefix('--').split('=', 1) for word in words[3:])


def _model(flags):
  cfg = config.load(flags['preset']).model
  items = lambda name: flags[name].split(',') if name in flags else []
  return calc.resize_model(
    cfg,
    int(flags['layers']) if 'layers' in flags else None,
    arguments.parse_ratio(flags.get('ratio')),
    arguments.change_mixer(cfg, items('attention'), 'attention'),
    arguments.change_mixer(cfg, items('recurrent'), 'recurrent'),
  )


def _expected(flags):
  """What the page has to show for its own command, by `calc`."""
  cfg = _model(flags)
  n, batch = int(flags['context']), int(flags.get('batch', 1))
  how = (
    batch,
    DTYPES[flags.get('dtype', 'bfloat16')],
    flags.get('state_dtype', 'float32'),
  )
  row = lambda of: [of(n + 1) - of(n), of(0), of(n)]
  size = lambda which: row(lambda n: calc.count_total_bytes(which, n, *how))
  rows = {'full': size(calc.make_attention_twin(cfg))}
  recurrent = calc.find_mixer(cfg, recurrent=True)
  kinds = {
    'attention': calc.find_mixer(cfg, recurrent=False),
    'recurrent': recurrent,
  }
  for sort, mixer in kinds.items():
    for part in calc.list_cache_parts(mixer) if mixer else ():
      rows[f'{sort}-{part}'] = row(
        lambda n, mixer=mixer, part=part: calc.count_cache_parts(cfg, n, *how)[
          calc.name_kind(mixer)
        ][part]
      )
  if recurrent:
    rows |= {'hybrid': size(cfg), 'pure': size(calc.make_recurrent_twin(cfg))}
  return rows, cfg, n, how


def _assert_equal(tab):
  flags = _command(tab)
  rows, cfg, n, how = _expected(flags)
  assert _shown(tab) == rows, flags
  text = tab.run('document.getElementById("verdict").textContent')
  if 'hybrid' not in rows:
    assert 'attention in every layer takes' in text
    return flags
  cross = calc.find_break_even(cfg, *how)
  saved, limit = (
    calc.compute_saving(cfg, n, *how),
    calc.compute_saving(cfg, None, *how),
  )
  side = f'{saved:.1%} less' if saved > 0 else f'{-saved:.1%} more'
  assert f': {side}. ' in text, text
  assert f'smaller from {cross:,} token' in text
  # the page takes the share of layers, which positions do not change
  assert f'by up to {limit:.1%} for long contexts' in text
  chart = tab.run('document.getElementById("chart").textContent')
  assert (f'hybrid smaller from {cross:,}' in chart) == (2**8 <= cross <= 2**24)
  return flags


def test_the_page_needs_nothing_else():
  text = page.build_page(START)
  assert not re.search(r'https?:|src=|href=|url\(|@import|import ', text)
  assert text.count('<script') == 2 and '/* ' not in text.split('</style>')[1]


def test_every_system_with_attention_has_a_preset(presets):
  assert len(presets) > 25
  for name in ('kimi_linear:48b_a3b', 'minimax:m1', 'qwen3:8b', 'deepseek:v32'):
    assert name in presets
  # no attention at all, or one with a window
  assert not {'small:kda', 'small:window'} & presets.keys()
  assert presets['kimi_linear:48b_a3b']['ratio'] == [20, 7]


def test_axes_are_read_from_the_shapes():
  mixer = GatedDeltaNetConfig(
    key_heads=2, value_heads=4, key_dim=8, value_dim=16, conv=3
  )
  found = page.describe_mixer(mixer)
  assert found['arrays'] == [
    {'part': 'state', 'axes': [
      ['batch', 0], ['value_heads', 0], ['key_dim', 0], ['value_dim', 0]]},
    *[{'part': 'convolution', 'axes': [
      ['batch', 0], 2, ['key_heads', 0], ['key_dim', 0]]}] * 2,
    {'part': 'convolution', 'axes': [
      ['batch', 0], 2, ['value_heads', 0], ['value_dim', 0]]},
  ]  # fmt: skip


def test_ranges_are_what_the_configuration_takes():
  mixer = DSAConfig(
    heads=4, latent=12, key_dim=8, shared_dim=4, value_dim=6, query_latent=10,
    index_heads=2, index_dim=6, top=8,
  )  # fmt: skip
  ranges = page.describe_mixer(mixer)['ranges']
  assert ranges['shared_dim'] == [2, 4, 2]
  assert ranges['index_dim'] == [4, 512, 1]


@with_browser
def test_every_preset_shows_what_the_calculator_says(tab, url, presets):
  for name in presets:
    tab.open(f'{url}#preset={name}')
    assert _assert_equal(tab) == {'preset': name, 'context': '32768'}


@with_browser
@pytest.mark.parametrize(
  'fragment',
  [
    'preset=kimi_linear:48b_a3b&context=1048576&batch=16&dtype=float8',
    'preset=kimi_linear:48b_a3b&context=100&state=bfloat16&dtype=float32',
    'preset=qwen3_next:80b_a3b&ratio=7&layers=50&context=1000003',
    'preset=minimax:m1&layers=34&ratio=5:2&recurrent.head_dim=96',
    'preset=qwen3:8b&ratio=3&attention.kv_heads=4&recurrent.key_heads=8',
    'preset=qwen3:8b&ratio=1&kind=LinearAttention&recurrent.value_dim=64',
    'preset=deepseek:v32&ratio=3&kind=KDA&attention.latent=256&batch=3',
    'preset=small:hybrid_gdn&kind=DeltaNet&context=1&layers=1',
    'preset=qwen3_next:80b_a3b&ratio=0',
    'preset=olmo_hybrid:7b&kind=KDA&recurrent.heads=7&context=16777216',
  ],
)
def test_changed_models_show_what_the_calculator_says(tab, url, fragment):
  tab.open(f'{url}#{fragment}')
  flags = _assert_equal(tab)
  # every change arrived in the command
  assert len(flags) > 2 or 'context' in fragment
  given = dict(part.split('=') for part in fragment.split('&'))
  for name in ('preset', 'context', 'batch', 'dtype', 'layers', 'ratio'):
    if name in given:
      assert flags[name] == given[name]


@with_browser
def test_the_commands_own_answer(tab, url, tmp_path):
  tab.open(f'{url}#preset=small:hybrid_kda&ratio=1&recurrent.heads=6&batch=5')
  flags, file = _assert_equal(tab), tmp_path / 'a.json'
  subprocess.run(
    [sys.executable, '-m', 'launch.calc', f'--json={file}',
     *(f'--{name}={value}' for name, value in flags.items())],
    cwd=ROOT, check=True, capture_output=True,
  )  # fmt: skip
  (record,) = json.loads(file.read_text())['models']
  rows = _shown(tab)
  for key, found in (
    ('hybrid', record),
    ('full', record['all_attention']),
    ('pure', record['all_recurrent']),
  ):
    total = found['cache']['total']
    assert rows[key] == [total['per_token'], total['constant'], *total['at']]
  text = tab.run('document.getElementById("verdict").textContent')
  assert f'{record["saved"][0]:.1%} less' in text
  assert f'from {record["break_even"]:,} tokens' in text


@with_browser
def test_sliders_move_by_key(tab, url):
  tab.open(url)
  focus = lambda name: tab.run(f'document.getElementById("{name}").focus()')
  focus('context-range')
  for key, context in (
    ('ArrowRight', 2**15.25), ('ArrowRight', 2**15.5), ('End', 2**24),
    ('Home', 64), ('ArrowLeft', 64),
  ):  # fmt: skip
    tab.press(key)
    assert _assert_equal(tab)['context'] == str(round(context))
    shown = tab.run('document.getElementById("context").value')
    assert shown == str(round(context))
  focus('ratio-range')
  tab.press('ArrowUp')
  focus('attention-kv_heads-range')
  tab.press('ArrowUp')
  flags = _assert_equal(tab)
  # 3 key-value heads do not divide 16 heads, which follow
  assert (flags['ratio'], flags['attention']) == ('4', 'heads=15,kv_heads=3')
  focus('recurrent-value_heads-range')
  tab.press('ArrowDown')
  assert _assert_equal(tab)['recurrent'] == 'key_heads=1,value_heads=31'
  # the address has it all
  again = tab.run('location.hash')
  before = _shown(tab)
  tab.open(url + again)
  assert _shown(tab) == before and _command(tab)['ratio'] == '4'


@with_browser
def test_typed_numbers_are_taken_or_refused(tab, url):
  tab.open(url)
  value = lambda script: tab.run(f'document.getElementById({script}')
  value('"batch").select()')
  tab.press('0', '0')
  assert value('"batch").getAttribute("aria-invalid")') == 'true'
  assert value('"batch-problem").textContent') == (
    'A whole number from 1 to 1,024'
  )
  assert 'batch' not in _assert_equal(tab)
  value('"batch").select()')
  tab.press('9', '9')
  assert value('"batch").getAttribute("aria-invalid")') == 'false'
  assert value('"batch-problem").hidden')
  assert _assert_equal(tab)['batch'] == '9'
  value('"ratio").select()')
  tab.press('x', 'x')
  assert value('"ratio").getAttribute("aria-invalid")') == 'true'
  assert 'ratio' not in _assert_equal(tab)
  value('"reset").click()')
  assert value('"ratio").getAttribute("aria-invalid")') == 'false'
  assert _assert_equal(tab)['batch'] == '9'


@with_browser
def test_a_damaged_address_opens_the_preset(tab, url):
  tab.open(
    f'{url}#preset=nothing&context=-5&batch=1e9&dtype=int4&layers=999'
    '&ratio=1:0&kind=x&attention.head_dim=1&recurrent.key_dim=0&odd=1'
  )
  assert _assert_equal(tab) == {'preset': START, 'context': '32768'}
  tab.run('location.hash = "#preset=minimax_m2&batch=4"')
  time.sleep(0.1)
  assert _assert_equal(tab)['preset'] == 'minimax:m2'


@with_browser
def test_every_control_is_reached_by_tab_and_has_a_name(tab, url):
  tab.open(url)
  all_ = tab.run(
    '[...document.querySelectorAll("input,select,button,textarea")].map('
    'x => [x.id, Boolean(x.labels.length || x.ariaLabel ||'
    ' x.tagName === "BUTTON" && x.textContent)])'
  )
  assert len(all_) > 25 and all(named for _, named in all_)
  reached = set()
  for _ in range(len(all_) + 2):
    tab.press('Tab')
    reached.add(tab.run('document.activeElement.id'))
  assert {name for name, _ in all_} <= reached


@with_browser
def test_changes_are_said_aloud_once(tab, url):
  tab.open(url)
  tab.run('document.getElementById("context-range").focus()')
  tab.press('End')
  tab.press('Home')
  said = lambda: tab.run('document.getElementById("status").textContent')
  for _ in range(100):
    if 'At 64 tokens' in said():
      break
    time.sleep(0.05)
  assert said() == tab.run(
    'document.getElementById("verdict").textContent.replace(/\\u00a0/g, " ")'
  )


@with_browser
def test_a_press_on_the_chart_sets_the_context(tab, url):
  tab.open(url)
  left, right, top = tab.run(
    '(() => { const box = document.getElementById("chart")'
    '.getBoundingClientRect(); const at = document.getElementById("chart")'
    '.dataset.box.split(" ").map(Number); return [box.left + at[0],'
    ' box.left + at[1], box.top + 50]; })()'
  )
  where = {'x': (left + right) / 2, 'y': top, 'button': 'left', 'clickCount': 1}
  for kind in ('mousePressed', 'mouseReleased'):
    tab('Input.dispatchMouseEvent', type=kind, **where)
  assert _assert_equal(tab)['context'] == '65536'


@with_browser
def test_command_and_link_are_copied(tab, url):
  tab.open(f'{url}#preset=minimax:m1&batch=2')
  put = 'navigator.clipboard.writeText = async text => {{ {} }}'
  press = lambda name: tab.run(f'document.getElementById("{name}").click()')
  said = lambda: tab.run('document.getElementById("copied").textContent')
  tab.run(put.format('window.put = text'))
  press('copy')
  assert tab.run('window.put') == tab.run(
    'document.getElementById("command").value'
  )
  press('link')
  assert tab.run('window.put') == f'{url}#preset=minimax:m1&batch=2'
  assert said() == 'Copied'
  tab.run(put.format('throw 1'))
  press('copy')
  assert said() == 'Not allowed here: the command is selected'
  assert tab.run('getSelection().toString()').startswith('python -m launch')


@with_browser
@pytest.mark.parametrize('width', [360, 390, 768, 1280])
def test_it_fits_every_window_in_both_themes(tab, url, width):
  papers = []
  for dark in (False, True):
    tab.window(width, 800, dark=dark, phone=width < 600)
    tab.open(f'{url}#preset=kimi_linear:48b_a3b&context=1048576&batch=64')
    assert tab.run('document.documentElement.scrollWidth') <= width
    papers.append(tab.run('getComputedStyle(document.body).backgroundColor'))
    # nothing of the chart is cut off
    assert tab.run(
      '(() => { const box = document.querySelector("#chart svg")'
      '.getBoundingClientRect(); return [...document.querySelectorAll('
      '"#chart text")].every(x => { const b = x.getBoundingClientRect();'
      ' return b.left >= box.left - 1 && b.right <= box.right + 1; }); })()'
    )
  assert papers[0] != papers[1]
  tab.window(1280, 900)


@with_browser
def test_nothing_is_fetched_and_nothing_fails(tab, url):
  tab.open(url)
  assert tab.errors == []
  assert {x for x in tab.requests if not x.startswith(url)} <= {'about:blank'}
