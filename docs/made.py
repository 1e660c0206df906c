"""Pages that the site makes when it is built: those of other folders, and the
reference, from docstrings, sources and `--help`. They go to `docs/_made`."""

import ast
import concurrent.futures
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import deltanet_jax
from deltanet_jax.cli.deltanet import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
MADE = 'docs/_made'
MATHJAX = 'tex-svg.js'  # glyphs and all in one file

# what a link of a page names, on a code host, and the site's page of it
PAGES = {
  'CHANGELOG.md': f'{MADE}/changes.md',
  'CONTRIBUTING.md': f'{MADE}/contributing.md',
  'WORKSPACE.md': f'{MADE}/map.md',
  'configs/README.md': f'{MADE}/presets.md',
  'deltanet_jax/ops/README.md': f'{MADE}/recurrences.md',
  'launch/README.md': f'{MADE}/launching.md',
  'tests/README.md': f'{MADE}/tests.md',
  **{
    f'deltanet_jax/lab/{name}/README.md': f'{MADE}/{name}.md'
    for name in (
      'bench', 'cost', 'dryrun', 'first_steps', 'probes', 'profile',
      'quickstart', 'study',
    )
  },
  'docs/README.md': 'docs/index.md',
  # made below
  'deltanet_jax/__init__.py': f'{MADE}/api.rst',
  'deltanet_jax/cli/deltanet.py': f'{MADE}/commands.md',
  'deltanet_jax/config/experiment.py': f'{MADE}/configuration.md',
}  # fmt: skip
LINK = re.compile(r'\]\(([^)\s#:]+)(#[^)\s]*)?\)')


def read_version():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
    'version'
  ]


def write_pages():
  for source, page in PAGES.items():
    if source.endswith('.md') and page.startswith(MADE):
      text = relink((ROOT / source).read_text(), source, page)
      _write(page, set_equations(text) if 'ops' in source else text)
  _write(f'{MADE}/api.rst', _make_api())
  offline = importlib.util.find_spec('sphinx-mathjax-offline')
  folder = pathlib.Path(offline.origin).parent / 'static' / 'mathjax'
  shutil.copy(folder / MATHJAX, ROOT / MADE)
  _write(f'{MADE}/commands.md', _make_commands())
  _write(f'{MADE}/configuration.md', _make_configuration())


def _write(page, text):
  """Only what changed, or all pages would be built again."""
  path = ROOT / page
  path.parent.mkdir(exist_ok=True)
  if not path.exists() or path.read_text() != text:
    path.write_text(text)


def relink(text, source, page):
  """The text of the file `source` with its links as `page` needs them; both
  are paths from the root."""

  def move(match):
    target = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
    target = PAGES.get(target, target)
    link = os.path.relpath(target, os.path.dirname(page))
    return f']({link}{match[2] or ""})'

  return LINK.sub(move, text)


def read_source(app, docname, content):
  """The text of a page when Sphinx reads it. The first page is README.md."""
  page = f'docs/{docname}.md'
  if docname == 'index':
    readme = (ROOT / 'docs/README.md').read_text()
    content[0] = readme + '\n' + content[0]
  if docname == 'index' or (ROOT / page).exists() and MADE not in page:
    content[0] = relink(content[0], page, page)


# the reference


