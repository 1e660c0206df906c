"""launch.bench: what it runs, compares and refuses; never how fast."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.forms import FORMS
from deltanet_jax.lab.bench import bench, models, report

ROOT = pathlib.Path(__file__).parents[2]
TINY = bench.BenchSettings(
  'delta_rule', ('recurrent',), (), values=(5,), heads=2, grouped=2, dim=4,
  rounds=2,
)  # fmt: skip
PEERS = """
import jax.numpy as jnp
from deltanet_jax.ops import delta_rule

def same(q, k, v, beta, g, state=None):
  return delta_rule.recurrent(q, k, v, beta, g, state=state)

def ungated(q, k, v, beta, g, state=None):
  return delta_rule.recurrent(q, k, v, beta, None, state=state)

def not_a_number(q, k, v, beta, g, state=None):
  return v * jnp.nan, state

def no_state(q, k, v, beta, g):
  return v, None

def transposed(q, k, v, beta, g, state=None):
  return v.swapaxes(1, 2), state
"""


@pytest.fixture
def peers(tmp_path):
  file = tmp_path / 'peers.py'
  file.write_text(PEERS)
  return lambda *names: tuple(f'{file}:{name}' for name in names)


class _Lines:
  def __init__(self):
    self.lines = []

  def show(self, line):
    self.lines.append(line)

  def clear(self):
    pass


def _measure(settings):
  progress = _Lines()
  found = bench.find_functions(settings)
  programs = bench.list_programs(settings, found)
  bench.measure_programs(settings, programs, progress, next(iter(found)))
  return programs, progress.lines


def _report(settings, programs):
  where = {'platform': 'cpu', 'device': 'cpu', 'jax': '0'}
  text = report.format_text(settings, programs, where)
  return text, json.loads(report.format_json(settings, programs, where))


def test_a_peer_that_computes_something_else_is_said_to(peers, quick_compile):
  settings = TINY._replace(peers=peers('same', 'ungated', 'not_a_number'))
  programs, _ = _measure(settings)
  assert {(p.name, p.way): bench.is_same(p, settings) for p in programs} == {
    (name, way): name in ('recurrent', 'same')
    for name in ('recurrent', 'same', 'ungated', 'not_a_number')
    for way in bench.PASSES
  }
  text, tree = _report(settings, programs)
  told = [line for line in text.split('\n') if 'DIFFERENT RESULT' in line]
  assert [line.split()[0] for line in told] == 2 * ['ungated', 'not_a_number']
  differs = {p['name']: p['difference'] for p in tree['programs']}
  assert differs['recurrent'] is None and differs['not_a_number'] is None
  assert differs['same'] < 1e-5 and differs['ungated'] > 1e-2
  assert 'compare ratios only' in text


def test_programs_take_turns_after_all_are_compiled(
  peers, quick_compile, monkeypatch
):
  settings, ran, run = TINY._replace(peers=peers('same')), [], bench._time
  note = lambda program: ran.append(str(program))
  monkeypatch.setattr(bench, '_time', lambda x: note(x) or run(x))
  programs, lines = _measure(settings)
  turns = [str(p) for p in programs]
  names = ('recurrent', 'same')
  assert turns == [
    f'{name} {way} T=5' for way in bench.PASSES for name in names
  ]
  assert ran == 3 * turns  # first run, two rounds
  assert [line.split(': ')[1] for line in lines[:8]] == 2 * turns
  assert [line.split()[0] for line in lines] == (
    4 * ['compiling'] + 4 * ['first'] + 2 * ['round']
  )
  assert all(len(p.seconds) == 2 and min(p.seconds) > 0 for p in programs)


def test_a_program_above_the_memory_limit_is_compiled_but_not_run(
  quick_compile,
):
  settings = TINY._replace(memory_limit=0.0)
  programs, lines = _measure(settings)
  assert all(p.temporary_bytes > 0 and not p.seconds for p in programs)
  assert all(line.startswith('compiling') for line in lines)
  text, tree = _report(settings, programs)
  assert text.count('NOT RUN: temporaries above 0 GB') == 2
  assert [p['ran'] for p in tree['programs']] == [False, False]


def test_backward_gives_every_gradient(quick_compile):
  inputs, state, d_o = bench.make_inputs(
    TINY._replace(length=3), jax.random.key(0)
  )
  ones = jnp.ones_like(state)

  def function(q, k, v, beta, g, state=None):
    read = jnp.einsum('bthv,bhkv->bthv', v, ones) * g[..., None]
    return read + state.sum(2)[:, None], state

  o, ((*_, d_v, _, d_g), d_state) = bench._both(function, inputs, state, d_o)
  v, g = inputs[2], inputs[4]
  np.testing.assert_allclose(o, 4 * v * g[..., None], rtol=1e-5)
  np.testing.assert_allclose(d_v, 4 * d_o * g[..., None], rtol=1e-5)
  np.testing.assert_allclose(d_g, 4 * (v * d_o).sum(-1), rtol=1e-4, atol=1e-5)
  expected = jnp.broadcast_to(d_o.sum(1)[:, :, None], state.shape)
  np.testing.assert_allclose(d_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('op', FORMS)
def test_inputs_are_those_of_a_mixer(op, quick_compile):
  settings = TINY._replace(op=op, dtype='bfloat16', batch=3, length=7)
  inputs, state, d_o = bench.make_inputs(settings, jax.random.key(1))
  names = importlib.import_module(f'deltanet_jax.ops.{op}').DESCRIPTION.inputs
  given = dict(zip(names, inputs, strict=True))
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float32), axis=-1)
  assert given['q'].shape == given['k'].shape == (3, 7, 1, 4)
  np.testing.assert_allclose(norm(given['k']), 1, rtol=1e-2)
  np.testing.assert_allclose(norm(given['q']), 0.5, rtol=1e-2)
  assert given['v'].shape == d_o.shape == (3, 7, 2, 4)
  assert {given[name].dtype for name in 'qkv'} == {jnp.dtype('bfloat16')}
  assert given['g'].dtype == state.dtype == jnp.float32
  assert given['g'].shape == ((3, 7, 2, 4) if op == 'kda' else (3, 7, 2))
  assert jnp.all(given['g'] < 0) and not jnp.any(state)
  if 'beta' in given:
    assert given['beta'].shape == (3, 7, 2)
    assert jnp.all((given['beta'] > 0) & (given['beta'] < 1))


def test_growth_tells_linear_from_quadratic():
  programs = []
  for length in (64, 128, 512):
    program = bench.TimedProgram('a', 'forward', length)
    program.temporary_bytes = 3 * length
    program.seconds = [9.0, 1e-6 * length**2]
    programs.append(program)
  (row,) = report.compute_growth(programs)
  assert row['temporary'] == pytest.approx([1, 1, 1])
  assert row['temporary_slope'] == pytest.approx(1)
  assert row['time'] == pytest.approx([1, 2, 8])
  assert row['time_slope'] == pytest.approx(2)


def test_mfu_is_of_the_devices_that_run_the_program():
  program = bench.TimedProgram('a', 'training step', 5, flops=6.0, devices=4)
  program.seconds = [2.0, 1.0]
  where = {'platform': 'tpu', 'device': 'tpu', 'jax': '0', 'peak_flops': 3.0}
  tree = json.loads(report.format_json(TINY, [program], where))
  assert tree['programs'][0]['mfu'] == 0.5


def test_growth_leaves_out_what_was_not_run():
  programs = [
    bench.TimedProgram('a', 'forward', length) for length in (64, 128)
  ]
  for program in programs:
    program.temporary_bytes = 1
  programs[0].seconds = [1.0]
  (row,) = report.compute_growth(programs)
  assert row['time'] == [1, None] and row['time_slope'] is None


MODEL = """
from deltanet_jax.config import experiment as e, mixers

