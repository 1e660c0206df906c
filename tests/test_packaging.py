"""The installed package: its files, its requirements, its use from another
folder."""

import ast
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

from deltanet_jax.config import ConfigError, extras, preset_names
from deltanet_jax.data import files
from deltanet_jax.runs.folder import Workdir
from deltanet_jax.train import log
from tests import versions

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'deltanet_jax'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
# libraries whose import name differs from their package name
DISTRIBUTIONS = {'absl': 'absl-py', 'orbax': 'orbax-checkpoint'}


# requirements and metadata


def expand(extra):
  """The requirements of an extra, with those of the extras that it includes."""
  for requirement in EXTRAS[extra]:
    if own := re.fullmatch(r'deltanet_jax\[(.+)\]', requirement):
      for name in own[1].split(','):
        yield from expand(name)
    else:
      yield requirement


def read_requirements(name):
  lines = (ROOT / name).read_text().splitlines()
  return [line for line in lines if line and not line.startswith('#')]


def test_requirements_are_the_dependencies_and_the_extra_dev():
  wanted = [*PROJECT['dependencies'], *expand('dev')]
  assert sorted(read_requirements('requirements.txt')) == sorted(wanted)


@pytest.mark.parametrize('extra', ['cuda', 'tpu', 'oracle'])
def test_other_requirements_add_an_extra(extra):
  lines = read_requirements(f'requirements-{extra}.txt')
  assert lines == ['-r requirements.txt', *EXTRAS[extra]]


