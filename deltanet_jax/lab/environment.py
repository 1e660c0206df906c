"""The device and software of a measurement."""

import os
import platform

import jax


def describe_environment() -> dict[str, str]:
  """Platform, device and jax version."""
  device = jax.devices()[0]
  return {
    'platform': device.platform,
    'device': device.device_kind,
    'jax': jax.__version__,
  }


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
