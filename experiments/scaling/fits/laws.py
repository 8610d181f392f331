"""Curves that are fitted in a study: the power law q = a + b C^-c, and a line in log10(x)."""

import dataclasses

import numpy as np

from dit_jax.errors import UserError

MIN_POWER, MIN_LINE = 4, 3  # different values of compute that a power law and a line need
# Bounds of c, times the range of log C. At the lower one C^-c falls by 1% over all points. At the
# upper one it falls to 1e-43 of its first value, so that only the first point shows it.
SHORTEST, LONGEST = 0.01, 100.0
COARSE = 48  # exponents of the coarse grid, 22% apart


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The power law q = a + b C^-c.

    a >= 0 is the quality at infinite compute. b > 0 has the unit of q C^c. c > 0 is the exponent.
    """

    a: float
    b: float
    c: float

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        return self.a + self.b * np.asarray(compute, np.float64) ** -self.c


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """The line q = intercept + slope log10(x), with Pearson's correlation of q and log10(x)."""

    intercept: float
    slope: float
    correlation: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * np.log10(np.asarray(x, np.float64))


def fit_power_law(compute: np.ndarray, quality: np.ndarray) -> PowerLaw:
    """Fits the power law by least squares of (q - a - b C^-c) / q; points may be in any order.

    For a given c, a and b have a closed form. c is searched over all exponents that the points can
    distinguish.
    Raises: ValueError for fewer than 4 different computes, for values that are not positive and
      finite, and if quality does not fall with compute or falls only at the smallest compute.
    Source: variable projection, Golub & Pereyra 1973.
    """
    compute, quality = check_points(compute, quality, MIN_POWER, "a + b C^-c")
    z, scale = center_logs(compute)
    a, b, c = fit_best(z, quality)
    first, last = np.argmin(compute), np.argmax(compute)
    ends = ", ".join(f"{quality[i]:.6g} at {compute[i]:.4g}" for i in (first, last))
    if b <= 0:
        raise UserError(
            f"quality does not fall with compute: {ends}. A power law is of a loss or a distance, "
            "which more compute lowers."
        )
    # If the largest exponent fits as well, only the first point has a value other than a.
    squares, _, _ = fit_at(z, quality, np.array([c, list_exponents(z)[-1]]))
    if squares[1] <= squares[0] * (1 + 1e-6) + 1e-24:
        raise UserError(
            f"quality falls at the smallest compute alone, {ends}: no exponent is the best one. "
            "Leave that point out or take some near it."
        )
    return PowerLaw(a, float(b * np.exp(c * scale)), c)


def fit_line(x: np.ndarray, quality: np.ndarray) -> LogLinear:
    """Fits a line to q against log10(x) by least squares.

    Raises: ValueError for fewer than 3 different x, or values that are not positive and finite.
    """
    x, quality = check_points(x, quality, MIN_LINE, "a line")
    logs = np.log10(x)
    slope, intercept = np.polyfit(logs, quality, 1)
    return LogLinear(float(intercept), float(slope), get_correlation(logs, quality))


def get_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Pearson's correlation; 0 if x or y is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def check_points(
    x: np.ndarray, quality: np.ndarray, need: int, curve: str
) -> tuple[np.ndarray, np.ndarray]:
    """Checks and returns x and quality as f64 [n].

    Args: need, the number of different x.   curve, its name in messages.
    Raises: ValueError for other shapes, values that are not positive and finite, too few x.
    """
    x, quality = (np.asarray(values, np.float64) for values in (x, quality))
    if x.shape != quality.shape or x.ndim != 1:
        raise UserError(f"computes and qualities of shapes {x.shape} and {quality.shape}: [n].")
    for name, values in (("compute", x), ("quality", quality)):
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise UserError(f"{name} must be positive and finite, not {', '.join(map(str, bad))}.")
    if (count := len(np.unique(x))) < need:
        raise UserError(
            f"{curve} needs points at {need} different computes or more; here are {count}."
        )
    return x, quality


def center_logs(compute: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns log C minus its mean, and the mean.

    About the mean, the unit of C changes only b.
    """
    z = np.log(compute)
    return z - z.mean(), float(z.mean())


def list_exponents(z: np.ndarray) -> np.ndarray:
    """Returns a coarse grid of the exponents that points at log C = z can distinguish."""
    return np.geomspace(SHORTEST, LONGEST, COARSE) / np.ptp(z)


def fit_best(
    z: np.ndarray, quality: np.ndarray, a: float | None = None
) -> tuple[float, float, float]:
    """Returns a, b and c of the least squares.   Args: a, a fixed value, or None for the best."""
    # Each round refines the grid around the best exponent, until double precision is reached.
    tried = list_exponents(z)
    while True:
        squares, floors, factors = fit_at(z, quality, tried, a)
        i = int(np.argmin(squares))
        low, high = tried[max(i - 1, 0)], tried[min(i + 1, len(tried) - 1)]
        if high / low < 1 + 1e-12:
            return float(floors[i]), float(factors[i]), float(tried[i])
        tried = np.linspace(low, high, 9)


def fit_at(z, quality, c, a=None):
    """Fits a law at each exponent c [G]; returns squared relative errors, a and b, [G] each.

    Args: a, a fixed value, or None for the best one.
    """
    x = np.exp(-c[:, None] * z[None]) / quality[None]
    one = 1 / quality
    a, b = solve(one @ one, x @ one, (x * x).sum(axis=1), one.sum(), x.sum(axis=1), a)
    # The residuals are summed directly: as a difference of moments they would lose half the digits.
    residuals = 1 - a[:, None] * one[None] - b[:, None] * x
    return (residuals**2).sum(axis=1), a, b


def solve(s_11, s_1x, s_xx, t_1, t_x, a=None):
    """Solves the weighted least squares for a and b >= 0, from their sums; w = 1 / q.

    Args: s_11, s_1x, s_xx, t_1, t_x: sums of w^2, w^2 x, (w x)^2, w and w x.   a: a fixed value, or
      None for the best one, which is also >= 0.
    """
    if a is not None:
        return np.full_like(t_x, a), np.maximum(t_x - a * s_1x, 0) / s_xx
    determinant = np.maximum(s_11 * s_xx - s_1x**2, 1e-300)  # 0 if one point is far from all others
    a, b = (s_xx * t_1 - s_1x * t_x) / determinant, (s_11 * t_x - s_1x * t_1) / determinant
    # If one is negative, it is set to 0 and the other is fitted alone. Both cannot be negative,
    # because quality is positive.
    only_a, only_b = b < 0, a < 0
    a, b = np.where(only_b, 0, a), np.where(only_b, t_x / s_xx, b)
    return np.where(only_a, t_1 / s_11, a), np.where(only_a, 0, b)
