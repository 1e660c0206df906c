"""Every public function is annotated, and the annotations are true."""

import ast
import collections
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'deltanet_jax'

# instruments, whose figures are made by hand
UNTYPED = ('lab',)


def _files(root, without=()):
  """(name, path) of the Python files, but for those of some folders."""
  for path in sorted(root.rglob('*.py')):
    name = path.relative_to(root).with_suffix('')
    if name.parts[0] not in without:
      yield '.'.join(name.parts), path


def _is_public(name):
  return not name.startswith('_') or name in ('__init__', '__call__')


def _names_any(annotation):
  """True if an annotation, also a quoted one, contains `Any`."""
  for node in ast.walk(annotation):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if _names_any(ast.parse(node.value, mode='eval')):
        return True
    if isinstance(node, ast.Name) and node.id == 'Any':
      return True
    if isinstance(node, ast.Attribute) and node.attr == 'Any':
      return True
  return False


def _arguments(function):
  a = function.args
  star = [x for x in (a.vararg, a.kwarg) if x is not None]
  return [*a.posonlyargs, *a.args, *a.kwonlyargs, *star]


def _function_faults(function, method):
  arguments = _arguments(function)
  static = any(
    ast.unparse(d) == 'staticmethod' for d in function.decorator_list
  )
  if method and not static:
    arguments = arguments[1:]  # self or cls
  places = [(argument.arg, argument.annotation) for argument in arguments]
  if function.name != '__init__':
    places.append(('what it returns', function.returns))
  for name, annotation in places:
    if annotation is None:
      yield f'{function.name}: {name} has no type'
    elif _names_any(annotation):
      yield f'{function.name}: {name} may be anything'


def _faults(source):
  """Public names of a source without a type, or with one that says nothing."""
  functions = ast.FunctionDef | ast.AsyncFunctionDef
  for node in ast.parse(source).body:
    if isinstance(node, functions) and _is_public(node.name):
      yield from _function_faults(node, method=False)
    if not isinstance(node, ast.ClassDef) or not _is_public(node.name):
      continue
    for part in node.body:
      if isinstance(part, functions) and _is_public(part.name):
        for fault in _function_faults(part, method=True):
          yield f'{node.name}.{fault}'
      if isinstance(part, ast.AnnAssign) and _names_any(part.annotation):
        yield f'{node.name}.{ast.unparse(part.target)} may be anything'


def test_everything_public_has_types():
  files = dict(_files(PACKAGE, UNTYPED))
  assert {'config.load', 'data.text', 'runs.source', 'progress'} <= set(files)
  faults = {
    name: found
    for name, path in files.items()
    if (found := list(_faults(path.read_text())))
  }
  assert not faults


@pytest.mark.parametrize(
  'source',
  [
    'def f(x) -> int: ...',
    'def f(x: int): ...',
    'def f(*xs) -> int: ...',
    'def f(*, x=1) -> int: ...',
    'def f(x: Any) -> int: ...',
    'def f(x: dict[str, typing.Any]) -> int: ...',
    "def f(x: 'list[Any]') -> int: ...",
    'def f() -> Callable[..., Any]: ...',
    'class C:\n  def f(self, x) -> int: ...',
    'class C:\n  def __init__(self, x): ...',
    'class C:\n  @staticmethod\n  def f(x) -> int: ...',
    'class C:\n  @property\n  def f(self): ...',
    'class C(NamedTuple):\n  x: Any',
  ],
)
def test_what_has_no_type_is_found(source):
  assert list(_faults(source))


def test_what_is_private_or_typed_is_let_be():
  source = """
def _f(x): ...
def f(x: int, *rest: str) -> 'list[int]':
  def inner(y): ...
class _C:
  def f(self, x): ...
class C:
  x: int
  def __init__(self, x: int): ...
  def __len__(self): ...
  def _f(self, x): ...
  @classmethod
  def f(cls, x: int) -> None: ...
"""
  assert not list(_faults(source))


def test_no_two_public_classes_have_one_name():
  places = collections.defaultdict(list)
  for name, path in _files(PACKAGE):
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        places[node.name].append(name)
  assert len(places) > 20
  assert not {name: where for name, where in places.items() if len(where) > 1}


def _renamed(source, modules):
  """Modules of the package that a source imports under another name."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      prefix = f'{node.module}.' if isinstance(node, ast.ImportFrom) else ''
      for alias in node.names:
        # the package is dn; `x as x` tells a type checker that x is offered
        if (
          alias.asname not in (None, alias.name)
          and alias.name not in ('__main__', 'deltanet_jax')
          and f'{prefix}{alias.name}' in modules
        ):
          yield f'{prefix}{alias.name} as {alias.asname}'


def test_no_module_is_renamed_where_it_is_imported():
  modules = {'deltanet_jax'}
  for path in PACKAGE.rglob('*.py'):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    modules.add(name.removesuffix('.__init__'))
  for source in (
    'from deltanet_jax.train import log, step as steps',
    'import deltanet_jax.train.step as steps',
    'def f():\n  from deltanet_jax import config as c',
  ):
    assert list(_renamed(source, modules))
  assert not list(_renamed('from deltanet_jax.hf import load as f', modules))
  faults = {
    path: found
    for root in (PACKAGE, ROOT / 'tests')
    for _, path in _files(root)
    if (found := list(_renamed(path.read_text(), modules)))
  }
  assert not faults


def _mypy(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'mypy', '--config-file=pyproject.toml', *arguments],
    cwd=ROOT,
    env=os.environ | {'MYPYPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_the_types_are_true():
  done = _mypy()
  faults = [line for line in done.stdout.splitlines() if ': error: ' in line]
  assert 'source files' in done.stdout, done.stdout + done.stderr
  assert not faults


RIGHT = """
from deltanet_jax import config
from deltanet_jax.config.experiment import DataConfig
from deltanet_jax.data.text import TextData
from deltanet_jax.evals import repeats

data = TextData(DataConfig(path='*.txt', seq_len=8, batch=2))
batch = data.make_batch(3)
experiment = config.load('qwen3:8b')
changed = config.override_field(experiment, 'train.steps', '3')
distance = repeats.find_earlier(batch['tokens'], batch['segment_ids'], 2)
steps: int = changed.train.steps
"""


@pytest.mark.slow
def test_right_calls_are_accepted(tmp_path):
  file = tmp_path / 'calls.py'
  file.write_text(RIGHT)
  done = _mypy(str(file))
  assert 'calls.py' not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  'right, wrong',
  [
    ("'qwen3:8b'", '3'),
    ("DataConfig(path='*.txt', seq_len=8, batch=2)", "'*.txt'"),
    ("path='*.txt'", "path=['*.txt']"),
    ('make_batch(3)', "make_batch('3')"),
    ('override_field(experiment, ', "override_field('experiment', "),
    ("['segment_ids'], 2)", "['segment_ids'], '2')"),
    ('steps: int', 'steps: str'),
    ('data.make_batch', 'data.batch'),
  ],
)
def test_a_wrong_call_is_refused(tmp_path, right, wrong):
  file = tmp_path / 'calls.py'
  assert right in RIGHT
  file.write_text(RIGHT.replace(right, wrong))
  done = _mypy(str(file))
  assert done.returncode == 1
  assert 'calls.py:' in done.stdout and 'error: ' in done.stdout
