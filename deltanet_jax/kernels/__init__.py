"""The forms of a rule, those of other backends among them.

`ops/<rule>.py` has the rule's own forms. A module `kernels/<rule>_tpu.py`,
where there is one, has more in a `FORMS` of the same kind: same arguments, same
results. `ops` knows nothing of these. Their names are in `config.forms`.

There is 'kernel', for TPUs, of the delta rule and of KDA: asked for by
`form='kernel'`, in a function of `deltanet_jax` or a mixer's configuration.
What it covers and how it is made: `ops/README.md`, section 8. Elsewhere it is
refused, but in a test, as `with tpu.interpret(True):` has it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


def forms(rule: ModuleType) -> dict[str, Callable]:
  """The forms of a module of `ops` by name: its own, then the kernels'."""
  name = f'{__name__}.{rule.__name__.rpartition(".")[2]}_tpu'
  if importlib.util.find_spec(name) is None:
    return rule.FORMS
  return rule.FORMS | importlib.import_module(name).FORMS
