"""The forms of a rule, with those written for one backend, and which is taken.

`ops/<rule>.py` has the rule's own forms; a module `kernels/<rule>_tpu.py`, if
there is one, adds a `FORMS` of functions with the same arguments and results.
`ops` does not import it. `config.forms` has the names.

The form 'kernel' is for TPUs; `ops/README.md`, section 8, says what it covers.
On another platform it is refused, except under `tpu.interpret(True)`, for
tests. The form 'auto', the default of the functions of `deltanet_jax` and of a
mixer's configuration, is 'kernel' on a TPU where the kernel's module `covers`
the arguments, else 'chunked'.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType

import jax

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer
from deltanet_jax.ops.documents import Inputs
from deltanet_jax.parallel.choice import Choice, choose

# the platform that a form is for, and its name
PLATFORMS = {
  'kernel': ('tpu', 'TPUs'),
  'splash': ('tpu', 'TPUs'),
  'cudnn': ('gpu', 'NVIDIA GPUs'),
}
_taken: ContextVar[dict[str, str]] = ContextVar('taken')


def forms(rule: ModuleType) -> dict[str, Callable]:
  """Returns the forms of a module of `ops` by name, then those of kernels."""
  kernel = _find_kernel(rule)
  return rule.FORMS if kernel is None else rule.FORMS | kernel.FORMS


def choose_form(
  form: str,
  rule: ModuleType,
  inputs: Inputs,
  gates: Mapping[str, jax.Array | None],
  device: jax.Device | None = None,
) -> str:
  """Returns `form`, or what 'auto' stands for.

  inputs, gates: the rule's arrays in its order, and those given by name
  device: where the rule will run; None: on the current mesh, or by default
  """
  if form != 'auto':
    return form
  if find_choice(device).kernels and (kernel := _find_kernel(rule)):
    return 'kernel' if kernel.covers(*inputs, **gates) else 'chunked'
  return 'chunked'


def find_choice(device: jax.Device | None) -> Choice:
  """The choices for a device; None: for the current mesh, or by default."""
  mesh = jax.sharding.get_abstract_mesh()
  return choose(device or (None if mesh.empty else mesh.abstract_device))


@contextlib.contextmanager
def collect_forms() -> Iterator[dict[str, str]]:
  """Yields a dict that receives the forms taken by mixers that are traced:
  {'GatedDeltaNet': 'kernel'}."""
  taken: dict[str, str] = {}
  token = _taken.set(taken)
  try:
    yield taken
  finally:
    _taken.reset(token)


def report_form(mixer: str, form: str) -> None:
  """Adds to what `collect_forms` yields, if it is active."""
  if (taken := _taken.get(None)) is not None:
    found = {*filter(None, taken.get(mixer, '').split(', ')), form}
    taken[mixer] = ', '.join(sorted(found))


def require_platform(layers: Sequence[Layer], platform: str) -> None:
  """Raises:
  ConfigError: a layer's form is for another platform.
  """
  for layer in layers:
    form = getattr(layer.mixer, 'form', '')
    own, name = PLATFORMS.get(form, (platform, ''))
    if own != platform:
      raise ConfigError(
        f"mixer.form is '{form}', which is for {name}, and the devices are"
        f" {platform}; give 'auto'"
      )


def _find_kernel(rule):
  """The module of a rule's kernels, or None."""
  name = f'{__name__}.{rule.__name__.rpartition(".")[2]}_tpu'
  if importlib.util.find_spec(name) is None:
    return None
  return importlib.import_module(name)
