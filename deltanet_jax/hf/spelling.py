"""Names of the tensors of a family in a folder.

Prefixes differ: a text model inside a larger one or wrapped by a trainer
(model.language_model., language_model.model.), or saved without its head (no
prefix). The prefix is taken from the name of the embedding.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from deltanet_jax.hf.common import Family

_INNER, _TABLE = 'model.', 'embed_tokens.weight'
# buffers that older versions of the classes stored
_BUFFERS = re.compile(
  r'(.*\.)?(rotary_emb\.((\w+_)?inv_freq|(cos|sin)_cached)'
  r'|(self_attn|attention|attn)\.masked_bias|position_ids|slope_rate)'
)


class Spelling:
  """The names of a family in a folder.   names: of the folder, set or dict"""

  def __init__(self, family: Family, names: Collection[str]):
    self._family, self._names = family, names
    tables = [
      name.removesuffix(_TABLE)
      for name in names
      if name == _TABLE or name.endswith(f'.{_TABLE}')
    ]
    layers = lambda before: sum(n.startswith(f'{before}layers.') for n in names)
    rank = lambda before: (layers(before), before == _INNER)
    self._prefix = max(tables, key=rank, default=_INNER)
    parts = self._prefix.split('.')
    # the head is beside the inner model or an outer one
    self._outer = ['.'.join([*parts[:i], '']) for i in range(len(parts))]

  def find(self, name: str) -> str | None:
    """The name of a released tensor in the folder, or None."""
    if self._prefix == _INNER and name in self._names:
      return name  # the usual case
    return next((x for x in self._forms(name) if x in self._names), None)

  def choose_name(self, name: str) -> str:
    """The name of a released tensor in the folder, whether it exists or not."""
    return self.find(name) or next(self._forms(name))

  def count(self, names: Iterable[str]) -> tuple[bool, int]:
    """(whether the folder has all `names`, how many it has)."""
    present = [name in self._names for name in names]
    return all(present), sum(present)

  def is_needless(self, name: str) -> bool:
    """Whether a tensor is not needed: another part of a larger model, or a
    buffer."""
    if _BUFFERS.fullmatch(name):
      return True
    rests = [
      name.removeprefix(outer)
      for outer in self._outer
      if name.startswith(outer)
    ]
    forms = [form for rest in rests for form in (rest, _INNER + rest)]
    ignored = self._family.ignored
    return any(re.fullmatch(p, form) for p in ignored for form in forms)

  def _forms(self, name: str) -> Iterator[str]:
    spellings = self._family.spellings
    for form in (name, *(re.sub(p, other, name) for p, other in spellings)):
      if form.startswith(_INNER):
        yield self._prefix + form.removeprefix(_INNER)
      else:
        yield from (outer + form for outer in self._outer)
