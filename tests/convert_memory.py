"""Measures the memory of a conversion, both ways.

  python -m tests.convert_memory --gigabytes=3 --folder=/tmp/measure

Makes a released folder of that size in many files (a Qwen3-MoE of random bits,
256 experts a layer) under a folder that must not exist, converts it to Orbax
and back in a process each, prints the largest resident memory that the
operating system saw, compares the files and removes all of it. Exit status 1: a
process took more than a quarter of the size, or a file differs.
"""

import argparse
import filecmp
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from deltanet_jax.hf import families, keys, plan, store
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding

LAYER_BYTES = 256 * 3 * 1024 * 512 * 2
CONFIG = {
  'model_type': 'qwen3_moe',
  'vocab_size': 32_000,
  'hidden_size': 1024,
  'num_attention_heads': 16,
  'num_key_value_heads': 4,
  'head_dim': 64,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e6,
  'num_experts': 256,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 512,
  'norm_topk_prob': True,
  'tie_word_embeddings': False,
}


def write(folder, layers, shard_bytes=200_000_000):
  """A released folder of random bits; returns its bytes."""
  family = families.get_family('qwen3_moe')
  config = CONFIG | {'num_hidden_layers': layers}
  cfg = family.read_config(keys.ConfigKeys(config))
  entries = plan.build_plan(
    family, cfg, sharding.make_abstract_params(HybridLM(cfg))
  )
  kind = np.dtype(ml_dtypes.bfloat16)
  described = {entry.name: (kind, entry.shape) for entry in entries}
  noise = np.random.default_rng(0)

  def bits(name):
    shape = described[name][1]
    found = noise.integers(0, 2**16, math.prod(shape), np.uint16)
    return (found & 0xBFFF).view(kind).reshape(shape)  # no inf, no nan

  folder.mkdir(parents=True)
  store.write_files(folder, described, bits, shard_bytes)
  (folder / 'config.json').write_text(json.dumps(config))
  return sum(file.stat().st_size for file in folder.iterdir())


def convert(source, target):
  """Peak resident bytes and seconds of launch.convert in its own process."""
  command = [sys.executable, '-m', 'launch.convert']
  command += [f'--from={source}', f'--to={target}']
  start = time.monotonic()
  process = subprocess.Popen(command)
  _, status, used = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f'launch.convert failed: {status}')
  return used.ru_maxrss * 1024, time.monotonic() - start


def measure(folder, gigabytes):
  """Whether both ways stay under a quarter and give the same files."""
  layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
  size = write(folder / 'released', layers)
  print(f'{size / 1e9:.2f} GB, largest tensor 0.07 GB', flush=True)
  there = convert(folder / 'released', folder / 'orbax')
  back = convert(folder / 'orbax', folder / 'back')
  for label, (peak, seconds) in {'to Orbax': there, 'back': back}.items():
    print(
      f'{label:10} {peak / 1e9:.2f} GB resident, {peak / size:.0%} of it,'
      f' {seconds:.0f} s'
    )
  names = [path.name for path in (folder / 'released').glob('*.safetensors')]
  _, differ, missing = filecmp.cmpfiles(
    folder / 'released', folder / 'back', names, shallow=False
  )
  print(f'{len(names)} files, {len(differ) + len(missing)} differ')
  return max(there[0], back[0]) < size / 4 and not differ and not missing


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--gigabytes', type=float, default=3)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  args = parser.parse_args()
  if args.folder.exists():
    raise SystemExit(f'error: --folder={args.folder} exists; give a new one')
  try:
    return 0 if measure(args.folder, args.gigabytes) else 1
  finally:
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == '__main__':
  sys.exit(main())
