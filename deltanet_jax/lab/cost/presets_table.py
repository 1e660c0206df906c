"""The table of configs/README.md: every preset's size, from its shapes."""

from deltanet_jax.lab.cost import arguments, calc, report

LONG = 2**24  # tokens; no window is as long

HEAD = """\
# Presets

One file, one run; `python -m launch.presets` writes this page. Of each model:
its layers, its parameters and, where experts are chosen, how many of them work
on a token; what the cache of one sequence grows by with a token, in bfloat16;
what it holds beside that whatever the context: states in float32, inputs of the
convolutions, windows. Each slot of an attention layer also keeps its position,
4 bytes, not counted here. `python -m launch.calc --preset=NAME` has the rest.

| preset | | layers | parameters | B / token | constant, MiB |
|---|---|---|---|---|---|
"""


def text(rows):
  return HEAD + '\n'.join(rows) + '\n'


def row(name):
  """The line of a file of configs/."""
  cfg = arguments.preset(name)
  parameters, active = calc.parameters(cfg), calc.active_parameters(cfg)
  used = '' if active == parameters else f', a token {active:,}'
  size, more = (_without_positions(cfg, n) for n in (LONG, LONG + 1))
  constant = (size - LONG * (more - size)) / 2**20
  kinds = report.pattern(report.kinds(cfg))
  about = arguments.about(name).rstrip('.')
  return (
    f'| `{name}` | {about} | {kinds} | {parameters:,}{used} |'
    f' {more - size:,} | {constant:.1f} |'
  )


def _without_positions(cfg, n):
  parts = calc.cache_parts(cfg, n, 1, 'bfloat16').values()
  return sum(sum(x.values()) - x.get('positions', 0) for x in parts)