def _make_commands():
  as_installed = (
    "import sys; sys.argv[0] = 'deltanet'\n"
    'from deltanet_jax.cli.deltanet import main\nmain()'
  )

  def show_help(name):
    done = subprocess.run(
      [sys.executable, '-c', as_installed, name, '--help'],
      cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    return re.sub(
      r'^deltanet_jax\..*:$', 'Flags:', done.stdout.strip(), flags=re.M
    )

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    helps = list(pool.map(show_help, COMMANDS))
  lines = [
    '# Commands',
    '`deltanet NAME` is `python -m launch.NAME` of a clone. What follows is'
    ' what `--help` says.',
  ]
  for (name, (_, about)), text in zip(COMMANDS.items(), helps, strict=True):
    lines += [f'## {name}', f'{about[0].upper()}{about[1:]}.']
    lines += [f'```text\n{text}\n```']
  return '\n\n'.join(lines) + '\n'


CONFIGURATIONS = {
  'A run': 'experiment',
  'Mixers': 'mixers',
  'What training minimizes': 'objectives',
  'Sampling': 'sampling',
}


def _make_configuration():
  """The dataclasses of configurations, as their sources have them."""
  lines = [
    '# Configuration',
    'Every field is set on the command line by its path, as'
    ' `--config.train.steps=100`. A type like `Count` also says which numbers'
    ' will do (`deltanet_jax/config/ranges.py`).',
  ]
  for title, module in CONFIGURATIONS.items():
    lines.append(f'## {title}')
    text = (ROOT / f'deltanet_jax/config/{module}.py').read_text()
    for node in ast.parse(text).body:
      if not isinstance(node, ast.ClassDef):
        continue
      if node.decorator_list or node.name in deltanet_jax._MODULES:
        lines += [f'### {node.name}', _show_fields(text, node)]
  return '\n\n'.join(lines) + '\n'


def _show_fields(text, node):
  fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
  last = (fields or node.body)[-1].end_lineno
  source = '\n'.join(text.splitlines()[node.lineno - 1 : last])
  return f'```python\n{source}\n```'


API = {
  'Recurrences and attention': ('functional',),
  'Names of flash-linear-attention': ('fla',),
  'Models and mixers': ('model', 'mixers.base'),
  'Weights, runs and text': (
    'hf', 'runs.source', 'infer.generate', 'infer.text', 'config.error',
  ),
}  # fmt: skip


def _make_api():
  lines = ['API', '===', '', '``import deltanet_jax as dn``. The classes of']
  lines += [':doc:`configurations <configuration>` have a page of their own.']
  for title, modules in API.items():
    lines += ['', title, '-' * len(title), '']
    for module in modules:
      for name in _list_names(module):
        kind = 'class' if inspect.isclass(_find(name)) else 'function'
        lines += [f'.. auto{kind}:: {name}', '']
  return '\n'.join(lines)


def _list_names(module):
  """What the front door has of a module, in the order of its source."""
  if module == 'hf':
    return ['deltanet_jax.load_model', 'deltanet_jax.save_model']
  path = ROOT / f'deltanet_jax/{module.replace(".", "/")}.py'
  defined = [
    x.name for x in ast.parse(path.read_text()).body if hasattr(x, 'name')
  ]
  if module == 'fla':
    return [f'deltanet_jax.fla.{name}' for name in defined if name[0] != '_']
  offered = deltanet_jax._NAMES[module].split()
  return [f'deltanet_jax.{name}' for name in defined if name in offered]


def _find(name):
  found = deltanet_jax
  for part in name.split('.')[1:]:
    found = getattr(found, part)
  return found


# equations


NAMES = 'diag|log|softmax|sigmoid|scale|gram|known|scores|lower|mid'
TEX = {
  r'\bbeta\b|\bbeta(?=_)': r'\\beta ',
  r'\b(sum)(?=_|\b)': r'\\sum ',
  rf'\b({NAMES})(?=_)': r'\\mathrm{\1}',
  rf'(?<!mathrm\{{)\b({NAMES})\b': r'\\mathrm{\1}\\,',
  r'\b([A-Z])~': r'\\tilde \1',
  r'\bd(?= ?[A-Zgehk(\\])': r'\\mathrm{d}',
  r'_([a-z]{2,3})\b': r'_{\1}',
  r'\^T\b': r'^\\top ',
  r'\^-1\b': '^{-1}',
  r'<([A-Z]), ([A-Z])>': r'\\langle \1, \2 \\rangle ',
  r'<=': r'\\le ',
  r'>=': r'\\ge ',
  r'\.\.+|…': r'\\ldots ',
  r' \* ': r' \\odot ',
  r'(?<!\\), ': r',\\; ',
}


def make_tex(block):
  """The equations of a block of plain text as TeX, or None for other text.
  Three spaces or more stand before a remark, or another equation."""
  rows = []
  for line in block:
    pieces = re.split(r' {3,}', line.strip())
    tex = [_translate(piece) for piece in pieces]
    alone = rows and len(pieces) == 1 and line.startswith(' ' * 20)
    if tex[0] is None and not alone:
      return None
    if tex[0] is None:
      rows.append(rf'&&& {_remark(pieces[0])}')
      continue
    head, equals, rest = tex[0].partition('=')
    row = f'{head} &= {rest}' if equals else rf'& \quad {head}'
    for piece, more in zip(pieces[1:], tex[1:], strict=True):
      row += f' && {_remark(piece)}' if more is None else rf' \qquad {more}'
    rows.append(row)
  if not any('=' in row for row in rows):
    return None
  inner = ' \\\\\n'.join(rows)
  return f'\\begin{{aligned}}\n{inner}\n\\end{{aligned}}'


def _remark(text):
  return rf'\text{{{text.replace("->", "→")}}}'


def _translate(text):
  """An equation as TeX, None for words."""
  tex = text
  for pattern, to in TEX.items():
    tex = re.sub(pattern, to, tex)
  words = re.sub(r'\\[a-z]+(\{[a-z]+\})?', '', tex)
  if re.search(r'[A-Za-z]{2,}(?![A-Za-z}])|[`"]', words):
    return None
  return tex


def set_equations(text):
  """Markdown whose indented equations are maths."""

  def change(match):
    tex = make_tex(match[0].rstrip('\n').split('\n'))
    return match[0] if tex is None else f'```{{math}}\n{tex}\n```\n'

  return re.sub(r'(?<=\n\n)(?: {4}.*\n)+', change, text)


def lay_out(app, what, name, obj, options, lines):
  """A docstring, which is plain text, as reStructuredText: what is laid out
  by hand stays so."""
  parts, out = re.split(r'\n\s*\n', '\n'.join(lines).rstrip()), []
  for part in parts:
    rows = part.split('\n')
    tex = rows[0].startswith(' ') and make_tex(rows)
    by_hand = re.search(r'^ |\S   ?\S|^\S+ \[[A-Z]|: ', part, re.M)
    if rows[0].startswith('>>> '):
      out += [*rows, '']
    elif tex:
      out += ['.. math::', '', *(f'   {row}' for row in tex.split('\n')), '']
    elif by_hand and part:
      out += ['.. code-block:: text', '', *(f'   {row}' for row in rows), '']
    else:
      text = re.sub(r'(?<!`)`([^`\n]+)`(?!`)', r'``\1``', part)
      text = ''.join(
        piece if i % 2 else re.sub(r'([*|_\\])', r'\\\1', piece)
        for i, piece in enumerate(re.split(r'(``[^`]+``)', text))
      )
      out += [*text.split('\n'), '']
  lines[:] = out
