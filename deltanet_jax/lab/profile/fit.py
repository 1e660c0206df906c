"""Medians and line fits with confidence intervals."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
  """A value and its interval; low and high are nan if unknown."""

  value: float
  low: float
  high: float

  def text(self, form='{:.2f}'):
    if math.isnan(self.low):
      return form.format(self.value)
    low, high = form.format(self.low), form.format(self.high)
    return f'{form.format(self.value)} ({low} to {high})'


def estimate_median(samples):
  """The median with an interval of order statistics, of 95% or what few samples
  allow (6: 97%, 5: 94%, 3: 75%); none of a single sample."""
  x, n = np.sort(samples), len(samples)
  if n < 2:
    return Estimate(float(np.median(x)), math.nan, math.nan)
  # the smallest and largest are always kept
  drop = max(0, int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)) - 1)
  return Estimate(float(np.median(x)), float(x[drop]), float(x[n - 1 - drop]))


def fit_power(contexts, times):
  """The exponent e of times ~ context^e by least squares of logarithms."""
  (slope, _), (spread, _) = _fit_line(np.log(contexts), np.log(times))
  return _student(slope, spread, len(times) - 2)


class FittedLine(NamedTuple):
  """time = w + a context, by least squares of the relative error."""

  w: Estimate
  a: Estimate
  worst: float  # largest relative distance of a point from the line
  spread: float  # standard error of a
  freedom: int


def fit_line(contexts, times):
  x, y = np.asarray(contexts, float), np.asarray(times, float)
  (a, w), (spread, spread_w) = _fit_line(x, y, 1 / y)
  freedom = len(y) - 2
  return FittedLine(
    _student(w, spread_w, freedom),
    _student(a, spread, freedom),
    float(np.abs((w + a * x) / y - 1).max()),
    float(spread),
    freedom,
  )


def compare_slopes(over, under):
  """The ratio of two slopes, with an interval symmetric in logarithms; None if
  a slope is not above zero by more than its error."""
  if min(over.a.value - over.spread, under.a.value - under.spread) <= 0:
    return None
  value = over.a.value / under.a.value
  spread = math.hypot(over.spread / over.a.value, under.spread / under.a.value)
  if math.isnan(spread):
    return Estimate(value, math.nan, math.nan)
  freedom = over.freedom + under.freedom
  width = stats.t.ppf((1 + LEVEL) / 2, freedom) * spread
  return Estimate(value, value * math.exp(-width), value * math.exp(width))


def _fit_line(x, y, weights=None):
  """(slope, intercept) and their standard errors, nan of two points."""
  if len(x) < 3:
    return np.polyfit(x, y, 1, w=weights), (math.nan, math.nan)
  value, covariance = np.polyfit(x, y, 1, w=weights, cov=True)
  return value, np.sqrt(np.diag(covariance))


def _student(value, spread, freedom):
  width = stats.t.ppf((1 + LEVEL) / 2, max(1, freedom)) * spread
  return Estimate(float(value), float(value - width), float(value + width))
