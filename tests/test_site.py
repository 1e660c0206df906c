"""The site of docs/: its Python runs, its notebooks have their outputs, and
what is made for it is whole. `.ci/run docs` builds it, runs the notebooks, and
has the tests of the built pages look at $SITE."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

import deltanet_jax as dn
from deltanet_jax.cli.deltanet import COMMANDS
from tests import released

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
BLOCK = re.compile(r'^```python\n(.*?)^```', re.M | re.S)
# tests/test_pages.py runs the first of these, and the second is files
ELSEWHERE = 'library.md', 'add_a_mixer.md'
PAGES = [
  str(path.relative_to(DOCS))
  for path in sorted(DOCS.rglob('*.md'))
  if '_made' not in path.parts
  and path.name not in ELSEWHERE
  and BLOCK.search(path.read_text())
]
NOTEBOOKS = sorted(path.stem for path in DOCS.glob('notebooks/*.ipynb'))


@pytest.fixture(scope='module')
def made():
  spec = importlib.util.spec_from_file_location('made', DOCS / 'made.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# the pages' Python


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize('page', PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
  """Its blocks in order, where a run lies in runs/first."""
  with tarfile.open(ROOT / 'tests/fixtures/stored.tar.xz') as archive:
    archive.extractall(tmp_path, filter='data')
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'run').rename(tmp_path / 'runs/first')
  monkeypatch.chdir(tmp_path)
  names = {'__name__': 'page'}
  for block in BLOCK.findall((DOCS / page).read_text()):
    exec(compile(block, page, 'exec'), names)


def test_pages_have_python():
  assert len(PAGES) > 4


def read_files(page):
  """{name: text} of the blocks that a page says are files; the others."""
  text, files, rest = (DOCS / page).read_text(), {}, []
  for match in BLOCK.finditer(text):
    before = text[: match.start()].rstrip().rsplit('\n\n', 1)[-1]
    name = re.findall(r'`(\w+\.py)`', before)
    if name:
      files[name[-1]] = match[1]
    else:
      rest.append(match[1])
  return files, rest


@pytest.fixture
def mine(tmp_path):
  """The files of the page, and an environment that finds them."""
  files, rest = read_files('add_a_mixer.md')
  assert list(files) == ['ema_config.py', 'ema.py', 'own_mixer.py', 'run.py']
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  (tmp_path / 'trial.py').write_text(rest[0])
  path = f'{tmp_path}:{ROOT}'
  quick = {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  return tmp_path, {**os.environ, 'PYTHONPATH': path, **quick}


def run(*argv, cwd, env):
  done = subprocess.run(
    [sys.executable, *argv], cwd=cwd, env=env, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  return done.stdout


@pytest.mark.slow
def test_the_mixer_of_the_page_passes_the_contract(mine):
  folder, env = mine
  contract = 'tests/mixers/test_mixer_contract.py'
  args = '-m', 'pytest', '-n0', '-q', '-rA', '-p', 'own_mixer'
  out = run(*args, '-k', 'EMAConfig', contract, cwd=ROOT, env=env)
  assert out.count('PASSED') > 12


@pytest.mark.slow
def test_the_mixer_of_the_page_is_tried_and_trained(mine):
  folder, env = mine
  run('trial.py', cwd=folder, env=env)
  released.write_texts(folder / 'texts')
  given = '--config=run.py', '--workdir=runs/ema'
  command = '-m', 'deltanet_jax'
  short = (
    '--config.data.path=texts/*.txt', '--config.data.heldout=0.1',
    '--config.train.steps=2', '--config.train.eval_rows=8',
  )  # fmt: skip
  run(*command, 'train', *given, *short, cwd=folder, env=env)
  out = run(
    *command, 'generate', *given, '--prompt=The', '--max_tokens=3',
    cwd=folder, env=env,
  )  # fmt: skip
  assert out.startswith('The')
  out = run(*command, 'calc', '--preset=run.py', cwd=folder, env=env)
  assert 'EMA' in out


# notebooks


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_has_its_outputs(name):
  """Those of one run from the top, without errors, and of no one machine."""
  path = DOCS / 'notebooks' / f'{name}.ipynb'
  assert path.stat().st_size < 300_000
  cells = json.loads(path.read_text())['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell['outputs']]
  kinds = {output['output_type'] for output in outputs}
  assert kinds <= {'stream', 'execute_result', 'display_data'}
  assert all(output.get('name') != 'stderr' for output in outputs)
  pictures = [x for x in outputs if 'image/png' in x.get('data', {})]
  assert pictures
  words = json.dumps([x for x in outputs if x not in pictures])
  assert not re.search(r'/tmp|/home|/root|site-packages', words)


# what is made


def test_every_name_of_the_front_door_is_in_the_reference(made):
  api, fields = made._make_api(), made._make_configuration()
  for name in dn._MODULES:
    there = re.search(rf'auto\w+:: deltanet_jax\.{name}$', api, re.M)
    assert there or f'\n### {name}\n' in fields, name
  assert 'deltanet_jax.fla.chunk_kda' in api


def test_links_lead_to_the_pages_of_the_site(made):
  move = lambda text: made.relink(text, 'docs/study/README.md', 'docs/x.md')
  assert (
    move('[a](../../launch/README.md#gke)') == '[a](_made/launching.md#gke)'
  )
  assert move('[a](summary.md), [b](#c)') == '[a](study/summary.md), [b](#c)'
  assert move('[a](https://b.c)') == '[a](https://b.c)'
  for source in made.PAGES:
    assert (ROOT / source).is_file(), source


def test_a_docstring_keeps_what_is_laid_out_by_hand(made):
  lines = ['Does `x` to y*.', '', '  f(x, name=1)', '', 'x [B,T]: an array']
  made.lay_out(None, 'function', 'f', None, None, lines)
  assert lines == [
    r'Does ``x`` to y\*.', '',
    '.. code-block:: text', '', '     f(x, name=1)', '',
    '.. code-block:: text', '', '   x [B,T]: an array', '',
  ]  # fmt: skip


def test_equations_of_plain_text_are_maths(made):
  text = """
    S' = e^{g_t} S_{t-1} + k_t v_t^T   (write)
    gram_ij = sum_{j<i} k_i^T k_j

    x = the sum of all rows