def find_imports(path):
  """(library, whether it is imported with the module) of a source."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    else:
      continue
    for name in names:
      yield name.split('.')[0], node in tree.body


def name_project(requirement):
  return re.match(r'[\w-]+', requirement)[0].lower()


def test_whatever_is_imported_is_required():
  always = {name_project(line) for line in PROJECT['dependencies']}
  some = {
    name_project(line) for name in ('plots', 'parquet') for line in EXTRAS[name]
  }
  own = {'deltanet_jax', *sys.stdlib_module_names}
  imported = set()
  for path in PACKAGE.rglob('*.py'):
    for library, at_once in find_imports(path):
      if library in own:
        continue
      project = DISTRIBUTIONS.get(library, library).lower()
      imported.add(project)
      assert project in always | some, (path, library)
      # the files of plots are themselves imported late
      if at_once and path.name != 'plots.py':
        assert project in always, (path, library)
  # and nothing else is
  assert imported == always | some


def test_every_extra_is_that_of_its_libraries():
  for library, extra in extras.EXTRAS.items():
    assert library in {re.match(r'\w+', line)[0] for line in EXTRAS[extra]}


def test_version_is_the_same_everywhere():
  version = PROJECT['version']
  changes = (ROOT / 'CHANGELOG.md').read_text()
  heads = re.findall(r'^## (\S+)', changes, re.M)
  assert version in heads[:2] and heads[0] in ('Unreleased', version)
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {version}\n' in citation
  assert f'\nlicense: {PROJECT["license"]}\n' in citation


def test_the_license_is_whole():
  text = (ROOT / 'LICENSE').read_text()
  assert 'Apache License' in text and 'END OF TERMS AND CONDITIONS' in text
  assert len(text.split()) > 1500


# libraries that are not there


def run_without(libraries, *argv):
  """Runs a command as if these libraries were not installed."""
  code = (
    f'import sys\nfor x in {libraries}: sys.modules[x] = None\n'
    f'sys.argv[1:] = {list(argv)}\n'
    'from deltanet_jax.cli.deltanet import main\nmain()'
  )
  return subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True
  )


@pytest.mark.parametrize(
  'argv',
  [
    ['calc', '--preset=quickstart', '--png={}/x.png'],
    ['probes', '--png={}/x.png'],
    ['study', '--size=smoke', '--workdir={}/x'],
    ['first_steps', '--out={}/x'],
    ['profile', '--size=smoke', '--out={}/x'],
  ],
)
def test_a_plot_without_matplotlib_is_refused_before_the_work(argv, tmp_path):
  done = run_without(
    ['matplotlib', 'jax'], *(word.format(tmp_path) for word in argv)
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.endswith(
    ' needs matplotlib; pip install matplotlib (extra: deltanet_jax[plots])\n'
  )
  assert done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


def test_parquet_without_pyarrow_is_refused(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  path = str(tmp_path / 'a.parquet')
  with pytest.raises(ConfigError, match=r'deltanet_jax\[parquet\]') as refused:
    list(files.read_documents([path], 'text'))
  assert path in str(refused.value)


def test_a_run_without_plots_says_so_and_keeps_its_lines(
  monkeypatch, tmp_path, capsys
):
  for library in ('matplotlib', 'tensorboardX'):
    monkeypatch.setitem(sys.modules, library, None)
  workdir = Workdir(tmp_path)
  records = log.Log(workdir, 0)
  records.metrics({'step': 1, 'loss': 2.0})
  records.sync()
  records.close()
  log.draw_losses(workdir)
  assert '"loss": 2.0' in workdir.metrics.read_text()
  assert not workdir.plot.exists() and not workdir.tensorboard.exists()
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2 and all('deltanet_jax[plots]' in x for x in lines)
  assert 'TensorBoard' in lines[0] and 'loss.png' in lines[1]


# installed


def call(*command, **options):
  done = subprocess.run(command, text=True, capture_output=True, **options)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """(wheel, wheel of the sdist)."""
  folder = tmp_path_factory.mktemp('built')
  call(sys.executable, '-m', 'hatchling', 'build', '-d', folder, cwd=ROOT)
  (sdist,), (wheel,) = folder.glob('*.tar.gz'), folder.glob('*.whl')
  pip(sys.executable, 'wheel', f'--wheel-dir={folder}/again', sdist)
  return wheel, next((folder / 'again').glob('*.whl'))


def pip(python, *command):
  options = ['--no-deps', '--no-index', '--quiet']
  if not str(command[-1]).endswith('.whl'):
    options.append('--no-build-isolation')
  call(
    sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python',
    python, command[0], *options, *command[1:],
  )  # fmt: skip


@pytest.mark.slow
def test_the_package_is_what_git_tracks(built):
  if shutil.which('git') is None or not (ROOT / '.git').exists():
    pytest.skip('no clone')
  tracked = call('git', 'ls-files', 'deltanet_jax', 'configs', cwd=ROOT)
  wanted = {
    re.sub('^configs/', 'deltanet_jax/configs/', name)
    for name in tracked.split()
  }
  names = [zipfile.ZipFile(wheel).namelist() for wheel in built]
  assert sorted(names[0]) == sorted(names[1])
  inside = {name for name in names[0] if '.dist-info/' not in name}
  assert inside == wanted
  assert any(name.endswith('/licenses/LICENSE') for name in names[0])


CHECK = """
import pathlib, sys
import deltanet_jax
from deltanet_jax import config
from deltanet_jax.config import preset_names
assert 'jax' not in sys.modules
print(pathlib.Path(deltanet_jax.__file__).parents[1])
print(preset_names.find_folder())
assert config.load('quickstart').model.vocab
assert 'qwen3:8b' in preset_names.list_presets()
"""


@pytest.mark.slow
@pytest.mark.parametrize('way', ['wheel', 'sdist', 'editable'])
def test_it_works_from_another_folder(built, way, tmp_path):
  venv.create(tmp_path / 'env')
  scripts = tmp_path / 'env/bin'
  site = pathlib.Path(
    sysconfig.get_path('purelib', vars={'base': str(tmp_path / 'env')})
  )
  # its dependencies are those of the tests
  (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
  what = ['-e', ROOT] if way == 'editable' else [built[way == 'sdist']]
  pip(scripts / 'python', 'install', *what)
  empty = tmp_path / 'empty'
  empty.mkdir()
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  run = lambda *command: call(*command, cwd=empty, env=env)
  package, presets = run(scripts / 'python', '-c', CHECK).split()
  installed = {x.name for x in site.iterdir()} - {'others.pth', '__pycache__'}
  installed = {x for x in installed if not x.endswith('.dist-info')}
  if way == 'editable':
    assert (package, presets) == (str(ROOT), str(ROOT / 'configs'))
    assert all(name.endswith('.pth') for name in installed)
  else:
    assert package == str(site)
    assert presets == str(site / 'deltanet_jax/configs')
    assert installed == {'deltanet_jax'}
  # a preset by name reads the text that it is told
  done = subprocess.run(
    [scripts / 'deltanet', 'train', '--config=quickstart', '--workdir=run',
     '--config.data.path=none*'],
    cwd=empty, env=env, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 2 and "'none*'" in done.stderr, done.stderr
  names = run(scripts / 'deltanet', '--help')
  assert 'deltanet NAME' in names and '  train ' in names


@pytest.mark.parametrize('command', [['--help'], ['train', '--help']])
def test_help_answers_at_once(command):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'deltanet_jax', *command],
    cwd=ROOT, text=True, capture_output=True,
  )  # fmt: skip
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0 and done.stdout
  assert not re.search(r'\| +(jax|numpy|flax)$', done.stderr, re.M)
  assert after.ru_utime - before.ru_utime < 0.5


def test_presets_are_found_in_the_package_before_the_clone(
  tmp_path, monkeypatch
):
  package = tmp_path / 'deltanet_jax'
  (package / 'config').mkdir(parents=True)
  place = str(package / 'config/preset_names.py')
  monkeypatch.setattr(preset_names, '__file__', place)
  assert preset_names.find_folder() == tmp_path / 'configs'
  (package / 'configs').mkdir()
  assert preset_names.find_folder() == package / 'configs'


def test_a_path_of_the_clone_given_elsewhere_is_answered_by_its_name(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for path, name in (
    ('configs/qwen3.py:8b', 'qwen3:8b'),
    ('configs/quikstart.py', 'quickstart'),
  ):
    with pytest.raises(ConfigError, match=f'did you mean {name}?'):
      preset_names.locate_preset(path)


# the environment of the scripts


def make_env(root, *modules, **env):
  return subprocess.run(
    ['bash', '-c', 'source launch/env.sh; make_env "$@"; echo "$python"',
     'bash', root, *modules],
    cwd=ROOT, env=env, text=True, capture_output=True,
    executable='/bin/bash',
  )  # fmt: skip


def test_the_active_environment_is_taken(tmp_path):
  done = make_env(tmp_path, 'jax', 'pytest', VIRTUAL_ENV=sys.prefix)
  assert done.stdout == f'{sys.prefix}/bin/python\n', done.stderr
  assert done.stderr == '' and not list(tmp_path.iterdir())


def test_what_the_active_environment_lacks_is_named(tmp_path):
  for env, lacking in (sys.prefix, 'no_such_module'), ('/none', 'bin/python'):
    done = make_env(tmp_path, 'jax', 'no_such_module', VIRTUAL_ENV=env)
    refusal = f'error: the active environment {env} has no {lacking};'
    assert done.stderr.startswith(refusal) and done.stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_an_interpreter_that_is_named_comes_first_and_then_the_newest(tmp_path):
  calls = tmp_path / 'calls'
  for name in ('mine', 'python3', 'python3.11', 'python3.13'):
    path = tmp_path / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n')
    path.chmod(0o755)
  root = tmp_path / 'root'
  root.mkdir()
  (root / 'requirements.txt').touch()
  env = {'PATH': f'{tmp_path}:/usr/bin:/bin'}
  for more, name in (
    ({}, 'python3.13'),
    ({'DELTANET_PYTHON': 'mine', 'VIRTUAL_ENV': sys.prefix}, 'mine'),
  ):
    make_env(root, 'jax', **env, **more)
    last = calls.read_text().splitlines()[-1]
    assert last == f'{name} -m venv --clear {root}/.venv'


# what was tried


REPORT = """<testsuites><testsuite errors="1" failures="2" skipped="3"
tests="10" time="90.0" /></testsuites>"""


def test_a_run_under_other_versions_is_a_row_in_the_place_of_the_last():
  counts = versions.count_tests(REPORT)
  assert counts == ['4', '3', '3', '2']
  row = lambda python, jax, passed: [python, jax, 'f', 'd', 'all', passed, '0']
  table = versions.HEAD
  for values in (
    ('3.13.0', '1', '5'),
    ('3.12.1', '1', '6'),
    ('3.13.0', '1', '7'),
  ):
    table = versions.insert_row(table, row(*values))
  assert table == (
    versions.HEAD
    + '| 3.12.1 | 1 | f | d | all | 6 | 0 |\n'
    + '| 3.13.0 | 1 | f | d | all | 7 | 0 |\n'
  )
