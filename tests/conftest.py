"""Every test runs on the CPU, as 8 simulated devices."""

import json
import os
import warnings

os.environ['JAX_PLATFORMS'] = 'cpu'
# the commands under test keep nothing in anyone's home
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', '')
_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def dropped_programs():
  """Drops the compiled programs of a module's tests. Each takes some 40 of the
  65,530 areas of memory that Linux lets a process have; where they run out the
  compiler dies."""
  yield
  jax.clear_caches()


@pytest.fixture
def quick_compile():
  """For tests whose time is XLA's: many programs, each run once."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def read_config(tmp_path):
  """Reads a dict as config.json: (model or error, what was warned of)."""
  from deltanet_jax.config import ConfigError
  from deltanet_jax.hf import families

  def run(found):
    (tmp_path / 'config.json').write_text(json.dumps(found))
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      try:
        result = families.read_config(tmp_path)[1]
      except ConfigError as error:
        result = error
        assert str(tmp_path) in str(error) and '\n' not in str(error)
    lines = [str(warning.message) for warning in caught]
    assert len(lines) < 2 and not any('\n' in line for line in lines)
    return result, ''.join(lines)

  return run
