"""What a number or a word of a configuration may be: said in its field's
annotation, checked where the configuration is made.

    rate: Positive = 1e-3
    window: Count | None = None

Standard library only, and nothing of the package.
"""

import dataclasses
import functools
import typing
from typing import Annotated, ClassVar, NamedTuple, Protocol

# what a whole number, and the size of a number, may be on a device
LARGEST_INT = 2**31 - 1
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


class Configuration(Protocol):
  """A dataclass."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


class Range(Protocol):
  """What an annotation holds."""

  def advise(self, value: object) -> str | None:
    """What to give instead of `value`, or None where it will do."""


class Whole(NamedTuple):
  """A whole number in a range; or `other`."""

  least: int
  most: int | None = LARGEST_INT  # None: any
  other: int | None = None

  def advise(self, value: object) -> str | None:
    """What to give instead of `value`, or None where it will do."""
    if not isinstance(value, int) or isinstance(value, bool):
      return 'a whole number'
    if value == self.other:
      return None
    if value < self.least:
      other = '' if self.other is None else f', or {self.other}'
      return f'{self.least} or more{other}'
    if self.most is not None and value > self.most:
      return f'{self.most} or less'
    return None


class Doubled(NamedTuple):
  """A number, twice it, four times it and so on."""

  base: int

  def advise(self, value: object) -> str | None:
    """What to give instead of `value`, or None where it will do."""
    b = self.base
    if isinstance(value, int) and Whole(1).advise(value) is None:
      times, rest = divmod(value, b)
      if not (rest or times & (times - 1)):
        return None
    return f'{b}, {2 * b}, {4 * b} or another {b} * 2^n'


class Real(NamedTuple):
  """A number in a range, its ends included."""

  words: str
  least: float
  most: float

  def advise(self, value: object) -> str | None:
    """What to give instead of `value`, or None where it will do."""
    if not isinstance(value, int | float) or isinstance(value, bool):
      return f'a number, {self.words}'
    return None if self.least <= value <= self.most else self.words


class OneOf(NamedTuple):
  """One of some words."""

  words: tuple[str, ...]

  def advise(self, value: object) -> str | None:
    """What to give instead of `value`, or None where it will do."""
    return None if value in self.words else f'one of {", ".join(self.words)}'


# numbers above 0 that float32 takes for 0, or below 1 that it takes for 1, are
# none: what is trained in float32 would not know them
Count = Annotated[int, Whole(1)]
Size = Annotated[int, Whole(0)]
Finite = Annotated[float, Real('one that float32 holds', -LARGEST, LARGEST)]
Positive = Annotated[
  float, Real('more than 0, as far as float32 goes', SMALLEST, LARGEST)
]
NotNegative = Annotated[
  float, Real('0 or more, as far as float32 goes', 0.0, LARGEST)
]
Negative = Annotated[
  float, Real('less than 0, as far as float32 goes', -LARGEST, -SMALLEST)
]
BelowOne = Annotated[
  float, Real('0 or more and, in float32, less than 1', 0.0, 1 - 2.0**-24)
]


def check_ranges(cfg: Configuration, name: str | None = None) -> None:
  """Refuses what a dataclass holds outside of its fields' ranges.

  name: of the configuration in messages, its class's unless given. Whole
  numbers in the place of others become such: a device's are shorter.

  Raises:
    ValueError: with the field, what it holds and what to give.
  """
  for field, kind, several in _list_ranges(type(cfg)):
    content = getattr(cfg, field)
    if several and not isinstance(content, tuple):
      continue  # whoever reads the file says so
    for i, value in enumerate(content) if several else ((None, content),):
      if value is None and kind.optional:
        continue
      if advice := kind.range.advise(value):
        where = f'{field}.{i}' if several else field
        or_none = ', or None' if kind.optional else ''
        raise ValueError(
          f'{name or type(cfg).__name__}.{where} is {value!r}; give'
          f' {advice}{or_none}'
        )
    if isinstance(content, int) and isinstance(kind.range, Real):
      object.__setattr__(cfg, field, float(content))  # it is frozen


class _Kind(NamedTuple):
  range: Range
  optional: bool


@functools.cache
def _list_ranges(kind: type) -> list[tuple[str, _Kind, bool]]:
  """[(field, _Kind, whether it is a tuple of such)] of a dataclass."""
  hints = typing.get_type_hints(kind, include_extras=True)
  ranges = []
  for field in dataclasses.fields(kind):
    hint = hints[field.name]
    several = typing.get_origin(hint) is tuple
    options = typing.get_args(hint)[:1] if several else (hint,)
    if typing.get_origin(options[0]) is typing.Union:
      options = typing.get_args(options[0])
    marks = [o.__metadata__[0] for o in options if hasattr(o, '__metadata__')]
    if marks:
      field_kind = _Kind(marks[0], type(None) in options)
      ranges.append((field.name, field_kind, several))
  return ranges
