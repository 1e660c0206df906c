"""Compiles the recurrences for an H100, without one, and counts what it starts.

  python -m tests.count_launches [--write]

prints a table of kernel launches and temporaries, one row a rule and form;
--write stores it in docs/launches.md. It needs requirements-cuda.txt. One
process a program: compiling one takes from seconds to minutes.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs/launches.md'
MARK = '<!-- python -m tests.count_launches --write -->'
TOKENS, HEADS, WIDTH = 16384, 16, 128
RULES = 'delta_rule', 'kda', 'linear_attention'
# form, chunk
FORMS = ('chunked', 64), ('tree', 64), ('tree', 128)
# the card as XLA describes it (stream_executor/device_description.proto)
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84942979072
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# start nothing on the card
FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'call', 'conditional', 'after-all', 'opt-barrier', 'add-dependency',
  'partition-id', 'replica-id', 'async-start',
}  # fmt: skip


def count_launches(text):
  """Kernels and copies that a compiled program starts: those of a loop as often
  as it runs."""
  from deltanet_jax.lab.dryrun import hlo

  return sum(
    step.times
    for step in hlo.list_steps(hlo.parse_program(text))
    if step.computation == step.home
    and step.instruction.op not in FREE
    and not step.instruction.op.endswith('-done')
  )


def lower(rule, form, chunk, backward, device, tokens=TOKENS):
  """The program of a form: one row, 16 heads of 128, q, k and v in bfloat16."""
  import jax
  import jax.numpy as jnp

  forms = importlib.import_module(f'deltanet_jax.ops.{rule}').FORMS
  run = functools.partial(forms[form], chunk=chunk)
  place = jax.sharding.SingleDeviceSharding(device)
  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
    shape, dtype, sharding=place
  )
  head = 1, tokens, HEADS
  gates = {
    'linear_attention': (array(HEADS),),  # Lightning's
    'delta_rule': (array(*head), array(*head)),
    'kda': (array(*head), array(*head, WIDTH)),
  }[rule]
  inputs = (*(array(*head, WIDTH, dtype=jnp.bfloat16) for _ in 'qkv'), *gates)

  def loss(*inputs):
    o, last = run(*inputs)
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(last**2)

  grad = jax.value_and_grad(loss, argnums=range(len(inputs)))
  return jax.jit(grad if backward else run).lower(*inputs)


def count_row(rule, form, chunk):
  """A row of the table."""
  from jax.experimental import topologies

  (device,) = topologies.get_topology_desc(
    'one', 'cuda', target_config=H100, topology='1x1x1'
  ).devices
  launches, held = [], []
  for backward in (False, True):
    compiled = lower(rule, form, int(chunk), backward, device).compile()
    launches.append(f'{count_launches(compiled.as_text()):,}')
    size = compiled.memory_analysis().temp_size_in_bytes
    held.append(f'{size / 2**20:,.0f}')
  return '| ' + ' | '.join([rule, form, str(chunk), *launches, *held]) + ' |'


def count_alone(rule, form, chunk):
  """`count_row` in a process of its own."""
  row = [rule, form, str(chunk)]
  done = subprocess.run(
    [sys.executable, '-m', 'tests.count_launches', '--row', *row],
    cwd=ROOT,
    text=True,
    capture_output=True,
  )
  if done.returncode:
    raise RuntimeError(f'{" ".join(row)}: {done.stderr.strip()}')
  return done.stdout.strip().splitlines()[-1]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--write', action='store_true')
  parser.add_argument('--row', nargs=3)
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'  # or jax looks for a card
  if args.row:
    return print(count_row(*args.row))
  rows = []
  for rule in RULES:
    for form, chunk in FORMS:
      rows.append(count_alone(rule, form, chunk))
      print(rows[-1], flush=True)
  if args.write:
    version = importlib.metadata.version
    before, _, _ = PAGE.read_text().partition(MARK)
    head = (
      f'jax {version("jax")}, CUDA {version("nvidia-cuda-nvcc")},'
      f' {datetime.date.today()}; one row of {TOKENS:,} tokens, {HEADS} heads'
      f' of {WIDTH}, bfloat16.\n\n'
      '| rule | form | chunk | launches, forward | with gradients'
      ' | temporaries, forward, MiB | with gradients, MiB |\n'
      '|---|---|---|---|---|---|---|'
    )
    PAGE.write_text('\n'.join([before + MARK, '', head, *rows, '']))


if __name__ == '__main__':
  main()
