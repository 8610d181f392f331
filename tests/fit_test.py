"""Laws with known parameters, intervals that cover them, a surface with a known optimum."""

import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dit_jax import counts, flops
from experiments.scaling import bootstrap, contrasts, fit, laws, models, summary, table

PUBLISHED = pathlib.Path(fit.__file__).parent / "published.csv"
LAWS = [(0.1, 1.0, 0.3), (0.0, 2.0, 0.05), (0.5, 1e6, 1.1), (20.0, 3e3, 0.4)]


@pytest.mark.parametrize("law", [laws.PowerLaw(*law) for law in LAWS], ids=str)
def test_law_without_noise_is_recovered_in_any_order(law):
    compute = np.random.default_rng(0).permutation(np.geomspace(1e3, 1e8, 9))
    found = laws.power_law(compute, law(compute))
    assert (found.b, found.c) == pytest.approx((law.b, law.c), rel=1e-6)
    assert found.a == pytest.approx(law.a, abs=1e-6 * law(compute).min())


def test_law_is_that_of_least_relative_squares():
    """No law near it leaves less; that of least absolute squares leaves more."""
    rng = np.random.default_rng(0)
    compute = np.geomspace(1, 1e4, 12)
    quality = laws.PowerLaw(0.3, 5.0, 0.4)(compute) * np.exp(0.1 * rng.normal(size=12))
    law = laws.power_law(compute, quality)

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
    law, other = laws.power_law(compute, quality), laws.power_law(unit * compute, quality)
    assert (other.a, other.c) == pytest.approx((law.a, law.c), rel=1e-5)
    assert other(unit * 5e3) == pytest.approx(law(5e3), rel=1e-6)
    cells = np.arange(10)
    intervals = [bootstrap.law_intervals(u * compute, quality, cells) for u in (1, unit)]
    for name in ("a", "c"):
        assert intervals[1][name] == pytest.approx(intervals[0][name], rel=1e-3)


def test_floor_and_factor_are_not_negative():
    """A straight line in log C, whose best free floor is below 0, has floor 0."""
    compute = np.geomspace(1, 1e3, 6)
    law = laws.power_law(compute, 2 - 0.2 * np.log(compute))
    assert law.a == 0
    assert law.b > 0


def test_slope_and_correlation_by_hand():
    line = laws.log_linear([1, 10, 100], [5.0, 3.0, 1.0])
    assert (line.intercept, line.slope, line.correlation) == pytest.approx((5, -2, -1))
    # deviations of x -1, 0, 1 and of q 2, -1, -1: slope -3/2, correlation -3 / sqrt(2 * 6)
    line = laws.log_linear([10, 100, 1000], [5.0, 2.0, 2.0])
    assert (line.intercept, line.slope) == pytest.approx((6, -1.5))
    assert line.correlation == pytest.approx(-3 / np.sqrt(12))
    assert line(1e4) == pytest.approx(0)
    assert laws.log_linear([1, 10, 100], [2.0, 2.0, 2.0]).correlation == 0


