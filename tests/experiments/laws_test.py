"""Laws with known parameters, and intervals that cover them."""

import itertools

import numpy as np
import pytest
from helpers.close import assert_trees_close

from experiments.scaling.fits import bootstrap, laws

LAWS = [(0.1, 1.0, 0.3), (0.0, 2.0, 0.05), (0.5, 1e6, 1.1), (20.0, 3e3, 0.4)]


@pytest.mark.parametrize("law", [laws.PowerLaw(*law) for law in LAWS], ids=str)
def test_law_without_noise_is_recovered_in_any_order(law):
    compute = np.random.default_rng(0).permutation(np.geomspace(1e3, 1e8, 9))
    found = laws.fit_power_law(compute, law(compute))
    assert_trees_close((found.b, found.c), (law.b, law.c), 1e-6)
    assert found.a == pytest.approx(law.a, abs=1e-6 * law(compute).min())


def test_law_is_that_of_least_relative_squares():
    """No law near it leaves less; that of least absolute squares leaves more."""
    rng = np.random.default_rng(0)
    compute = np.geomspace(1, 1e4, 12)
    quality = laws.PowerLaw(0.3, 5.0, 0.4)(compute) * np.exp(0.1 * rng.normal(size=12))
    law = laws.fit_power_law(compute, quality)

    def squares(a, b, c):
        return np.sum((1 - laws.PowerLaw(a, b, c)(compute) / quality) ** 2)

    least = squares(law.a, law.b, law.c)
    for factors in itertools.product((0.999, 1, 1.001), repeat=3):
        near = np.array([law.a, law.b, law.c]) * factors
        assert squares(*near) >= least


@pytest.mark.parametrize("unit", [1e-9, 7.0, 1e12])
def test_another_unit_of_compute_changes_b_alone(unit):
    rng = np.random.default_rng(1)
    compute = np.geomspace(1, 1e3, 10)
    quality = laws.PowerLaw(0.2, 1.0, 0.3)(compute) * np.exp(0.03 * rng.normal(size=10))
    law, other = laws.fit_power_law(compute, quality), laws.fit_power_law(unit * compute, quality)
    assert_trees_close((other.a, other.c), (law.a, law.c), 1e-5)
    assert other(unit * 5e3) == pytest.approx(law(5e3), rel=1e-6)
    cells = np.arange(10)
    intervals = [bootstrap.find_law_intervals(u * compute, quality, cells) for u in (1, unit)]
    for name in ("a", "c"):
        assert_trees_close(intervals[1][name], intervals[0][name], 1e-3)


def test_floor_and_factor_are_not_negative():
    """A straight line in log C, whose best free floor is below 0, has floor 0."""
    compute = np.geomspace(1, 1e3, 6)
    law = laws.fit_power_law(compute, 2 - 0.2 * np.log(compute))
    assert law.a == 0
    assert law.b > 0


def test_slope_and_correlation_by_hand():
    line = laws.fit_line([1, 10, 100], [5.0, 3.0, 1.0])
    assert_trees_close((line.intercept, line.slope, line.correlation), (5, -2, -1), 1e-6)
    # deviations of x -1, 0, 1 and of q 2, -1, -1: slope -3/2, correlation -3 / sqrt(2 * 6)
    line = laws.fit_line([10, 100, 1000], [5.0, 2.0, 2.0])
    assert_trees_close((line.intercept, line.slope), (6, -1.5), 1e-6)
    assert line.correlation == pytest.approx(-3 / np.sqrt(12))
    assert line(1e4) == pytest.approx(0)
    assert laws.fit_line([1, 10, 100], [2.0, 2.0, 2.0]).correlation == 0


