"""Medians, and lines of cost against context, each with its interval."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
  """A value and its interval; low and high are nan where nothing tells."""

  value: float
  low: float
  high: float

  def text(self, form='{:.2f}'):
    if math.isnan(self.low):
      return form.format(self.value)
    low, high = form.format(self.low), form.format(self.high)
    return f'{form.format(self.value)} ({low} to {high})'


def median(samples):
  """The median between order statistics: they hold the true one with 95%, or
  with what so few samples allow (6: 97%, 5: 94%, 3: 75%); one has none."""
  x, n = np.sort(samples), len(samples)
  if n < 2:
    return Estimate(float(np.median(x)), math.nan, math.nan)
  # the smallest and largest are always left in
  drop = max(0, int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)) - 1)
  return Estimate(float(np.median(x)), float(x[drop]), float(x[n - 1 - drop]))


def power(contexts, times):
  """The exponent of times ~ context^e: least squares of the logarithms."""
  x, y = np.log(contexts), np.log(times)
  value, spread, freedom = _least_squares(np.stack([np.ones_like(x), x], 1), y)
  return _student(value[1], spread[1], freedom)


class Line(NamedTuple):
  """time = w + a context, by least squares of the relative error."""

  w: Estimate
  a: Estimate
  worst: float  # largest relative distance of a point from the line
  spread: float  # standard error of a
  freedom: int


def line(contexts, times):
  x, y = np.asarray(contexts, float), np.asarray(times, float)
  columns = np.stack([1 / y, x / y], 1)
  value, spread, freedom = _least_squares(columns, np.ones_like(y))
  return Line(
    _student(value[0], spread[0], freedom),
    _student(value[1], spread[1], freedom),
    float(np.abs(columns @ value - 1).max()),
    float(spread[1]),
    freedom,
  )


def ratio(over, under):
  """The ratio of two lines' slopes, its interval symmetric in logarithms.

  None where a slope is not above zero by more than its error."""
  if min(over.a.value - over.spread, under.a.value - under.spread) <= 0:
    return None
  value = over.a.value / under.a.value
  spread = math.hypot(over.spread / over.a.value, under.spread / under.a.value)
  if math.isnan(spread):
    return Estimate(value, math.nan, math.nan)
  freedom = over.freedom + under.freedom
  width = stats.t.ppf((1 + LEVEL) / 2, freedom) * spread
  return Estimate(value, value * math.exp(-width), value * math.exp(width))


def _least_squares(columns, y):
  """Coefficients, their standard errors (nan without spare points), spare."""
  value = np.linalg.lstsq(columns, y, rcond=None)[0]
  freedom = len(y) - columns.shape[1]
  if freedom < 1:
    return value, np.full(len(value), np.nan), freedom
  rest = y - columns @ value
  cover = np.linalg.inv(columns.T @ columns) * (rest @ rest) / freedom
  return value, np.sqrt(np.diag(cover)), freedom


def _student(value, spread, freedom):
  width = stats.t.ppf((1 + LEVEL) / 2, max(1, freedom)) * spread
  return Estimate(float(value), float(value - width), float(value + width))
