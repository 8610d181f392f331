"""The curves that a study fits: the power law q = a + b C^-c, and a line in log10(x)."""

import dataclasses

import numpy as np

from dit_jax.errors import UserError

MIN_POWER, MIN_LINE = 4, 3  # different values of compute that a power law and a line need
# Bounds of c, times the range of log C. At the lower bound, C^-c falls by 1% over all points. At
# the upper bound, it falls to 1e-43 of its first value, so that only the first point shows it.
SHORTEST, LONGEST = 0.01, 100.0
COARSE = 48  # exponents of the coarse grid, 22% apart


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The power law q = a + b C^-c."""

    a: float  # >= 0; the quality at infinite compute
    b: float  # > 0; in the unit of q C^c
    c: float  # > 0; the exponent

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
    """Fits the power law to points in any order, by least squares of (q - a - b C^-c) / q.

    For a given c, a and b have a closed form. c is searched over all exponents that the points can
    distinguish.
    Raises: ValueError for fewer than 4 different computes, for values that are not positive and
      finite, and if quality does not fall with compute or only falls at the smallest compute.
    Source: variable projection, Golub & Pereyra 1973.
    """
    compute, quality = check_points(compute, quality, MIN_POWER, "a + b C^-c")
    z, scale = center_logs(compute)
    a, b, c = fit_best(z, quality)
    first, last = np.argmin(compute), np.argmax(compute)
    ends = ", ".join(f"{quality[i]:.6g} at {compute[i]:.4g}" for i in (first, last))
    if b <= 0:
        raise UserError(
            f"quality does not fall with compute: {ends}. A power law needs a loss or a distance "
            "that more compute lowers."
        )
    # If the largest exponent fits as well, all points but the first have the value a.
    squares, _, _ = fit_at_exponents(z, quality, np.array([c, list_exponents(z)[-1]]))
    if squares[1] <= squares[0] * (1 + 1e-6) + 1e-24:
        raise UserError(
            f"quality falls at the smallest compute alone, {ends}: no exponent is the best one. "
            "Leave that point out, or add points near it."
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
    x: np.ndarray, quality: np.ndarray, least: int, curve: str
) -> tuple[np.ndarray, np.ndarray]:
    """Checks and returns x and quality as f64 [n].

    Args: least, how many different x are needed.   curve, its name in messages.
    Raises: ValueError for other shapes, values that are not positive and finite, or too few x.
    """
    x, quality = (np.asarray(values, np.float64) for values in (x, quality))
    if x.shape != quality.shape or x.ndim != 1:
        raise UserError(
            f"computes and qualities have shapes {x.shape} and {quality.shape}, not [n]."
        )
    for name, values in (("compute", x), ("quality", quality)):
        invalid = values[~(np.isfinite(values) & (values > 0))]
        if len(invalid):
            listed = ", ".join(map(str, invalid))
            raise UserError(f"{name} must be positive and finite, not {listed}.")
    if (count := len(np.unique(x))) < least:
        raise UserError(
            f"{curve} needs points at {least} different computes or more; here are {count}."
        )
    return x, quality


def center_logs(compute: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns log C minus its mean, and the mean; the unit of C then changes only b."""
    logs = np.log(compute)
    return logs - logs.mean(), float(logs.mean())


def list_exponents(z: np.ndarray) -> np.ndarray:
    """Returns a coarse grid of the exponents that points at log C = z can distinguish."""
    return np.geomspace(SHORTEST, LONGEST, COARSE) / np.ptp(z)


def fit_best(
    z: np.ndarray, quality: np.ndarray, a: float | None = None
) -> tuple[float, float, float]:
    """Fits a law to points at log C = z; returns a, b and c.

    Args: a, a fixed value, or None for the best one.
    """
    # Each round refines the grid around the best exponent, until double precision is reached.
    exponents = list_exponents(z)
    while True:
        squares, floors, factors = fit_at_exponents(z, quality, exponents, a)
        i = int(np.argmin(squares))
        low, high = exponents[max(i - 1, 0)], exponents[min(i + 1, len(exponents) - 1)]
        if high / low < 1 + 1e-12:
            return float(floors[i]), float(factors[i]), float(exponents[i])
        exponents = np.linspace(low, high, 9)


def fit_at_exponents(z, quality, c, a=None):
    """Fits a law with each exponent c [G]; returns squared relative errors, a and b, [G] each.

    Args: a, a fixed value, or None for the best one.
    """
    w = 1 / quality  # so that errors are relative
    x = np.exp(-c[:, None] * z[None]) / quality[None]  # w C^-c  [G, n]
    a, b = solve(w @ w, x @ w, (x * x).sum(axis=1), w.sum(), x.sum(axis=1), a)
    # The residuals are summed directly: as a difference of moments they would lose half the digits.
    residuals = 1 - a[:, None] * w[None] - b[:, None] * x
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
