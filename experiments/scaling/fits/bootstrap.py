"""What a curve's parameters may be, and a run beyond it: intervals by a bootstrap over cells.

A cell is a model with all of its seeds and points. Cells err independently of each other, relative
to the curve and to either side alike; the errors within one may be alike, and are never parted.

A value is in a parameter's interval if the data do not reject it. The curve is fitted with that
value; the ratio of its squared errors to those of the free curve is compared with the ratios of
data made of the restricted curve and its own errors, where each cell's keep or change their signs
together. Errors are first enlarged by what the fit has taken of each cell: CR2, for predictions
CR3.

Measured at 95%, in 400 studies of each of 9 kinds: 5 sizes x 3 patch sizes, 2 seeds, 1 or 4 points
to a run, errors of 1 to 5%, a of 0 to 1, c of 0.1 to 0.5. In the interval were c in 94.0 to 97.8%,
a in 94.8 to 97.0%, one more run at twice the compute in 94.5 to 98.0%. Of 8 cells with a = 0: c in
93.5% of 200; 6 cells, the fewest, have intervals that are too wide: 99 to 100%. Percentiles of fits
to cells drawn with replacement hold c in 96% of 150 where a > 0, in 66 to 85% where a = 0.

Source: wild cluster restricted bootstrap, Cameron, Gelbach & Miller 2008; CR2 and CR3, Bell &
McCaffrey 2002.
"""

import itertools
from collections.abc import Callable

import numpy as np

from dit_jax.errors import UserError
from experiments.scaling.fits import laws

LEVEL = 0.95
DRAWS = 499  # of signs; where there are not more ways to set them, all
NEAR = 41  # exponents where the best ones lie

Interval = tuple[float | None, float | None]  # None: as far as can be told there is no end


