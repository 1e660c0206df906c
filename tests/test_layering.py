"""Who may import whom, read from the source."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'deltanet_jax'
STDLIB_ONLY = (
  'config',
  'experiment',
  'mixers.config',
  'preset_names',
  'presets',
  'ranges',
)

# what a module may import of the package, by the longest prefix of its name;
# what is not listed (training, data, inference, evaluation) may import anything
ALLOWED = {
  'experiment': ('mixers.config', 'ranges'),
  'config': ('experiment', 'mixers.config', 'preset_names'),
  'presets': ('experiment',),
  'preset_names': (),
  'ops': ('ops',),
  'layers': ('layers', 'ops', 'experiment', 'parallel', 'sharding'),
  'mixers': ('mixers.base', 'mixers.config', 'layers', 'ops', 'parallel'),
  'mixers.dsa': (
    'mixers.mla',
    'mixers.base',
    'mixers.config',
    'layers',
    'ops',
    'parallel',
  ),
  'mixers.config': ('ranges',),
  'ranges': (),
  'model': ('experiment', 'layers', 'mixers.base', 'ops.routing', 'sharding'),
  'sharding': (),
  'flops': (),
  'calc': (
    'flops',
    'model',
    'sharding',
    'experiment',
    'mixers.base',
    'mixers.config',
  ),
  'parallel': ('ops', 'sharding'),
  'parallel.experts': ('ops', 'sharding', 'flops'),
  'parallel.softmax': ('parallel.sequence', 'ops', 'sharding'),
}
LINEN = ('layers', 'mixers', 'model', 'sharding')


def _under(name, prefixes):
  return any(name == p or name.startswith(f'{p}.') for p in prefixes)


def _imports(source):
  """Absolute names of everything a source imports, submodules included."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _faults(name, source, names):
  """What a module `name` of the package imports and must not; `names` are the
  package's modules."""
  longest = max((p for p in ALLOWED if _under(name, [p])), default='', key=len)
  for full in _imports(source):
    top = full.split('.')[0]
    if top in ('launch', 'configs', 'tests'):
      yield full
    if full.startswith('flax.linen') and not _under(name, LINEN):
      yield full
    if full.startswith(('flax.training', 'flax.nnx', 'flax.linen.partition')):
      yield full
    heavy = ('jax', 'flax', 'numpy', 'grain', 'optax')
    if name in STDLIB_ONLY and top in heavy:
      yield full
    pure = ('jax', 'chex', 'deltanet_jax', *sys.stdlib_module_names)
    if name.startswith('ops.') and top not in pure:
      yield full
    if top == 'deltanet_jax' and longest:
      inner = full.removeprefix('deltanet_jax').removeprefix('.')
      if inner not in names:
        inner = inner.rpartition('.')[0]  # a name of the module
      allowed = (name, *ALLOWED[longest])
      if inner and not (_under(inner, allowed) or inner in _parents(allowed)):
        yield full


def _parents(names):
  """'mixers' of 'mixers.base': `from package import module` reads as both."""
  return {n.rpartition('.')[0] for n in names} - {'mixers'}


def _modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    yield name.removesuffix('.__init__').removesuffix('__init__'), path


def test_every_module_imports_only_what_is_below_it():
  modules = dict(_modules())
  assert {'model', 'ops.scan', 'mixers.base', 'layers.proj'} <= set(modules)
  found = {
    name: faults
    for name, path in modules.items()
    if (faults := list(_faults(name, path.read_text(), set(modules))))
  }
  assert not found


@pytest.mark.parametrize(
  'name, source',
  [
    ('config', 'import jax'),
    ('mixers.config', 'from deltanet_jax.layers import proj'),
    ('ops.kda', 'from deltanet_jax.layers.proj import Proj'),
    ('ops.kda', 'import numpy'),
    ('mixers.kda', 'from deltanet_jax.mixers.attention import Attention'),
    ('mixers.kda', 'from deltanet_jax.mixers import attention'),
    ('layers.proj', 'from deltanet_jax.mixers import base'),
    ('model', 'from deltanet_jax.mixers.kda import KDA'),
    ('train.step', 'import flax.linen as nn'),
    ('train.step', 'from flax import linen'),
    ('train.step', 'from launch import train'),
    ('calc', 'from deltanet_jax.train.step import make'),
  ],
)
def test_a_forbidden_import_is_found(name, source):
  names = {
    'mixers.attention',
    'mixers.base',
    'mixers.kda',
    'train.step',
    'layers.proj',
  }
  assert list(_faults(name, source, names))
