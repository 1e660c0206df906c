"""Renders the chat template of a release as transformers does."""

import datetime
import functools
import json
from collections.abc import Mapping

from deltanet_jax.config import ConfigError


def render_template(
  path: str, template: str, message: str, tokens: Mapping[str, str]
) -> str:
  """The prompt that a template makes of a user's message.

  path: of the template, for error messages   tokens: {'bos_token': '<s>', ...},
  for the template

  Raises:
    ConfigError: the template refuses the message or fails.
  """
  try:
    return _environment().from_string(template).render(
      messages=[{'role': 'user', 'content': message}],
      tools=None,
      documents=None,
      add_generation_prompt=True,
      **tokens,
    )  # fmt: skip
  except Exception as error:  # a template is a program and may raise anything
    text = ' '.join(str(error).split())
    raise ConfigError(
      f'{path}: chat template: {text or type(error).__name__}'
    ) from error


@functools.cache
def _environment():
  """A sandbox with the tags, filters and functions that templates expect."""
  from jinja2 import TemplateError, nodes
  from jinja2.ext import Extension
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(Extension):
    """{% generation %}: marks answers for training; here only a scope."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      call = self.call_method('_content')
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _content(self, caller):
      return caller()

  def raise_exception(message):
    raise TemplateError(message)

  def tojson(
    x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
  ):
    return json.dumps(
      x,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, 'jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment
