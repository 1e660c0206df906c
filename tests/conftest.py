"""Every test runs on the CPU, as 8 simulated devices."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def quick_compile():
  """For tests whose time is XLA's: many programs, each run once."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
