"""`launch.calc`: what it is given, what it prints and writes."""

import json
import pathlib
import subprocess
import sys

import pytest

from deltanet_jax import config
from deltanet_jax.config import ConfigError, preset_names
from deltanet_jax.config.mixers import KDAConfig
from deltanet_jax.lab.cost import arguments, calc, presets, report

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = report.CostSettings((512, 4096), 3, 'bfloat16', 'float32')


@pytest.fixture(scope='module')
def records():
  names = 'quickstart', 'small:kda', 'small:attention'
  return [
    report.measure_model(name, config.load(name).model, SETTINGS)
    for name in names
  ]


def _run(*flags, imports='None'):
  """launch.calc; with imports=('jax',) importing jax ends it."""
  code = (
    f'import runpy, sys\nfor x in {imports} or ():\n  sys.modules[x] = None\n'
    'sys.argv[0] = "launch.calc"\n'
    'runpy.run_module("launch.calc", run_name="__main__", alter_sys=True)\n'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *flags], cwd=ROOT, capture_output=True,
    text=True,
  )  # fmt: skip


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--preset=qwen3_nxt'], ['no preset or file', 'mean qwen3_next?']),
    (['--preset=xyz'], ['no preset or file xyz; there is', 'small']),
    (['--preset=configs/hybrid_gnd.py'], ['configs/small.py:hybrid_gdn']),
    (['--context=0'], ['--context=0: give numbers of tokens']),
    (['--context=4k'], ['--context=4k: give numbers of tokens']),
    (['--batch=0'], ['--batch=0']),
    ([f'--context=64,{2**31}'], ['from 1 to 2,147,483,647']),
    ([f'--context={10**20}'], [f'--context={10**20}: give numbers']),
    ([f'--batch={10**20}'], [f'--batch={10**20}', '2147483647']),
    (['--dtype=int8'], ['--dtype=int8', 'bfloat16']),
    (['--ratio=3:x'], ['--ratio=3:x: give recurrent layers']),
    (['--ratio=0:0'], ['--ratio=0:0: give recurrent layers']),
    (['--recurrent=KDO,heads=3'], ["no kind 'KDO'; did you mean 'KDA'?"]),
    (['--recurrent=MLA'], ["no kind 'MLA'"]),
    (['--recurrent=KDA,heads=3'], ['a new KDAConfig needs key_dim=']),
    (['--recurrent=KDA,heads=x,key_dim=1,value_dim=1'], ['--recurrent']),
    (['--attention=kvheads=3'], ["--attention: kvheads", "'kv_heads'"]),
    (['--attention=kv_heads=3'], ['16 is no multiple of kv_heads 3']),
    (['--json=no/a.json'], ['give a .json file in an existing folder']),
  ],
)  # fmt: skip
def test_bad_input_is_one_line_before_jax(flags, words):
  done = _run(*flags, imports=('jax',))
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  for word in words:
    assert word in done.stderr


def test_presets_make_a_model_of_their_own():
  names = preset_names.list_presets()
  assert 'finetune' not in names
  assert {'small:hybrid_gdn', 'qwen3:8b'} <= set(names)


def test_what_a_model_lacks_is_named():
  cfg = config.load('small:attention').model
  with pytest.raises(ConfigError, match='no such layer to change'):
    arguments.change_mixer(cfg, ['key_dim=3'], 'recurrent')
  made = arguments.change_mixer(
    cfg, ['KDA', 'heads=3', 'key_dim=4', 'value_dim=5', 'conv=0'], 'recurrent'
  )
  assert made == KDAConfig(heads=3, key_dim=4, value_dim=5, conv=0)
  assert arguments.parse_ratio('20:7') == (20, 7) and arguments.parse_ratio(
    '3'
  ) == (3, 1)


def test_the_command_prints_and_writes_what_calc_says(tmp_path):
  files = tmp_path / 'a.json', tmp_path / 'a.png'
  done = _run(
    '--preset=quickstart', '--context=4096,512', '--batch=3', '--ratio=7',
    '--layers=16', '--recurrent=key_dim=32', f'--json={files[0]}',
    f'--png={files[1]}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert files[1].read_bytes().startswith(b'\x89PNG')
  tree = json.loads(files[0].read_text())
  assert tree['settings']['contexts'] == [512, 4096]
  (record,) = tree['models']
  assert record['layers'] == {'GatedDeltaNet': 14, 'Attention': 2}
  own = config.load('quickstart').model
  cfg = calc.resize_model(
    own,
    16,
    (7, 1),
    recurrent=arguments.change_mixer(own, ['key_dim=32'], 'recurrent'),
  )
  assert record['parameters'] == calc.count_parameters(cfg)
  for i, n in enumerate((512, 4096)):
    size = calc.count_total_bytes(cfg, n, 3, 'bfloat16')
    assert record['cache']['total']['at'][i] == size
    assert report.format_size(size) in done.stdout
  assert f'{record["break_even"]:,} tokens on' in done.stdout


def test_record_of_a_hybrid(records):
  record, cfg = records[0], config.load('quickstart').model
  how = SETTINGS.batch, 'bfloat16'
  for key, twin in (
    ('all_attention', calc.make_attention_twin(cfg)),
    ('all_recurrent', calc.make_recurrent_twin(cfg)),
  ):
    found = record[key]['cache']['total']
    assert found['at'] == [
      calc.count_total_bytes(twin, n, *how) for n in (512, 4096)
    ]
    assert record[key]['flops_per_token']['decode'] == [
      calc.count_decoding_flops(twin, n) for n in (512, 4096)
    ]
  total = record['cache']['total']
  assert total['at'][1] == 4096 * total['per_token'] + total['constant']
  parts = record['cache']['parts']
  for i in range(2):
    rows = [row for kind in parts.values() for row in kind.values()]
    assert sum(row['at'][i] for row in rows) == total['at'][i]
  assert record['saved'][1] == 1 - (
    total['at'][1] / record['all_attention']['cache']['total']['at'][1]
  )


def test_models_without_a_twin(records):
  pure, full = records[1:]
  assert pure['all_attention'] is None and pure['saved'] is None
  assert full['all_recurrent'] is None and full['break_even'] is None
  assert 'No attention layer' in report.describe_saving(pure)
  assert 'No recurrent layer' in report.describe_saving(full)


def test_text_and_json_hold_every_model(records):
  text = report.format_text(records, SETTINGS)
  assert 'Side by side' in text and max(map(len, text.split('\n'))) < 110
  for record in records:
    assert text.count(record['name']) == 2
    assert f'{record["parameters"]:,} parameters' in text
  assert json.loads(report.format_json(records, SETTINGS))['models'] == records


def test_sizes_are_said_in_binary_units():
  for n, said in (
    (0, '0 B'), (1023, '1023 B'), (1024, '1.0 KiB'), (77_266_992, '73.7 MiB'),
    (103_022_592, '98.3 MiB'),
    (2**50, '1024.0 TiB'),
  ):  # fmt: skip
    assert report.format_size(n) == said


def test_the_page_of_presets_is_written_in_a_clone_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(preset_names, 'find_folder', lambda: tmp_path)
  monkeypatch.setattr(preset_names, 'is_installed', lambda: True)
  presets.write_page({})
  assert not (tmp_path / 'README.md').exists()
  monkeypatch.setattr(preset_names, 'is_installed', lambda: False)
  presets.write_page({})
  assert (tmp_path / 'README.md').read_text() == presets.format_page({})
