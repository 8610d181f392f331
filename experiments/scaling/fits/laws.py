"""The curves of a study: q = a + b C^-c, a power law of compute, and q against log10(x), a line."""

import dataclasses

import numpy as np

from dit_jax.errors import UserError

MIN_POWER, MIN_LINE = 4, 3  # different computes that a curve needs
# c times the range of log C: from a fall by 1% in all to one by 1e-43, which one point tells of.
SHORTEST, LONGEST = 0.01, 100.0
COARSE = 48  # exponents, 22% apart


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
    compute, quality = points(compute, quality, MIN_POWER, "a + b C^-c")
    z, scale = logs(compute)
    a, b, c = best(z, quality)
    if b <= 0:
        raise UserError(
            f"quality does not fall with compute: {_ends(compute, quality)}. A power law is of a "
            "loss or a distance, which more compute lowers."
        )
    squares, _, _ = fit(z, quality, np.array([c, exponents(z)[-1]]))
    if squares[1] <= squares[0] * (1 + 1e-6) + 1e-24:
        raise UserError(
            f"quality falls at the smallest compute alone, {_ends(compute, quality)}: no exponent "
            "is the best one. Leave that point out or take some near it."
        )
    return PowerLaw(a, float(b * np.exp(c * scale)), c)


def log_linear(x: np.ndarray, quality: np.ndarray) -> LogLinear:
    """Least squares of q against log10(x).

    Raises: ValueError for fewer than 3 different x, or values that are not positive and finite.
    """
    x, quality = points(x, quality, MIN_LINE, "a line")
    logs = np.log10(x)
    slope, intercept = np.polyfit(logs, quality, 1)
    return LogLinear(float(intercept), float(slope), correlation(logs, quality))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def points(
    x: np.ndarray, quality: np.ndarray, need: int, curve: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both as f64 [n].   Raises: ValueError if they are not what a curve can be fitted to."""
    x, quality = (np.asarray(values, np.float64) for values in (x, quality))
    if x.shape != quality.shape or x.ndim != 1:
        raise UserError(f"computes and qualities of shapes {x.shape} and {quality.shape}: [n].")
    for name, values in (("compute", x), ("quality", quality)):
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise UserError(f"{name} must be positive and finite, not {', '.join(map(str, bad))}.")
    if (found := len(np.unique(x))) < need:
        raise UserError(
            f"{curve} needs points at {need} different computes or more; here are {found}."
        )
    return x, quality


def _ends(compute, quality):
    first, last = np.argmin(compute), np.argmax(compute)
    return (
        f"{quality[first]:.6g} at {compute[first]:.4g}, {quality[last]:.6g} at {compute[last]:.4g}"
    )


def logs(compute: np.ndarray) -> tuple[np.ndarray, float]:
    """log C about its mean, so that the unit of C changes b alone; and that mean."""
    z = np.log(compute)
    return z - z.mean(), float(z.mean())


def exponents(z: np.ndarray) -> np.ndarray:
    """Those that points at log C = z can tell apart, coarsely."""
    return np.geomspace(SHORTEST, LONGEST, COARSE) / np.ptp(z)


def best(z: np.ndarray, quality: np.ndarray, a: float | None = None) -> tuple[float, float, float]:
    """a, b and c of the least squares, with this a if it is given."""
    tried = exponents(z)
    while True:
        squares, floors, factors = fit(z, quality, tried, a)
        i = int(np.argmin(squares))
        low, high = tried[max(i - 1, 0)], tried[min(i + 1, len(tried) - 1)]
        if high / low < 1 + 1e-12:
            return float(floors[i]), float(factors[i]), float(tried[i])
        tried = np.linspace(low, high, 9)


def fit(z, quality, c, a=None):
    """Squares left, a and b [G] of the best law at each exponent c [G]."""
    x = np.exp(-c[:, None] * z[None]) / quality[None]
    one = 1 / quality
    a, b = solve(one @ one, x @ one, (x * x).sum(axis=1), one.sum(), x.sum(axis=1), a)
    # Summed as such: differences of moments would leave half of the digits.
    residuals = 1 - a[:, None] * one[None] - b[:, None] * x
    return (residuals**2).sum(axis=1), a, b


def solve(s_11, s_1x, s_xx, t_1, t_x, a=None):
    """a and b >= 0 of least squares, by the sums of w^2, w^2 x, (w x)^2, w and w x; w = 1 / q.

    Without a given a, the best one. Not both would be negative, as quality is positive.
    """
    if a is not None:
        return np.full_like(t_x, a), np.maximum(t_x - a * s_1x, 0) / s_xx
    determinant = np.maximum(s_11 * s_xx - s_1x**2, 1e-300)  # of one point far from all others
    a, b = (s_xx * t_1 - s_1x * t_x) / determinant, (s_11 * t_x - s_1x * t_1) / determinant
    only_a, only_b = b < 0, a < 0
    a, b = np.where(only_b, 0, a), np.where(only_b, t_x / s_xx, b)
    return np.where(only_a, t_1 / s_11, a), np.where(only_a, 0, b)
