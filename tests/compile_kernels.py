"""Compiles every kernel with its gradients for every TPU, without one.

  python -m tests.compile_kernels [--write]

prints a table of what the compiler takes and asks for, one row a rule, shape
and chip; --write stores it in docs/kernels.md. It needs libtpu
(requirements-tpu.txt). One process a program: an error of the compiler may end
the process.
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


def lower(name, device):
  """The program of a shape, for a device that need not be there."""
  import jax
  import jax.numpy as jnp

  rule, J, H, K, V, dtype = SHAPES[name]
  run = importlib.import_module(f'deltanet_jax.kernels.{rule}_tpu').run
  place = jax.sharding.SingleDeviceSharding(device)
  shape = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(
    (1, TOKENS, *sizes), dtype, sharding=place
  )
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


def compile_row(name, topology):
  """A row of the table."""
  from jax.experimental import topologies

  (device, *_) = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  compiled = lower(name, device).compile()
  text = compiled.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2, text
  rule, J, H, K, V, dtype = SHAPES[name]
  held = compiled.memory_analysis().temp_size_in_bytes / 2**20
  chip = topology.split(':')[0]
  return (
    f'| {name} | {rule} | {J}/{H} | {K}/{V} | {dtype} | {chip} | {held:.0f} |'
  )


def compile_alone(name, topology):
  """`compile_row` in a process of its own."""
  row = [sys.executable, '-m', 'tests.compile_kernels', '--row', name, topology]
  done = subprocess.run(row, cwd=ROOT, text=True, capture_output=True)
  if done.returncode:
    raise RuntimeError(f'{name} for {topology}: {done.stderr.strip()}')
  return done.stdout.strip().splitlines()[-1]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--write', action='store_true')
  parser.add_argument('--row', nargs=2)
  args = parser.parse_args()
  os.environ.update(ENVIRONMENT)
  if args.row:
    return print(compile_row(*args.row))
  rows = []
  for name in SHAPES:
    for topology in TOPOLOGIES:
      rows.append(compile_alone(name, topology))
      print(rows[-1], flush=True)
  if args.write:
    version = importlib.metadata.version
    before, _, _ = PAGE.read_text().partition(MARK)
    head = (
      f'jax {version("jax")}, libtpu {version("libtpu")}; a row of {TOKENS:,}'
      ' tokens, value and all gradients.\n\n'
      '| shape | rule | heads | K/V | type | chip | temporaries, MiB |\n'
      '|---|---|---|---|---|---|---|'
    )
    PAGE.write_text('\n'.join([before + MARK, '', head, *rows, '']))


if __name__ == '__main__':
  main()