"""
  assert made.set_equations(f'\n{text}').split('\n') == [
    '', '', '```{math}', r'\begin{aligned}',
    r"S'  &=  e^{g_t} S_{t-1} + k_t v_t^\top  && \text{(write)} \\",
    r'\mathrm{gram}_{ij}  &=  \sum _{j<i} k_i^\top  k_j',
    r'\end{aligned}', '```', '', '    x = the sum of all rows', '',
  ]  # fmt: skip


# the built pages


@pytest.fixture
def site():
  if 'SITE' not in os.environ:
    pytest.skip('.ci/run docs builds the site')
  return pathlib.Path(os.environ['SITE'])


def test_the_built_site_loads_nothing_from_elsewhere(site):
  pages = list(site.rglob('*.html'))
  assert len(pages) > 40
  tag = r'<(?:script|link|img|iframe|source|video)\b[^>]*'
  for page in pages:
    for found in re.findall(rf'{tag}(?:src|href)="([^"]+)"', page.read_text()):
      assert not re.match(r'(\w+:)?//', found), (page, found)
  for style in site.rglob('*.css'):
    text = style.read_text()
    assert not re.search(r'(@import|url\()\s*["\']?(\w+:)?//', text), style


def test_the_built_site_has_its_maths_and_its_reference(site):
  assert (site / '_static/tex-svg.js').stat().st_size > 1e6
  math = (site / 'add_a_mixer.html').read_text()
  assert '_static/tex-svg.js' in math and 'class="math' in math
  api = (site / '_made/api.html').read_text()
  assert 'id="deltanet_jax.gated_delta_rule"' in api
  commands = (site / '_made/commands.html').read_text()
  for name in COMMANDS:
    assert f'id="{name.replace("_", "-")}"' in commands, name
