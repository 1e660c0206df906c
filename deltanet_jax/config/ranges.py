"""Allowed values of a configuration's fields: declared in the annotations,
checked when the configuration is created.

    rate: Positive = 1e-3
    window: Count | None = None

Standard library only, and nothing of the package.
"""

import dataclasses
import functools
import typing
from typing import Annotated, ClassVar, NamedTuple, Protocol

# the limits of int32 and of float32's normal numbers, as on a device
LARGEST_INT = 2**31 - 1
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


class Configuration(Protocol):
  """A dataclass."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


class Range(Protocol):
  """What a field's annotation holds."""

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""


class Whole(NamedTuple):
  """A whole number in a range; or `other`."""

  least: int
  most: int | None = LARGEST_INT  # None: any
  other: int | None = None

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""
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
  """base times a power of two: base, 2 base, 4 base and so on."""

  base: int

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""
    b = self.base
    if isinstance(value, int) and Whole(1).advise(value) is None:
      times, rest = divmod(value, b)
      if not (rest or times & (times - 1)):
        return None
    return f'{b}, {2 * b}, {4 * b} or another {b} * 2^n'


class Real(NamedTuple):
  """A number from `least` to `most`, both included."""

  words: str
  least: float
  most: float

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""
    if not isinstance(value, int | float) or isinstance(value, bool):
      return f'a number, {self.words}'
    return None if self.least <= value <= self.most else self.words


class OneOf(NamedTuple):
  """One of some words."""

  words: tuple[str, ...]

  def advise(self, value: object) -> str | None:
    """Says what to give instead of `value`; None where it is allowed."""
    return None if value in self.words else f'one of {", ".join(self.words)}'


# a positive number that float32 rounds to 0, or one below 1 that it rounds to
# 1, is refused
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
  """Checks every field that has a range; an int in a field of floats becomes a
  float.

  name: of the configuration in messages; None: its class's name

  Raises:
    ValueError: names the field, its value and what to give.
  """
  for field, kind, several in _list_ranges(type(cfg)):
    content = getattr(cfg, field)
    if several and not isinstance(content, tuple):
      continue  # `check_types` refuses it
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
  """[(field, _Kind, whether the field is a tuple of it)] of a dataclass."""
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
