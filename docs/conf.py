"""The site of these pages, which read on a code host too.

  pip install -e '.[docs]'
  python -m sphinx -W -n --keep-going docs docs/_build

`-D nb_execution_mode=force` also runs the notebooks; without it their stored
outputs are shown. Nothing on the site is fetched from elsewhere.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import made

project = 'deltanet_jax'
author = 'the deltanet_jax contributors'
project_copyright = author
release = version = made.read_version()

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.viewcode',
]
exclude_patterns = ['README.md', '_build', '**.ipynb_checkpoints']
# as on a code host: $...$, [text](#heading)
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

nb_execution_mode = 'off'
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_typehints = 'none'  # the docstrings have shapes and types
autodoc_member_order = 'bysource'
add_module_names = False

pygments_dark_style = 'monokai'
html_theme = 'furo'
html_title = f'deltanet_jax {version}'
html_static_path = ['site.css', f'_made/{made.MATHJAX}']
mathjax_path = made.MATHJAX
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False


def setup(app):
  made.write_pages()
  app.connect('source-read', made.read_source)
  app.connect('autodoc-process-docstring', made.lay_out)