def get_config():
  mixer = mixers.GatedDeltaNetConfig(1, 2, 4, 4, conv=0)
  attention = mixers.AttentionConfig(2, 1, 4)
  return e.Experiment(
    model=e.ModelConfig(
      16, 8, tuple(e.Layer(x, e.MLPConfig(8)) for x in (mixer, attention)), 1
    ),
    data=e.DataConfig('none', seq_len=8, batch=2),
    optim=e.OptimConfig(lr=1e-3, warmup=1),
    train=e.TrainConfig(steps=1, dtype='float32'),
  )
"""


@pytest.mark.parametrize(
  'what, tokens',
  [
    ('decode', 3),
    ('prefill', 3 * 130),
    pytest.param('layer', 3 * 130, marks=pytest.mark.slow),
    pytest.param('step', 3 * 130, marks=pytest.mark.slow),
  ],
)
def test_a_model_is_timed_in_each_form(what, tokens, tmp_path, quick_compile):
  (tmp_path / 'model.py').write_text(MODEL)
  path = f'{tmp_path}/model.py'
  settings = TINY._replace(
    what=what, configs=(path,), forms=('auto', 'recurrent'), batch=3,
    values=(130,),
  )  # fmt: skip
  programs = models.list_programs(settings)
  ways = {'layer': bench.PASSES, 'step': ['training step']}.get(what, [''])
  parts = ' GatedDeltaNet', ' Attention'
  names = [
    f'{path} {form}{part}'
    for form in settings.forms
    for part in (parts if what == 'layer' else [''])
    for _ in ways
  ]
  assert [p.name for p in programs] == names
  assert {p.tokens for p in programs} == {tokens}
  bench.measure_programs(settings, programs, _Lines())
  assert all(len(p.seconds) == 2 and p.peak_bytes > 0 for p in programs)
  assert all(p.difference is None for p in programs)
  if what == 'layer':  # the gradient's products, two for each one
    assert programs[1].flops == 3 * programs[0].flops
  where = {'platform': 'tpu', 'device': 'tpu', 'jax': '0', 'peak_flops': 1e3}
  tree = json.loads(report.format_json(settings, programs, where))['programs']
  for program, record in zip(programs, tree, strict=True):
    rate = program.flops / min(program.seconds)
    assert record['mfu'] == pytest.approx(rate / 1e3)
  text = report.format_text(settings, programs, where)
  assert 'MFU %' in text and 'o differs by' not in text


@pytest.mark.parametrize(
  'name, words',
  [
    ('absent', "no function 'absent'"),
    ('no_state', "unexpected keyword argument 'state'"),
    ('transposed', 'float32[1, 5, 2, 4] and [1, 2, 4, 4]'),
  ],
)
def test_a_peer_that_does_not_fit_is_refused(name, words, peers):
  (peer,) = peers(name)
  with pytest.raises(ValueError) as caught:
    bench.find_functions(TINY._replace(peers=(peer,)))
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_peer_file_that_cannot_be_read_is_refused(tmp_path):
  (tmp_path / 'broken.py').write_text('import no_such_package\n')
  with pytest.raises(ValueError, match='broken.py cannot be loaded.*no_such'):
    bench.find_functions(TINY._replace(peers=(f'{tmp_path}/broken.py:f',)))


def _run(*flags, imports=()):
  """Runs the main; `imports` are packages whose import ends it."""
  blocked = ''.join(f'sys.modules[{name!r}] = None\n' for name in imports)
  code = (
    'import runpy, sys\n'
    f'{blocked}sys.argv[0] = "launch.bench"\n'
    'runpy.run_module("launch.bench", run_name="__main__", alter_sys=True)\n'
  )
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, flags)],
    cwd=ROOT, capture_output=True, text=True, env=os.environ,
  )  # fmt: skip


def _assert_refused(done, *words):
  assert done.returncode == 2, done.stderr
  assert done.stdout == ''
  assert done.stderr.count('\n') == 1 and done.stderr.startswith('error: ')
  for word in words:
    assert word in done.stderr


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--op=deltarule'], ['did you mean delta_rule?']),
    (['--op=gdn'], ['--op=gdn: did you mean delta_rule (with g)?']),
    (['--op=gated_delta_rule'], ['did you mean delta_rule (with g)?']),
    (['--op=softmax'], ['Recurrences: linear_attention, delta_rule, kda']),
    (['--dtype=float16'], ['float16', 'bfloat16']),
    (['--heads=6', '--key_heads=4'], ['6 heads', '4 key heads']),
    (['--chunk=48'], ['48', '16 * 2^n']),
    (['--length=64,many'], ['64,many']),
    (['--length=64,128', '--batch=1,2'], ['--length and --batch', 'to one']),
    (['--what=step'], ['no --config given']),
    (
      ['--what=step', '--config=quickstart', '--heads=8,16'],
      ['--heads is for --what=rule'],
    ),
    (['--config=quickstart'], ['--what=rule: --config is the model of layer']),
    (['--forms='], ['--forms=']),
    (['--peer=peers.py'], ['FILE.py:NAME']),
    (['--peer=no/such.py:f'], ['no file no/such.py']),
    (['--plot=growth.jpg'], ['growth.jpg', '.png']),
    (['--json=no/such/folder/a.json'], ['no/such/folder', 'existing folder']),
  ],
)
def test_a_bad_command_line_is_refused_before_jax_is_imported(flags, words):
  _assert_refused(_run(*flags, imports=['jax', 'numpy']), *words)


def test_an_unknown_form_is_refused():
  _assert_refused(_run('--forms=chunky'), 'chunky', 'recurrent, associative')


def test_help_needs_no_jax():
  done = _run('--help', imports=['jax', 'numpy'])
  assert done.returncode == 0
  assert '--peer=FILE.py:NAME' in done.stdout and '--rounds' in done.stdout


def test_tables_json_and_plot_come_of_one_command(tmp_path):
  path = tmp_path / 'bench.json'
  done = _run(
    '--op=linear_attention', '--forms=recurrent', '--length=8,4', '--heads=1',
    '--dim=4', '--rounds=1', f'--json={path}', f'--plot={tmp_path}/bench.png',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'T=4, forward;' in done.stdout and 'slope' in done.stdout
  tree = json.loads(path.read_text())
  assert tree['settings']['values'] == [4, 8]
  assert tree['jax'] == jax.__version__ and tree['platform'] == 'cpu'
  assert [len(p['seconds']) for p in tree['programs']] == [1, 1, 1, 1]
  assert len(tree['growth']) == 2
  png = (tmp_path / 'bench.png').read_bytes()
  assert png.startswith(b'\x89PNG')
