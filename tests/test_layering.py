"""The allowed imports between folders, read from the source."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'deltanet_jax'

# a file imports its own folder and those on lower floors
FLOORS = (
  ('config', 'progress'),
  ('data', 'ops', 'platforms'),
  ('kernels',),
  ('parallel',),
  ('layers',),
  ('mixers',),
  ('model', 'flops'),
  ('objectives', 'hf'),
  ('runs',),
  ('train', 'infer'),
  ('evals', 'functional'),
  ('fla',),
  ('cli',),
  ('lab', '__main__'),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# of lab a folder also imports the calculator and the files beside the folders
SHARED_LAB = (
  'lab.cost', 'lab.chips', 'lab.environment', 'lab.full_cache', 'lab.pages',
  'lab.plots',
)  # fmt: skip
# what a mixer may import of the other mixers' folder
SIBLINGS = {'mixers.dsa': ('mixers.mla', 'mixers.base')}
LINEN = ('layers', 'mixers', 'model', 'parallel.sharding')
STDLIB_ONLY = ('config', 'progress')


def _under(name, prefixes):
  return any(name == p or name.startswith(f'{p}.') for p in prefixes)


def _imports(source):
  """Absolute names of all that a source imports, submodules included, but for
  libraries that are imported for types alone."""
  tree = ast.parse(source)
  typing_only = {
    id(node)
    for block in tree.body
    if isinstance(block, ast.If) and ast.unparse(block.test) == 'TYPE_CHECKING'
    for node in block.body
    if not ast.unparse(node).startswith('from deltanet_jax')
  }
  for node in ast.walk(tree):
    if id(node) in typing_only:
      continue
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _faults(name, source, names):
  """The forbidden imports of a module `name` of the package; `names`: the
  package's modules."""
  for full in _imports(source):
    top = full.split('.')[0]
    if top in ('launch', 'configs', 'tests'):
      yield full
    if full.startswith('flax.linen') and not _under(name, LINEN):
      yield full
    if full.startswith(('flax.training', 'flax.nnx', 'flax.linen.partition')):
      yield full
    stdlib = ('deltanet_jax', *sys.stdlib_module_names)
    if _under(name, STDLIB_ONLY) and top not in stdlib:
      yield full
    if name.startswith('ops.') and top not in ('jax', 'chex', *stdlib):
      yield full
    if top == 'deltanet_jax' and name:
      inner = full.removeprefix('deltanet_jax').removeprefix('.')
      while inner and inner not in names:
        inner = inner.rpartition('.')[0]  # a name in the module
      if inner and not _allowed(name, inner):
        yield full


def _allowed(name, imported):
  folder, other = name.split('.')[0], imported.split('.')[0]
  if folder != other:
    return FLOOR[other] < FLOOR[folder]
  if folder == 'mixers' and imported != 'mixers':
    return _under(imported, (name, *SIBLINGS.get(name, ('mixers.base',))))
  if folder == 'lab' and imported != 'lab':
    room = '.'.join(name.split('.')[:2])
    return _under(imported, (room, *SHARED_LAB))
  return True


def _modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    yield name.removesuffix('.__init__').removesuffix('__init__'), path


def test_every_module_imports_only_what_is_below_it():
  modules = dict(_modules())
  assert {'model', 'ops.scan', 'mixers.base', 'layers.proj'} <= set(modules)
  assert {name.split('.')[0] for name in modules if name} <= FLOOR.keys()
  faults = {
    name: wrong
    for name, path in modules.items()
    if (wrong := list(_faults(name, path.read_text(), set(modules))))
  }
  assert not faults


@pytest.mark.parametrize(
  'name, source',
  [
    ('config', 'import jax'),
    ('config', 'if not TYPE_CHECKING:\n  import jax'),
    (
      'config',
      'if TYPE_CHECKING:\n  from deltanet_jax.mixers.base import Mixer',
    ),
    ('config.mixers', 'import numpy'),
    ('config.mixers', 'from deltanet_jax.layers import proj'),
    ('config.load', 'from deltanet_jax import progress'),
    ('ops.kda', 'from deltanet_jax.layers.proj import Proj'),
    ('ops.kda', 'from deltanet_jax import kernels'),
    ('ops.kda', 'import numpy'),
    ('mixers.kda', 'from deltanet_jax.mixers.attention import Attention'),
    ('mixers.kda', 'from deltanet_jax.mixers import attention'),
    ('layers.proj', 'from deltanet_jax.mixers import base'),
    ('parallel.experts', 'from deltanet_jax import flops'),
    ('model', 'from deltanet_jax import flops'),
    ('hf.store', 'from deltanet_jax.infer.generate import generate'),
    ('hf.store', 'from deltanet_jax.runs import folder'),
    ('train.step', 'from deltanet_jax.evals import perplexity'),
    ('train.step', 'from deltanet_jax.lab.cost import calc'),
    ('train.step', 'import flax.linen as nn'),
    ('train.step', 'from flax import linen'),
    ('train.step', 'from launch import train'),
    ('lab.study.report', 'from deltanet_jax.lab.bench import report'),
    ('cli.train', 'from deltanet_jax.lab import study'),
  ],
)
def test_a_forbidden_import_is_found(name, source):
  names = {module for module, _ in _modules()}
  assert list(_faults(name, source, names)) != []


def test_an_allowed_import_is_none():
  source = (
    'from deltanet_jax.lab.cost import calc\n'
    'from deltanet_jax.lab.environment import machine\n'
    'from deltanet_jax.lab.study import report\n'
    'from deltanet_jax import model\nimport jax'
  )
  names = {module for module, _ in _modules()}
  assert not list(_faults('lab.study.page', source, names))


def test_the_core_asks_for_the_platform_in_one_place():
  core = (
    'platforms',
    'ops',
    'kernels',
    'parallel',
    'layers',
    'mixers',
    'model',
  )
  asking = [
    name
    for name, path in _modules()
    if _under(name, core)
    and re.search(r'\.platform\b|default_backend', path.read_text())
  ]
  assert asking == ['platforms']