def test_what_no_curve_fits_is_refused():
    compute = np.array([1.0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"needs points at 4 different computes or more; .* 3"):
        laws.fit_power_law(compute, 1 / compute)
    with pytest.raises(ValueError, match=r"a line needs points at 3 different .* 2"):
        laws.fit_line([1, 1, 2], [3, 3, 2])
    compute = np.arange(1.0, 6)
    for value in (np.nan, 0, -2.5, np.inf):
        with pytest.raises(ValueError, match=rf"quality must be positive .* not {float(value)}"):
            laws.fit_power_law(compute, [5, 4, value, 2, 1])
        with pytest.raises(ValueError, match=rf"compute must be positive .* not {float(value)}"):
            laws.fit_line([5, 4, value, 2, 1], compute)
    with pytest.raises(ValueError, match=r"does not fall with compute: 1 at 1, 5 at 5"):
        laws.fit_power_law(compute, compute)
    with pytest.raises(ValueError, match="falls at the smallest compute alone"):
        laws.fit_power_law(compute, [5, 2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        laws.fit_power_law([1, 2], [1, 2, 3])


def _grid(rng, law, noise=0.02, sizes=5, patches=3, seeds=2, points=1, shared=0.3):
    """compute, quality, cells of a study whose errors are alike within a run, and a cell."""
    compute = np.geomspace(0.4, 7, sizes)[:, None] * 4.0 ** np.arange(patches)
    compute = compute.reshape(-1, 1, 1) * np.geomspace(1, 0.3, points) * np.ones((1, seeds, 1))
    cell, run, point = (
        rng.normal(size=shape + (1,) * (3 - len(shape)))
        for shape in (compute.shape[:1], compute.shape[:2], compute.shape)
    )
    errors = np.sqrt(shared) * cell + np.sqrt(1 - shared) * (0.9 * run + np.sqrt(0.19) * point)
    quality = law(compute) * np.exp(noise * errors)
    cells = np.broadcast_to(np.arange(len(compute))[:, None, None], compute.shape)
    return compute.ravel(), quality.ravel(), cells.ravel()


def _inside(interval, value):
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


def _percentiles_of_c(compute, quality, cells, rng):
    """The usual bootstrap: fits to cells drawn with replacement, as weights of their points."""
    z, _ = laws.center_logs(compute)
    c = laws.fit_best(z, quality)[2] * np.geomspace(0.2, 5, 600)  # 0.5% apart
    count = cells.max() + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), 150)
    drawn = drawn[(drawn > 0).sum(axis=1) >= laws.MIN_POWER][:, cells]
    x, w = np.exp(-c[None] * z[:, None]), 1 / quality
    sums = (
        drawn @ (w * w),
        (drawn * w * w) @ x,
        (drawn * w * w) @ (x * x),
        drawn @ w,
        (drawn * w) @ x,
    )
    s_11, s_1x, s_xx, t_1, t_x = (s if s.ndim == 2 else s[:, None] for s in sums)
    a, b = laws.solve(s_11, s_1x, s_xx, t_1, t_x)
    squares = a * a * s_11 + 2 * a * b * s_1x + b * b * s_xx - 2 * (a * t_1 + b * t_x)
    return np.quantile(c[squares.argmin(axis=1)], [0.025, 0.975])


def _covered(repetitions, law, intervals, **grid):
    """Shares of repetitions whose intervals hold c, one for each function of `intervals`."""
    rng = np.random.default_rng(0)
    inside = np.zeros(len(intervals))
    for _ in range(repetitions):
        columns = _grid(rng, law, **grid)
        inside += [_inside(interval(*columns), law.c) for interval in intervals]
    return inside / repetitions


def _interval_of_c(compute, quality, cells):
    return bootstrap.find_law_intervals(compute, quality, cells)["c"]


def test_intervals_cover_where_the_usual_bootstrap_does_not(monkeypatch):
    """Of 80 at 95%, 71 or more with a chance of 0.99. The floor is 0, where its bound binds."""
    monkeypatch.setattr(bootstrap, "DRAWS", 199)
    rng, law = np.random.default_rng(1), laws.PowerLaw(0.0, 1.0, 0.1)

    def usual(*columns):
        return _percentiles_of_c(*columns, rng)

    grid = dict(noise=0.05, sizes=8, patches=1, seeds=1)
    covered, naive = _covered(80, law, (_interval_of_c, usual), **grid)
    assert 0.887 <= covered < 1
    assert naive < 0.887


def test_intervals_cover_only_if_points_of_a_run_stay_together(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 199)
    rng, law = np.random.default_rng(1), laws.PowerLaw(0.5, 1.0, 0.4)

    def parted(compute, quality, cells):
        return _percentiles_of_c(compute, quality, np.arange(len(cells)), rng)

    grid = dict(sizes=4, patches=2, seeds=1, points=4)
    covered, naive = _covered(50, law, (_interval_of_c, parted), **grid)
    assert covered >= 0.86  # 43 of 50, with a chance of 0.997
    assert naive < 0.86


def test_interval_ends_where_the_data_begin_to_reject():
    """Every sign of one seed of 7 cells: no draws, so a wider level holds the narrower."""
    columns = _grid(np.random.default_rng(3), laws.PowerLaw(0.5, 1, 0.4), sizes=7, patches=1)
    fitted = laws.fit_power_law(*columns[:2])
    wide, narrow = (bootstrap.find_law_intervals(*columns, level=level) for level in (0.95, 0.5))
    for name in ("a", "c"):
        (low, high), (lower, upper) = narrow[name], wide[name]
        assert lower < low < getattr(fitted, name) < high < upper


def test_intervals_repeat_and_are_of_the_seed(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 99)
    columns = _grid(np.random.default_rng(0), laws.PowerLaw(0.5, 1.0, 0.4), seeds=1)
    first, again, other = (bootstrap.find_law_intervals(*columns, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    predictions = [bootstrap.find_prediction_interval(*columns, 200.0, seed=s) for s in (0, 0, 1)]
    assert predictions[0] == predictions[1] != predictions[2]


def test_copies_of_a_run_add_nothing():
    """Ten seeds without noise of their own are no more evidence than one."""
    compute, quality, cells = _grid(
        np.random.default_rng(4), laws.PowerLaw(0.5, 1.0, 0.4), sizes=8, patches=1, seeds=1
    )
    single = bootstrap.find_law_intervals(compute, quality, cells)
    ten = bootstrap.find_law_intervals(
        *(np.repeat(column, 10) for column in (compute, quality, cells))
    )
    assert_trees_close(ten["c"], single["c"], 0.02)
    line, lines = (
        bootstrap.find_slope_interval(
            *(np.repeat(column, n) for column in (compute, quality, cells))
        )
        for n in (1, 10)
    )
    assert_trees_close(lines, line, 0.02)


def test_too_few_cells_have_no_interval():
    columns = _grid(np.random.default_rng(0), laws.PowerLaw(0.5, 1.0, 0.4), sizes=5, patches=1)
    with pytest.raises(ValueError, match=r"95% needs 6 cells or more .* here are 5"):
        bootstrap.find_law_intervals(*columns)
    assert bootstrap.find_law_intervals(*columns, level=0.9)["c"]


def test_slope_interval_covers():
    rng, inside = np.random.default_rng(5), 0
    x, cells = np.repeat(np.geomspace(1, 100, 8), 2), np.repeat(np.arange(8), 2)
    for _ in range(100):
        noise = np.repeat(rng.normal(size=8), 2) + 0.3 * rng.normal(size=16)
        inside += _inside(bootstrap.find_slope_interval(x, 20 - 3 * np.log10(x) + noise, cells), -3)
    assert 89 <= inside <= 99


@pytest.mark.slow
@pytest.mark.parametrize(("law", "points"), [((0.1, 1.0, 0.3), 4), ((0.0, 1.0, 0.1), 1)])
def test_intervals_and_predictions_cover_in_300_repetitions(monkeypatch, law, points):
    """Of 300 at 95%, 272 or more with a chance of 0.999; a prediction may lack 2% more."""
    monkeypatch.setattr(bootstrap, "DRAWS", 199)
    law, rng, found = laws.PowerLaw(*law), np.random.default_rng(2), []
    for _ in range(300):
        columns = _grid(rng, law, points=points)
        intervals = bootstrap.find_law_intervals(*columns)
        prediction = bootstrap.find_prediction_interval(*columns, at=250.0)
        outcome = law(250.0) * np.exp(0.02 * rng.normal())
        inside = [_inside(intervals["a"], law.a), _inside(intervals["c"], law.c)]
        found.append([*inside, _inside(prediction, outcome)])
    of_a, of_c, of_outcome = np.mean(found, axis=0)
    assert 0.907 <= min(of_a, of_c) <= max(of_a, of_c) < 0.997
    assert of_outcome >= 0.887
