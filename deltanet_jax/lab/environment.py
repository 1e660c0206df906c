"""The device and software of a measurement."""

import os
import platform

import jax

from deltanet_jax.lab.chips import CHIPS

# by device_kind. NVIDIA's data sheets of H100 SXM and H200, without sparsity
_TPUS = {
  'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e', 'TPU7x': 'tpu7x'
}  # fmt: skip
_GPUS = {'NVIDIA H100 80GB HBM3': 989.4e12, 'NVIDIA H200': 989.4e12}


def describe_environment() -> dict[str, str]:
  """Platform, device and jax version."""
  device = jax.devices()[0]
  return {
    'platform': device.platform,
    'device': device.device_kind,
    'jax': jax.__version__,
  }


def find_peak_flops() -> float | None:
  """Peak bfloat16 FLOP/s of a device, None where it is not known."""
  kind = jax.devices()[0].device_kind
  if name := _TPUS.get(kind):
    return CHIPS[name].flops / CHIPS[name].devices
  return _GPUS.get(kind)


def describe_machine() -> str:
  """The device in words; of a CPU its cores too."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  name = platform.processor() or platform.machine()
  try:
    with open('/proc/cpuinfo') as file:
      lines = [line for line in file if line.startswith('model name')]
    name = lines[0].partition(':')[2].strip()
  except (OSError, IndexError):
    pass
  return f'{len(os.sched_getaffinity(0))} cores of {name}'
