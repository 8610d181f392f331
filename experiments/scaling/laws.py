"""The curves of a study, and what their parameters may be: q = a + b C^-c, and q against log x.

Errors are relative and belong to cells, each of them a model with all of its seeds and points:
cells are independent, what is of one cell need not be. Qualities are losses or distances.
"""

import dataclasses
import itertools

import numpy as np

MIN_POWER, MIN_LINE = 4, 3  # different computes that a curve needs
MIN_CELLS = 6  # 2^5 ways to tell signs apart: fewer cannot exclude anything at 95%
DRAWS = 999
# c times the range of log C: from a fall by 1% in all to one by 1e-43, which one point tells of.
SHORTEST, LONGEST = 0.01, 100.0
COARSE, FINE = 48, 41  # exponents tried anywhere, and near the best


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """q = a + b C^-c: a >= 0 is left at infinite compute, b > 0 is in units of C^c, c > 0."""

    a: float
    b: float
    c: float

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        return self.a + self.b * np.asarray(compute, np.float64) ** -self.c


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """q = intercept + slope log10(x), with Pearson's correlation of q and log10(x)."""

    intercept: float
    slope: float
    correlation: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * np.log10(np.asarray(x, np.float64))


def power_law(compute: np.ndarray, quality: np.ndarray) -> PowerLaw:
    """Least squares of (q - a - b C^-c) / q, for points of any order.

    For a given c the best a and b are linear; c is searched over all that the points can tell.
    Raises: ValueError for fewer than 4 different computes, for values that are not positive and
      finite, and where quality does not fall with compute or falls at its first point alone.
    Source: variable projection, Golub & Pereyra 1973.
    """
    compute, quality = _points(compute, quality, MIN_POWER, "a + b C^-c")
    z, scale = _logs(compute)
    low, high = _bounds(z)
    exponents = np.geomspace(low, high, COARSE)
    while True:
        i = int(np.argmin(_fit(z, quality, exponents)[0]))
        near = exponents[max(i - 1, 0)], exponents[min(i + 1, len(exponents) - 1)]
        if near[1] / near[0] < 1 + 1e-12:
            break
        exponents = np.linspace(*near, 9)
    _, a, b = _fit(z, quality, exponents[i : i + 1])
    c = float(exponents[i])
    if b[0] <= 0:
        raise ValueError(
            f"quality does not fall with compute: {_ends(compute, quality)}. A power law is of a "
            "loss or a distance, which more compute lowers."
        )
    if c > high * (1 - 1e-9):
        raise ValueError(
            f"quality falls at the smallest compute alone, {_ends(compute, quality)}: no exponent "
            "is the best one. Leave that point out or take some near it."
        )
    return PowerLaw(float(a[0]), float(b[0] * np.exp(c * scale)), c)


def log_linear(x: np.ndarray, quality: np.ndarray) -> LogLinear:
    """Least squares of q against log10(x).

    Raises: ValueError for fewer than 3 different x, or values that are not positive and finite.
    """
    x, quality = _points(x, quality, MIN_LINE, "a line")
    logs = np.log10(x)
    slope, intercept = np.polyfit(logs, quality, 1)
    flat = np.ptp(quality) == 0
    correlation = 0.0 if flat else float(np.corrcoef(logs, quality)[0, 1])
    return LogLinear(float(intercept), float(slope), correlation)


def _points(x, quality, need, curve):
    x, quality = (np.asarray(values, np.float64) for values in (x, quality))
    if x.shape != quality.shape or x.ndim != 1:
        raise ValueError(f"computes and qualities of shapes {x.shape} and {quality.shape}: [n].")
    for name, values in (("compute", x), ("quality", quality)):
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise ValueError(f"{name} must be positive and finite, not {', '.join(map(str, bad))}.")
    if (found := len(np.unique(x))) < need:
        raise ValueError(
            f"{curve} needs points at {need} different computes or more; here are {found}."
        )
    return x, quality


def _ends(compute, quality):
    first, last = np.argmin(compute), np.argmax(compute)
    return (
        f"{quality[first]:.6g} at {compute[first]:.4g}, {quality[last]:.6g} at {compute[last]:.4g}"
    )


def _logs(compute):
    """log C about its mean, so that the unit of C changes b alone; and that mean."""
    z = np.log(compute)
    return z - z.mean(), z.mean()


def _bounds(z):
    return SHORTEST / np.ptp(z), LONGEST / np.ptp(z)


def _fit(z, quality, exponents):
    """Squares left, a and b [G] of the best law at each exponent; residuals are summed as such."""
    x = np.exp(-exponents[:, None] * z) / quality
    one = 1 / quality
    a, b = _solve(one @ one, x @ one, (x * x).sum(axis=1), one.sum(), x.sum(axis=1))
    return ((1 - a[:, None] * one - b[:, None] * x) ** 2).sum(axis=1), a, b


def _solve(s_11, s_1x, s_xx, t_1, t_x):
    """a, b >= 0 of the normal equations; both cannot be negative, as quality is positive."""
    determinant = s_11 * s_xx - s_1x**2
    a, b = (s_xx * t_1 - s_1x * t_x) / determinant, (s_11 * t_x - s_1x * t_1) / determinant
    only_a, only_b = b < 0, a < 0
    a, b = np.where(only_b, 0, a), np.where(only_b, t_x / s_xx, b)
    return np.where(only_a, t_1 / s_11, a), np.where(only_a, 0, b)
