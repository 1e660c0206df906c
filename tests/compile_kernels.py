"""Compiles every kernel with its gradients for every TPU, without one.

  python -m tests.compile_kernels [--write]

prints a table of what the compiler takes and asks for, one row a rule, shape
and chip, and one of softmax attention by splash attention and in blocks;
--write stores them in docs/kernels.md. It needs libtpu (requirements-tpu.txt).
One process a row: an error of the compiler may end the process.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys

from deltanet_jax.lab.dryrun.__main__ import ENVIRONMENT

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs/kernels.md'
MARK = '<!-- python -m tests.compile_kernels --write -->'
TOPOLOGIES = 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'
# rule, key heads, value heads, K, V, type
SHAPES = {
  'Qwen3-Next': ('delta_rule', 16, 32, 128, 128, 'bfloat16'),
  'Kimi Linear': ('kda', 32, 32, 128, 128, 'bfloat16'),
  'MiniMax-M1': ('linear_attention', 64, 64, 128, 128, 'bfloat16'),
  'gdn 1p3b': ('delta_rule', 6, 6, 256, 512, 'bfloat16'),
}
TOKENS = 2048
# key heads, query heads, K, V, type
ATTENTION = {
  'Qwen3-Next': (2, 16, 256, 256, 'bfloat16'),
  'Kimi Linear': (32, 32, 192, 128, 'bfloat16'),
  'MiniMax-M1': (8, 64, 128, 128, 'bfloat16'),
  'gdn hybrid_1p3b': (4, 16, 128, 128, 'bfloat16'),
}
ROW = 8192
HEADS = (
  f'a row of {TOKENS:,} tokens, value and all gradients.\n\n'
  '| shape | rule | heads | K/V | type | chip | temporaries, MiB |\n'
  '|---|---|---|---|---|---|---|',
  f'Softmax attention, a row of {ROW:,} tokens with documents, value and all'
  ' gradients: temporaries in MiB by splash attention and, a program of XLA'
  ' alone, in blocks.\n\n'
  '| shape | heads | K/V | type | chip | splash | blocks |\n'
  '|---|---|---|---|---|---|---|',
)


def find_device(topology):
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices[0]


def make_shapes(tokens, dtype, device):
  """A function of sizes: a [1,tokens,*sizes] on a device that need not be
  there."""
  import jax

  place = jax.sharding.SingleDeviceSharding(device)
  return lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(
    (1, tokens, *sizes), dtype, sharding=place
  )


def lower(name, device):
  """The program of a rule's shape."""
  import jax
  import jax.numpy as jnp

  rule, J, H, K, V, dtype = SHAPES[name]
  run = importlib.import_module(f'deltanet_jax.kernels.{rule}_tpu').run
  shape = make_shapes(TOKENS, dtype, device)
  gate = functools.partial(shape, dtype=jnp.float32)
  gates = {
    'linear_attention': (gate(H),),
    'delta_rule': (gate(H), gate(H)),
    'kda': (gate(H), gate(H, K)),
  }[rule]
  inputs = shape(J, K), shape(J, K), shape(H, V), *gates

  def loss(*inputs):
    o, last = run(*inputs)
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(last**2)

  grad = jax.value_and_grad(loss, argnums=range(len(inputs)))
  return jax.jit(grad).lower(*inputs)


def lower_attention(name, device, form):
  """The program of softmax attention in a form."""
  import jax
  import jax.numpy as jnp

  from deltanet_jax.kernels.attention import attend_rows
  from deltanet_jax.ops.attention import Place

  J, H, K, V, dtype = ATTENTION[name]
  shape = make_shapes(ROW, dtype, device)

  def loss(q, k, v, segments):
    at = Place(jnp.arange(ROW, dtype=jnp.int32), segments)
    o = attend_rows(form, q, k, v, at, scale=K**-0.5)
    return jnp.sum(o.astype(jnp.float32) ** 2)

  grad = jax.value_and_grad(loss, argnums=range(3))
  ids = shape(dtype=jnp.int32)
  return jax.jit(grad).lower(shape(H, K), shape(J, K), shape(J, V), ids)


def measure(lowered, kernels):
  """Temporaries in MiB of a program that has so many kernels."""
  compiled = lowered.compile()
  text = compiled.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == kernels, text
  return f'{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}'


def compile_row(table, name, topology):
  """A row of one of the tables."""
  device = find_device(topology)
  if table == 'rule':
    rule, J, H, K, V, dtype = SHAPES[name]
    what, held = [name, rule], [measure(lower(name, device), 2)]
  else:
    J, H, K, V, dtype = ATTENTION[name]
    what = [name]
    held = [
      measure(lower_attention(name, device, form), kernels)
      for form, kernels in (('splash', 3), ('blocks', 0))
    ]
  chip = topology.split(':')[0]
  cells = *what, f'{J}/{H}', f'{K}/{V}', dtype, chip, *held
  return f'| {" | ".join(cells)} |'


def compile_alone(table, name, topology):
  """`compile_row` in a process of its own."""
  row = '--row', table, name, topology
  done = subprocess.run(
    [sys.executable, '-m', 'tests.compile_kernels', *row],
    cwd=ROOT, text=True, capture_output=True,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(f'{name} for {topology}: {done.stderr.strip()}')
  return done.stdout.strip().splitlines()[-1]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--write', action='store_true')
  parser.add_argument('--row', nargs=3)
  args = parser.parse_args()
  os.environ.update(ENVIRONMENT)
  if args.row:
    return print(compile_row(*args.row))
  version = importlib.metadata.version
  text = f'\njax {version("jax")}, libtpu {version("libtpu")}; '
  tables = ('rule', SHAPES), ('attention', ATTENTION)
  for (table, names), head in zip(tables, HEADS, strict=True):
    text += head + '\n'
    for name in names:
      for topology in TOPOLOGIES:
        row = compile_alone(table, name, topology)
        print(row, flush=True)
        text += row + '\n'
    text += '\n'
  if args.write:
    before, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f'{before}{MARK}\n{text.rstrip()}\n')


if __name__ == '__main__':
  main()