def law_intervals(
    compute: np.ndarray,
    quality: np.ndarray,
    cells: np.ndarray,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of the a and c of `laws.power_law`; a's may begin at 0, which is its least value.

    Args: compute, quality, cells [n]; points with equal cells are of one.
    Raises: ValueError for fewer than 6 cells, and as `laws.power_law`.
    """
    law = laws.power_law(compute, quality)
    compute, quality = np.asarray(compute, np.float64), np.asarray(quality, np.float64)
    z, _ = laws.logs(compute)
    cells = _cells(cells, level)
    signs = _signs(cells, seed)
    near = _near(z, quality, cells)

    def rejects_c(log_c):
        c = np.exp(log_c)
        a, b = (float(value[0]) for value in laws.fit(z, quality, np.array([c]))[1:])
        tried = _around(z, near, c)

        curve, tangents = _curve(z, a, b, c, ("a", "b"))

        def ratios(errors):
            q = curve[None] * np.exp(errors)
            restricted = _squares(z, q, np.array([c]))[0][:, 0]
            return restricted / np.minimum(_least(z, q, tried), restricted)

        errors = np.log(quality / curve)
        return _p_value(errors, tangents, cells, signs, ratios) <= 1 - level

    def rejects_a(a):
        _, b, c = laws.best(z, quality, a)
        tried = _around(z, near, c)

        curve, tangents = _curve(z, a, b, c, ("b", "c"))

        def ratios(errors):
            q = curve[None] * np.exp(errors)
            restricted = _least(z, q, tried, a)
            return restricted / np.minimum(_least(z, q, tried), restricted)

        errors = np.log(quality / curve)
        return _p_value(errors, tangents, cells, signs, ratios) <= 1 - level

    lowest, *_, highest = np.log(laws.exponents(z))
    step = np.log(near[1] / near[0]) / 4
    c = _ends(rejects_c, np.log(law.c), step, lowest, highest)
    a = _ends(rejects_a, law.a, quality.min() / 100, 0.0, quality.max())
    return {
        "a": (0.0 if a[0] is None else a[0], a[1]),
        "c": tuple(None if end is None else float(np.exp(end)) for end in c),
    }


def prediction_interval(
    compute: np.ndarray,
    quality: np.ndarray,
    cells: np.ndarray,
    at: float,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Of the quality of one more run, of a cell of its own, at compute `at`.

    Here the free curve makes the data: of a single point's quality no ratio of squares tells. The
    ratio of prediction to outcome is drawn, each time with errors of a scale that the data allow:
    inverse chi-square, with the fit's degrees of freedom.
    Raises: ValueError as `law_intervals`.
    Measured of 15 models at 4 times the compute: 92 to 98% of 200 outcomes.
    """
    law = laws.power_law(compute, quality)
    compute, quality = np.asarray(compute, np.float64), np.asarray(quality, np.float64)
    z, _ = laws.logs(compute)
    distance = np.log(at / compute[0]) + z[0]
    cells = _cells(cells, level)
    rng = np.random.default_rng(seed)
    a, b, c = laws.best(z, quality)
    curve, tangents = _curve(z, a, b, c, ("a", "b", "c"))
    errors = _enlarge(np.log(quality / curve), tangents, cells, power=1)
    freedom = cells.max() + 1 - tangents.shape[1]
    scale = np.sqrt(freedom / rng.chisquare(freedom, DRAWS))
    signs = rng.choice([-1.0, 1.0], (DRAWS, cells.max() + 1))[:, cells]
    drawn = curve[None] * np.exp(scale[:, None] * signs * errors[None])
    tried = np.concatenate(_around(z, _near(z, quality, cells), c))
    squares, floors, factors = _squares(z, drawn, tried)
    every, best = np.arange(DRAWS), squares.argmin(axis=1)
    predicted = floors[every, best] + factors[every, best] * np.exp(-tried[best] * distance)
    outcome = scale * rng.choice(errors, DRAWS) * rng.choice([-1.0, 1.0], DRAWS)
    value = float(law(at))
    ratios = np.log(predicted / value) - outcome
    high, low = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(value * np.exp(-low)), float(value * np.exp(-high))


def slope_interval(
    x: np.ndarray,
    quality: np.ndarray,
    cells: np.ndarray,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Of the slope of `laws.log_linear`; its errors are absolute.   Raises: as `law_intervals`."""
    line = laws.log_linear(x, quality)
    logs, quality = np.log10(x), np.asarray(quality, np.float64)
    logs -= logs.mean()
    cells = _cells(cells, level)
    signs = _signs(cells, seed)

    def ratios(errors):
        errors = errors - errors.mean(axis=1, keepdims=True)
        restricted = (errors**2).sum(axis=1)
        least = restricted - (errors @ logs) ** 2 / (logs @ logs)
        return restricted / np.maximum(least, 1e-12 * (quality @ quality))

    def rejects(slope):
        errors = quality - slope * logs
        errors -= errors.mean()
        return _p_value(errors, np.ones((len(x), 1)), cells, signs, ratios) <= 1 - level

    step = np.ptp(quality) / np.ptp(logs) / 50 or quality.max() / 1e3
    return _ends(rejects, line.slope, step, line.slope - 1e4 * step, line.slope + 1e4 * step)


def _cells(cells, level):
    """[n] of 0..cells-1."""
    _, index = np.unique([str(cell) for cell in cells], return_inverse=True)
    need = int(np.ceil(1 - np.log2(1 - level)))  # of 5 there are 16 ways to set signs
    if (found := index.max() + 1) < need:
        raise UserError(
            f"an interval of {level:.0%} needs {need} cells or more (models, whatever their "
            f"seeds); here are {found}."
        )
    return index


def _signs(cells, seed):
    """[draws, n] of 1 and -1, equal within a cell, in none equal for all cells."""
    count = cells.max() + 1
    if 2 ** (count - 1) - 1 <= DRAWS:
        # Without those that are others' opposites: the ratios are almost the same.
        ways = [(1, *rest) for rest in itertools.product((1, -1), repeat=count - 1)]
        signs = np.array(ways[1:], np.float64)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, count))
    return signs[:, cells]


def _near(z, quality, cells):
    """The range of exponents that leave little more than the least squares, generously."""
    tried = np.geomspace(*laws.exponents(z)[[0, -1]], 400)
    squares, _, _ = laws.fit(z, quality, tried)
    good = tried[squares <= squares.min() * (1 + 30 / max(cells.max() - 2, 1))]
    return good[0] / 1.03, good[-1] * 1.03


def _around(z, near, c):
    """The exponents tried anywhere, and those tried near c and where the data's best ones are."""
    anywhere, width = laws.exponents(z), np.sqrt(near[1] / near[0])
    low, high = min(near[0], c / width), max(near[1], c * width)
    return anywhere, np.geomspace(max(low, anywhere[0]), min(high, anywhere[-1]), NEAR)


def _squares(z, q, c, a=None):
    """The least squares [B, G] of qualities q [B, n] at each exponent c [G]; their a and b."""
    x, w = np.exp(-c[None] * z[:, None]), 1 / q
    s_1x, s_xx, t_x = (w * w) @ x, (w * w) @ (x * x), w @ x
    s_11, t_1 = (w * w).sum(axis=1, keepdims=True), w.sum(axis=1, keepdims=True)
    a, b = laws.solve(s_11, s_1x, s_xx, t_1, t_x, a)
    squares = q.shape[1] - 2 * (a * t_1 + b * t_x) + a * a * s_11 + 2 * a * b * s_1x + b * b * s_xx
    return np.maximum(squares, 1e-12 * q.shape[1]), a, b  # below are rounding errors alone


def _least(z, q, tried, a=None):
    """The least squares [B] over all exponents: near the best one they are a parabola."""
    anywhere, near = (_squares(z, q, c, a)[0] for c in tried)
    every = np.arange(len(q))
    i = np.clip(near.argmin(axis=1), 1, near.shape[1] - 2)
    left, middle, right = (near[every, i + j] for j in (-1, 0, 1))
    curvature = np.maximum(left - 2 * middle + right, 1e-300)
    inside = (middle <= left) & (middle <= right)
    vertex = np.where(inside, middle - (left - right) ** 2 / 8 / curvature, middle)
    return np.minimum(np.minimum(anywhere.min(axis=1), near.min(axis=1)), vertex)


def _curve(z, a, b, c, free):
    """The curve [n], and by how much of it free parameters move it, [n, 1..3]."""
    x = np.exp(-c * z)
    curve = a + b * x
    moves = {"a": 1 / curve, "b": x / curve, "c": -z * b * x / curve}
    # An a of 0 that wants to be less is not free.
    kept = [moves[name] for name in free if name != "a" or a > 0]
    return curve, np.stack(kept, axis=1)


def _p_value(
    errors: np.ndarray,
    tangents: np.ndarray,
    cells: np.ndarray,
    signs: np.ndarray,
    ratios: Callable[[np.ndarray], np.ndarray],
) -> float:
    """The share of the data's ratio, and those of its errors [n] with signs, that is as large."""
    actual = ratios(errors[None])[0]
    drawn = ratios(signs * _enlarge(errors, tangents, cells)[None])
    return (1 + np.sum(drawn >= actual)) / (1 + len(drawn))


def _enlarge(errors, tangents, cells, power=0.5):
    """(1 - H_g)^-power e_g for each cell's block H_g of the projection onto the tangents."""
    basis, _ = np.linalg.qr(tangents)
    enlarged = np.empty_like(errors)
    for cell in range(cells.max() + 1):
        mine = cells == cell
        values, vectors = np.linalg.eigh(np.eye(mine.sum()) - basis[mine] @ basis[mine].T)
        # A cell that alone decides on a parameter has no residual there to enlarge.
        shares = np.maximum(values, 1e-3) ** power
        enlarged[mine] = vectors @ ((vectors.T @ errors[mine]) / shares)
    return enlarged


def _ends(rejects, inside, step, lowest, highest):
    """Where rejection begins on either side of a value, to a part in 256; None if nowhere."""
    return tuple(
        _end(rejects, inside, sign * step, limit) for sign, limit in ((-1, lowest), (1, highest))
    )


def _end(rejects, inside, step, limit):
    while True:
        outside = max(inside + step, limit) if step < 0 else min(inside + step, limit)
        if rejects(outside):
            break
        if outside == limit:
            return None
        inside, step = outside, 2 * step
    for _ in range(8):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejects(middle) else (middle, outside)
    return float((inside + outside) / 2)