def test_what_no_curve_fits_is_refused():
    compute = np.array([1.0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"needs points at 4 different computes or more; .* 3"):
        laws.power_law(compute, 1 / compute)
    with pytest.raises(ValueError, match=r"a line needs points at 3 different .* 2"):
        laws.log_linear([1, 1, 2], [3, 3, 2])
    compute = np.arange(1.0, 6)
    for value in (np.nan, 0, -2.5, np.inf):
        with pytest.raises(ValueError, match=rf"quality must be positive .* not {float(value)}"):
            laws.power_law(compute, [5, 4, value, 2, 1])
        with pytest.raises(ValueError, match=rf"compute must be positive .* not {float(value)}"):
            laws.log_linear([5, 4, value, 2, 1], compute)
    with pytest.raises(ValueError, match=r"does not fall with compute: 1 at 1, 5 at 5"):
        laws.power_law(compute, compute)
    with pytest.raises(ValueError, match="falls at the smallest compute alone"):
        laws.power_law(compute, [5, 2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        laws.power_law([1, 2], [1, 2, 3])


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
    z, _ = laws.logs(compute)
    c = laws.best(z, quality)[2] * np.geomspace(0.2, 5, 600)  # 0.5% apart
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
    return bootstrap.law_intervals(compute, quality, cells)["c"]


def test_intervals_cover_where_the_usual_bootstrap_does_not():
    """Of 80 at 95%, 71 or more with a chance of 0.99. The floor is 0, where its bound binds."""
    rng, law = np.random.default_rng(1), laws.PowerLaw(0.0, 1.0, 0.1)

    def usual(*columns):
        return _percentiles_of_c(*columns, rng)

    grid = dict(noise=0.05, sizes=8, patches=1, seeds=1)
    covered, naive = _covered(80, law, (_interval_of_c, usual), **grid)
    assert 0.887 <= covered < 1
    assert naive < 0.887


def test_intervals_cover_only_if_points_of_a_run_stay_together():
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
    fitted = laws.power_law(*columns[:2])
    wide, narrow = (bootstrap.law_intervals(*columns, level=level) for level in (0.95, 0.5))
    for name in ("a", "c"):
        (low, high), (lower, upper) = narrow[name], wide[name]
        assert lower < low < getattr(fitted, name) < high < upper


def test_intervals_repeat_and_are_of_the_seed(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 99)
    columns = _grid(np.random.default_rng(0), laws.PowerLaw(0.5, 1.0, 0.4), seeds=1)
    first, again, other = (bootstrap.law_intervals(*columns, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    predictions = [bootstrap.prediction_interval(*columns, 200.0, seed=s) for s in (0, 0, 1)]
    assert predictions[0] == predictions[1] != predictions[2]


def test_copies_of_a_run_add_nothing():
    """Ten seeds without noise of their own are no more evidence than one."""
    compute, quality, cells = _grid(
        np.random.default_rng(4), laws.PowerLaw(0.5, 1.0, 0.4), sizes=8, patches=1, seeds=1
    )
    one = bootstrap.law_intervals(compute, quality, cells)
    ten = bootstrap.law_intervals(*(np.repeat(column, 10) for column in (compute, quality, cells)))
    assert ten["c"] == pytest.approx(one["c"], rel=0.02)
    line, lines = (
        bootstrap.slope_interval(*(np.repeat(column, n) for column in (compute, quality, cells)))
        for n in (1, 10)
    )
    assert lines == pytest.approx(line, rel=0.02)


def test_too_few_cells_have_no_interval():
    columns = _grid(np.random.default_rng(0), laws.PowerLaw(0.5, 1.0, 0.4), sizes=5, patches=1)
    with pytest.raises(ValueError, match=r"95% needs 6 cells or more .* here are 5"):
        bootstrap.law_intervals(*columns)
    assert bootstrap.law_intervals(*columns, level=0.9)["c"]


def test_slope_interval_covers():
    rng, inside = np.random.default_rng(5), 0
    x, cells = np.repeat(np.geomspace(1, 100, 8), 2), np.repeat(np.arange(8), 2)
    for _ in range(100):
        noise = np.repeat(rng.normal(size=8), 2) + 0.3 * rng.normal(size=16)
        inside += _inside(bootstrap.slope_interval(x, 20 - 3 * np.log10(x) + noise, cells), -3)
    assert 89 <= inside <= 99


@pytest.mark.slow
@pytest.mark.parametrize(("law", "points"), [((0.1, 1.0, 0.3), 4), ((0.0, 1.0, 0.1), 1)])
def test_intervals_and_predictions_cover_in_300_repetitions(monkeypatch, law, points):
    """Of 300 at 95%, 272 or more with a chance of 0.999; a prediction may lack 2% more."""
    monkeypatch.setattr(bootstrap, "DRAWS", 199)
    law, rng, found = laws.PowerLaw(*law), np.random.default_rng(2), []
    for _ in range(300):
        columns = _grid(rng, law, points=points)
        intervals = bootstrap.law_intervals(*columns)
        prediction = bootstrap.prediction_interval(*columns, at=250.0)
        outcome = law(250.0) * np.exp(0.02 * rng.normal())
        inside = [_inside(intervals["a"], law.a), _inside(intervals["c"], law.c)]
        found.append([*inside, _inside(prediction, outcome)])
    of_a, of_c, of_outcome = np.mean(found, axis=0)
    assert 0.907 <= min(of_a, of_c) <= max(of_a, of_c) < 0.997
    assert of_outcome >= 0.887


SURFACE = dict(e=0.3, a=2.0, b=30.0, alpha=0.3, beta=0.4)


def _row(hidden_size, depth=4, patch_size=2, seed=0, step=1000, **values):
    """A run whose gmacs are its parameters times tokens, in which 1000 steps are 1000 images."""
    tokens, params = (16 // patch_size) ** 2, depth * hidden_size**2
    row = dict(cell=f"h{hidden_size}d{depth}p{patch_size}s{seed}", size=f"h{hidden_size}d{depth}")
    row |= dict(model=f"{row['size']}/{patch_size}", block="adaLN-Zero", grid="sizes")
    row |= dict(depth=depth, hidden_size=hidden_size, num_heads=4, patch_size=patch_size)
    row |= dict(tokens=tokens, params=params, gmacs=params * tokens / 1e6, seed=seed, step=step)
    row |= dict(learning_rate=1e-4, batch_size=1, images_seen=step)
    return row | dict(train_gflops=6 * row["gmacs"] * step) | values


def _surface(row):
    """L = E + A / N^alpha + B / D^beta, Hoffmann et al. 2022."""
    s = SURFACE
    return s["e"] + s["a"] / row["gmacs"] ** s["alpha"] + s["b"] / row["step"] ** s["beta"]


def _surface_rows(seeds=1, noise=0.0, patch_sizes=(2,)):
    rng = np.random.default_rng(0)
    rows = [
        _row(hidden, patch_size=patch, seed=seed, step=step)
        for hidden in (16, 23, 32, 45, 64, 91, 128, 181, 256)
        for patch in patch_sizes
        for seed in range(seeds)
        for step in (2 ** np.arange(2, 21)).tolist()
    ]
    return [row | dict(eval_mse=_surface(row) * np.exp(noise * rng.normal())) for row in rows]


def test_optimal_size_of_a_known_surface():
    """dL/dN = 0 at 6 N D = C: A alpha N^-alpha = B beta (6 N / C)^beta, N ~ C^(beta / (a + b))."""
    s = SURFACE
    found = fit.optima(_surface_rows(), "eval_mse")
    (exponent,) = found["exponents"]
    assert exponent["gmacs"] == pytest.approx(s["beta"] / (s["alpha"] + s["beta"]), abs=0.02)
    assert exponent["params"] == pytest.approx(exponent["gmacs"], abs=1e-3)
    bracketed = [budget for budget in found["budgets"] if budget["bracketed"]]
    assert exponent["optima"] == len(bracketed) >= 3
    for budget in bracketed:
        ratio = s["a"] * s["alpha"] / (s["b"] * s["beta"])
        best = ratio * (budget["budget"] / 6) ** s["beta"]
        assert budget["gmacs"] == pytest.approx(best ** (1 / (s["alpha"] + s["beta"])), rel=0.15)
        # 64 tokens: gmacs are params * 64 / 1e6
        assert budget["params"] == pytest.approx(budget["gmacs"] * 1e6 / 64, rel=1e-6)


def test_optimum_at_the_edge_is_not_bracketed():
    rows = [row for row in _surface_rows() if row["hidden_size"] <= 32]
    far = [b for b in fit.iso_flop(rows, "eval_mse") if b["budget"] > 1e5]
    assert far
    assert {b["best"] for b in far} == {"h32d4/2"}
    assert not any(b["bracketed"] or b["gmacs"] for b in far)


def test_curves_are_read_between_their_points_and_not_beyond():
    """Qualities that are powers of compute are straight lines in log and log."""
    rows = [_row(hidden, step=step) for hidden in (16, 32, 64) for step in (10, 1000)]
    for row in rows:
        row["eval_mse"] = 3 * row["train_gflops"] ** -0.2
    low, high = 6 * rows[-1]["gmacs"] * 10, 6 * rows[0]["gmacs"] * 1000
    middle = (low * high) ** 0.5
    found = fit.iso_flop(rows, "eval_mse", [low * 0.99, low * 1.01, middle, high * 1.01])
    assert [budget["budget"] for budget in found] == [low * 1.01, middle]
    assert [point["quality"] for point in found[1]["models"]] == pytest.approx(
        [3 * middle**-0.2] * 3
    )


def test_exponents_of_seeds_are_near_that_of_their_mean():
    """Without noise they are the same: of the same budgets."""
    (exact,) = fit.optima(_surface_rows(seeds=3, noise=0), "eval_mse")["exponents"]
    assert exact["by_seed"] == pytest.approx([exact["gmacs"]] * 3, abs=1e-12)
    (exponent,) = fit.optima(_surface_rows(seeds=4, noise=0.002), "eval_mse")["exponents"]
    assert len(set(exponent["by_seed"])) == 4
    assert exponent["by_seed"] == pytest.approx([exponent["gmacs"]] * 4, abs=0.1)
    assert min(exponent["by_seed"]) < exponent["gmacs"] < max(exponent["by_seed"])


def test_law_of_the_best_is_that_of_the_surface():
    """Where sizes are free L = E + A / N^alpha + B / D^beta falls as C^-(alpha beta / sum)."""
    alpha, beta = SURFACE["alpha"], SURFACE["beta"]
    sizes = [2**i for i in range(4, 12)]
    steps = [100 * 2**i for i in range(10)]
    rows = [_row(size, step=step) for size in sizes for step in steps]
    rows = [row | dict(eval_mse=_surface(row)) for row in rows]
    found = fit.study(rows, "eval_mse")["law_of_frontier"]
    assert found["c"] == pytest.approx(alpha * beta / (alpha + beta), rel=0.05)
    assert found["no_intervals"]


def test_frontier_is_of_rows_that_none_beats():
    points = [(1, 9.0), (1, 8.0), (2, 8.5), (3, 8.0), (4, 5.0), (5, 4.0), (5, 4.5), (6, 6.0)]
    rows = [dict(train_gflops=x, fid=y) for x, y in reversed(points)]
    kept = [(row["train_gflops"], row["fid"]) for row in fit.frontier(rows, "fid")]
    assert kept == [(1, 8.0), (4, 5.0), (5, 4.0)]


def test_largest_model_is_predicted_without_any_of_its_runs():
    law = laws.PowerLaw(0.2, 1.0, 0.3)
    rows = [_row(2**i, seed=seed) for i in range(4, 11) for seed in range(2)]
    rows = [row | dict(eval_mse=float(law(row["gmacs"]))) for row in rows]
    for row in rows[-2:]:
        row["eval_mse"] *= 2
    found = fit.largest(rows, "eval_mse")
    assert found["predicted"] == pytest.approx(law(found["gmacs"]), rel=1e-6)
    assert found["relative_error"] == pytest.approx(-0.5, rel=1e-6)
    assert (found["model"], found["runs"], found["reach"]) == ("h1024d4/2", 2, pytest.approx(4))
    assert found["interval"] == pytest.approx((found["predicted"],) * 2, rel=1e-3)
    rolling = fit.rolling(rows[:-2], "eval_mse")["predictions"]
    assert [p["reach"] for p in rolling] == pytest.approx([4, 16, 4])
    assert [p["relative_error"] for p in rolling] == pytest.approx([0] * 3, abs=1e-6)


def test_models_of_one_number_of_tokens_are_fitted_alone():
    """Of 4 tokens a third less loss at equal gmacs: a fit to all is of neither."""
    law = laws.PowerLaw(0.2, 1.0, 0.3)
    rows = [_row(2**i, patch_size=p, seed=s) for i in range(4, 11) for p in (4, 2) for s in (0, 1)]
    rows += [_row(32, patch_size=1)]
    for row in rows:
        row["eval_mse"] = float(law(row["gmacs"])) * (2 / 3 if row["patch_size"] == 4 else 1)
    one, four, most = fit.within_tokens(rows, "eval_mse")["groups"]
    assert one["tokens"] * 16 == four["tokens"] * 4 == most["tokens"]
    for group, patch_size in ((one, 4), (four, 2)):
        alone = [row for row in rows if row["patch_size"] == patch_size]
        assert group["line"] == fit.lines(alone, "eval_mse")["steps"][0]
        assert group["largest"]["model"] == f"h1024d4/{patch_size}"
        assert group["largest"]["relative_error"] == pytest.approx(0, abs=1e-6)
    assert "3 models" in most["line"]["left_out"]
    assert "other models" in most["largest"]["left_out"]
    with pytest.raises(ValueError, match="several numbers of tokens"):
        fit.within_tokens([row for row in rows if row["patch_size"] == 2], "eval_mse")


def test_slopes_hold_all_else_and_pool_groups():
    """log q = -0.5 log tokens - 0.2 log depth - log hidden_size / 3, by construction."""
    sizes = itertools.product((64, 128), (4, 8, 16), (2, 4), (0, 1))
    rows = [_row(h, depth, patch_size=patch, seed=seed) for h, depth, patch, seed in sizes]
    for row in rows:
        law = row["tokens"] ** -0.5 * row["depth"] ** -0.2 * row["hidden_size"] ** (-1 / 3)
        row["eval_mse"] = law * (1 + 0.1 * (row["depth"] == 16) * (2 * row["seed"] - 1))
    for of, slope, groups in (("tokens", -0.5, 6), ("depth", -0.2, 4), ("hidden_size", -1 / 3, 6)):
        found = contrasts.slopes(rows, "eval_mse", of)
        assert len(found["groups"]) == groups
        assert [g["slope"] for g in found["groups"]] == pytest.approx([slope] * groups)
        assert found["mean"] == pytest.approx(slope)
    with pytest.raises(ValueError, match="2 models or more that differ in depth alone"):
        contrasts.slopes([row for row in rows if row["depth"] == 4], "eval_mse", "depth")


def test_pairs_of_equal_cost_against_the_noise_of_seeds():
    """Seeds at 1 -+ d in log: variance 2 d^2 each of one degree, so deviations of means are d."""
    rows = [_row(64, 16, 4, seed=s) for s in (0, 1)] + [_row(64, 4, 2, seed=s) for s in (0, 1)]
    rows += [_row(128, 4, 4, seed=s) for s in (0, 1)]  # the first one's gmacs, params and tokens
    centers = {(64, 16): 0.0, (64, 4): 0.05, (128, 4): -0.05}
    for row in rows:
        center = centers[row["hidden_size"], row["depth"]]
        row["eval_mse"] = np.exp(center + 0.01 * (2 * row["seed"] - 1))
    found = contrasts.equal_gmacs(rows, "eval_mse")
    assert found["noise"] == pytest.approx(0.01 * 2**0.5)
    names = [[model["model"] for model in p["pair"]] for p in found["pairs"]]
    assert names == [["h128d4/4", "h64d4/2"], ["h64d16/4", "h64d4/2"]]
    # means are of qualities, not of their logs: cosh(0.01) cancels
    assert [p["log_ratio"] for p in found["pairs"]] == pytest.approx([0.1, 0.05])
    assert [p["deviations"] for p in found["pairs"]] == pytest.approx(
        [0.1 / 0.01 / 2**0.5, 5 / 2**0.5]
    )
    assert [p["better"] for p in found["pairs"]] == ["h128d4/4", "h64d16/4"]
    (pair,) = contrasts.equal_params(rows, "eval_mse")["pairs"]
    assert [model["depth"] for model in pair["pair"]] == [4, 16]
    assert pair["better"] == "h128d4/4"
    alone = contrasts.equal_params([r for r in rows if r["seed"] == 0], "eval_mse")
    assert alone["noise"] is alone["pairs"][0]["deviations"] is None


def test_rows_that_do_not_compare_are_refused():
    samples = dict(sampler="ddpm", sampling_steps=250, cfg_scale=1.0, num=50_000)
    samples |= dict(extractor="inception", reference="a")
    rows = [_row(2**i, fid=100.0 / i, eval_mse=1.0 / i, **samples) for i in range(4, 9)]
    others = dict(sampler="ddim", sampling_steps=50, cfg_scale=1.5, num=5_000)
    others |= dict(extractor="dinov2", reference="b")
    for name, value in others.items():
        mixed = [*rows[:-1], rows[-1] | {name: value}]
        with pytest.raises(
            ValueError, match=rf"across {name}: {samples[name]} in 4 .* {value} in 1"
        ):
            fit.study(mixed, "fid")
        fit.study(mixed, "eval_mse")
    for name, value in dict(block="adaLN", batch_size=2).items():
        with pytest.raises(ValueError, match=rf"across {name}: .* in 4 rows, {value} in 1 rows"):
            fit.study([*rows[:-1], rows[-1] | {name: value}], "eval_mse")
    with pytest.raises(ValueError, match="across learning_rate"):
        fit.study([*rows, rows[0] | dict(learning_rate=2e-4)], "eval_mse")
    fit.study([*rows[:-1], rows[-1] | dict(learning_rate=2e-4)], "eval_mse")
    with pytest.raises(ValueError, match=r"is 0.25 and 0.3 in two rows of one run: h16d4p2s0"):
        fit.study([*rows, rows[0] | dict(eval_mse=0.3)], "eval_mse")
    assert fit.study([*rows, rows[0]], "eval_mse")["rows"] == 5
    with pytest.raises(ValueError, match="not nan of h16d4p2s0 at step 1000"):
        fit.study([rows[0] | dict(eval_mse=np.nan), *rows[1:]], "eval_mse")
    with pytest.raises(
        ValueError, match="none of 5 rows has 'kid'; there is fid in 5, eval_mse in 5"
    ):
        fit.study(rows, "kid")
    with pytest.raises(ValueError, match="of label_accuracy more is better"):
        fit.study(rows, "label_accuracy")


def test_seeds_are_averaged_where_all_have_got_to():
    rows = [_row(16, seed=seed, step=step, fid=1.0 + seed) for seed in (0, 2) for step in (1, 2)]
    rows.append(_row(16, seed=0, step=3, fid=0.1))
    assert [(r["step"], r["fid"]) for r in models.average(rows, "fid")] == [(1, 2.0), (2, 2.0)]
    rows += [_row(32, step=step, fid=1.0) for step in (1, 2)]
    assert models.last_step(rows) == 2


def test_published_models():
    """The paper's correlation is -0.93; tokens matter more the larger the model."""
    rows = table.read(PUBLISHED)
    result = fit.study(rows, "fid")
    (line,) = result["line"]["steps"]
    assert line["correlation"] == pytest.approx(-0.93, abs=0.005)
    assert (line["slope"], line["intercept"]) == pytest.approx((-54.28, 126.15), abs=0.005)
    slopes = {group["models"][0][:-2]: group["slope"] for group in result["tokens"]["groups"]}
    assert slopes == pytest.approx(dict(S=-0.292, B=-0.374, L=-0.587, XL=-0.613), abs=5e-4)
    # From the table's ends alone: log(68.40 / 153.60) / log(256 / 16), 3 points evenly spaced.
    assert slopes["S"] == pytest.approx(np.log(68.40 / 153.60) / np.log(16), rel=1e-6)
    assert result["largest"]["model"] == "XL/2"
    assert _inside(result["largest"]["interval"], 19.47)
    assert "left_out" in result["iso_flop"]
    assert set(result["frontier"][-1].values()) >= {"XL/2", 400_000, 19.47}


def test_published_counts_are_those_of_the_formula():
    for row in table.read(PUBLISHED):
        found = counts.of_dit(flops.published_config(f"DiT-{row['model']}"))
        assert row["gmacs"] == pytest.approx(found["gmacs"], rel=3e-3, abs=0.005)
        assert (row["params"], row["tokens"]) == (found["params"], found["tokens"])
        assert row["images_seen"] == row["step"] * row["batch_size"]
        assert row["train_gflops"] == pytest.approx(6 * row["gmacs"] * row["images_seen"])
    blocks = {row["block"]: row for row in table.read(PUBLISHED.with_name("published_blocks.csv"))}
    fids = {"in-context": 35.24, "cross-attention": 26.14, "adaLN": 25.21, "adaLN-Zero": 19.47}
    assert {block: row["fid"] for block, row in blocks.items()} == fids


def test_nearly_empty_table_is_fitted_as_far_as_it_goes():
    rows = [
        _row(h, step=step, eval_mse=h**-0.2 * step**-0.1) for h in (16, 24) for step in (10, 20)
    ]
    with pytest.raises(ValueError, match="nothing can be fitted to 1 rows") as error:
        fit.study(rows[:1], "eval_mse")
    assert "law: a + b C^-c needs points at 4 different computes or more" in str(error.value)
    assert "line: a line needs 3 models" in str(error.value)
    result = fit.study(rows, "eval_mse")
    fitted = {name for name in summary.PARTS if "left_out" not in result[name]}
    assert fitted == {"law_of_frontier", "hidden_size"}
    text = summary.of(result)
    assert "Left out" in text
    assert "needs points at 4 different computes or more; here are 2" in text


def test_command_writes_what_study_returns_and_prints_it(tmp_path):
    rows = [_row(2**i, seed=s, step=t) for i in range(4, 8) for s in (0, 1) for t in (100, 1000)]
    rows = [row | dict(eval_mse=_surface(row)) for row in rows]
    path = tmp_path / "table.csv"
    table.write(path, [*rows, _row(16, grid="blocks", block="adaLN", eval_mse=1.0)])
    command = [
        sys.executable,
        "-m",
        "experiments.scaling.fit",
        f"--table={path}",
        "--where=grid=sizes",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PUBLISHED.parents[2])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "table.fit.json").read_text())
    expected = fit.study(rows, "eval_mse")
    assert result == json.loads(json.dumps(expected))
    assert done.stdout.startswith(summary.of(expected))
    assert "16 rows, 4 models, 2 seeds, steps 100, 1,000" in done.stdout
    assert "needs 6 cells" in result["law"]["no_intervals"]
