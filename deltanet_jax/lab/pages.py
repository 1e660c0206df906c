"""Renders reports from jinja templates."""

import pathlib

import jinja2


def render_page(path: pathlib.Path, **values: object) -> str:
  """The rendered template; values are escaped in HTML."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(path.parent),
    autoescape=path.name.endswith('.html.jinja'),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
  )  # fmt: skip
  return environment.get_template(path.name).render(**values)
