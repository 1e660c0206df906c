"""The forms of a rule, with those written for one backend.

`ops/<rule>.py` has the rule's own forms; a module `kernels/<rule>_tpu.py`, if
there is one, adds a `FORMS` of functions with the same arguments and results.
`ops` does not import it. `config.forms` has the names.

The form 'kernel' is for TPUs: `form='kernel'` of a function of `deltanet_jax`
or of a mixer's configuration. `ops/README.md`, section 8, says what it covers.
On another platform it is refused, except under `tpu.interpret(True)`, for
tests.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import Layer


def forms(rule: ModuleType) -> dict[str, Callable]:
  """Returns the forms of a module of `ops` by name, then those of kernels."""
  name = f'{__name__}.{rule.__name__.rpartition(".")[2]}_tpu'
  if importlib.util.find_spec(name) is None:
    return rule.FORMS
  return rule.FORMS | importlib.import_module(name).FORMS


def require_platform(layers: Sequence[Layer], platform: str) -> None:
  """Raises:
  ConfigError: a layer's form is a kernel, and the platform is no TPU.
  """
  for layer in layers:
    form = getattr(layer.mixer, 'form', None)
    if form == 'kernel' and platform != 'tpu':
      raise ConfigError(
        f"mixer.form is 'kernel', which is for TPUs, and the devices are"
        f" {platform}; give 'chunked'"
      )
