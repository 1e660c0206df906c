"""Reports from jinja templates, which lie beside the modules that fill them."""

import pathlib

import jinja2


def render_page(path: pathlib.Path, **values: object) -> str:
  """The text of a template; into a page of HTML values are put escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(path.parent),
    autoescape=path.name.endswith('.html.jinja'),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
  )  # fmt: skip
  return environment.get_template(path.name).render(**values)
