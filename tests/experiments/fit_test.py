"""Fits to tables: a surface with a known optimum, the published models."""

import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from dit_jax.models import counts
from experiments.scaling.fits import contrasts, fit, laws, selection, summary, table

PUBLISHED = pathlib.Path(fit.__file__).parents[1] / "published.csv"
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
    found = fit.fit_optima(table.from_rows(_surface_rows()), "eval_mse")
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
    far = [b for b in fit.find_optima(table.from_rows(rows), "eval_mse") if b["budget"] > 1e5]
    assert far
    assert {b["best"] for b in far} == {"h32d4/2"}
    assert not any(b["bracketed"] or b["gmacs"] for b in far)


def _points(qualities):
    sizes = [2.0**i for i in range(len(qualities))]
    return [
        dict(model=f"{size:g}", gmacs=size, params=1e6 * size, quality=quality)
        for size, quality in zip(sizes, qualities, strict=True)
    ]


def test_optimum_is_of_the_parabola_through_the_best_and_two_on_either_side():
    qualities = [9.0, 2.0, 1.3, 1.0, 1.1, 1.6, 9.0]
    found = fit._find_optimum(_points(qualities))
    x = np.arange(1, 6) * np.log(2)
    curvature, slope, _ = np.polyfit(x, np.log(qualities[1:6]), 2)
    assert found["bracketed"]
    assert found["gmacs"] == pytest.approx(np.exp(-slope / 2 / curvature))
    assert found["params"] == pytest.approx(1e6 * found["gmacs"])


def test_curve_with_several_valleys_has_no_optimum():
    found = fit._find_optimum(_points([1.0, 2.0, 0.95, 2.0, 1.0]))
    assert (found["best"], found["bracketed"], found["gmacs"]) == ("4", False, None)


def test_curves_are_read_between_their_points_and_not_beyond():
    """Qualities that are powers of compute are straight lines in log and log."""
    rows = [_row(hidden, step=step) for hidden in (16, 32, 64) for step in (10, 1000)]
    for row in rows:
        row["eval_mse"] = 3 * row["train_gflops"] ** -0.2
    low, high = 6 * rows[-1]["gmacs"] * 10, 6 * rows[0]["gmacs"] * 1000
    middle = (low * high) ** 0.5
    found = fit.find_optima(
        table.from_rows(rows), "eval_mse", [low * 0.99, low * 1.01, middle, high * 1.01]
    )
    assert [budget["budget"] for budget in found] == [low * 1.01, middle]
    assert_close([point["quality"] for point in found[1]["models"]], [3 * middle**-0.2] * 3, 1e-6)


def test_exponents_of_seeds_are_near_that_of_their_mean():
    """Without noise they are the same: of the same budgets."""
    rows = table.from_rows(_surface_rows(seeds=3, noise=0))
    (exact,) = fit.fit_optima(rows, "eval_mse")["exponents"]
    assert_close(exact["by_seed"], [exact["gmacs"]] * 3, 1e-12)
    rows = table.from_rows(_surface_rows(seeds=4, noise=0.002))
    (exponent,) = fit.fit_optima(rows, "eval_mse")["exponents"]
    assert len(set(exponent["by_seed"])) == 4
    assert np.abs(np.subtract(exponent["by_seed"], exponent["gmacs"])).max() < 0.1
    assert min(exponent["by_seed"]) < exponent["gmacs"] < max(exponent["by_seed"])


def test_law_of_the_best_is_that_of_the_surface():
    """Where sizes are free L = E + A / N^alpha + B / D^beta falls as C^-(alpha beta / sum)."""
    alpha, beta = SURFACE["alpha"], SURFACE["beta"]
    sizes = [2**i for i in range(4, 12)]
    steps = [100 * 2**i for i in range(10)]
    rows = [_row(size, step=step) for size in sizes for step in steps]
    rows = [row | dict(eval_mse=_surface(row)) for row in rows]
    found = fit.fit_study(table.from_rows(rows), "eval_mse")["law_of_frontier"]
    assert found["c"] == pytest.approx(alpha * beta / (alpha + beta), rel=0.05)
    assert found["no_intervals"]


@pytest.mark.parametrize(("overfits", "near"), [(False, 1e-6), (True, 0.05)])
def test_best_of_all_never_gets_worse(overfits, near):
    """A small model that ended, or overfits, is best until a large one has passed it."""
    rows = [_row(16, step=step, eval_mse=1 / step) for step in (10, 100, 1000)]
    rows += [_row(16, step=3000, eval_mse=1 / 300)] * overfits
    rows += [_row(64, step=step, eval_mse=10 / step) for step in (10, 100, 1000, 100_000)]
    best = table.to_rows(fit.find_envelope(table.from_rows(rows), "eval_mse"))
    qualities = [row["eval_mse"] for row in best]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[-1] == pytest.approx(1e-4)
    small = [row["eval_mse"] for row in best if row["model"] == "h16d4/2"]
    assert small.count(min(small)) > 3
    assert min(small) == pytest.approx(1e-3, rel=near)


def test_frontier_is_of_rows_that_none_beats():
    points = [(1, 9.0), (1, 8.0), (2, 8.5), (3, 8.0), (4, 5.0), (5, 4.0), (5, 4.5), (6, 6.0)]
    rows = [dict(train_gflops=x, fid=y) for x, y in reversed(points)]
    kept = fit.find_frontier(table.from_rows(rows), "fid")
    assert kept.to_records(index=False).tolist() == [(1, 8.0), (4, 5.0), (5, 4.0)]


def test_largest_model_is_predicted_without_any_of_its_runs():
    law = laws.PowerLaw(0.2, 1.0, 0.3)
    rows = [_row(2**i, seed=seed) for i in range(4, 11) for seed in range(2)]
    rows = [row | dict(eval_mse=float(law(row["gmacs"]))) for row in rows]
    for row in rows[-2:]:
        row["eval_mse"] *= 2
    found = fit.predict_largest(table.from_rows(rows), "eval_mse")
    assert found["predicted"] == pytest.approx(law(found["gmacs"]), rel=1e-6)
    assert found["relative_error"] == pytest.approx(-0.5, rel=1e-6)
    assert (found["model"], found["runs"], found["reach"]) == ("h1024d4/2", 2, pytest.approx(4))
    assert_close(found["interval"], [found["predicted"]] * 2, 1e-3)
    rolling = fit.predict_larger(table.from_rows(rows[:-2]), "eval_mse")["predictions"]
    assert_trees_close([p["reach"] for p in rolling], [4, 16, 4], 1e-6)
    assert max(abs(p["relative_error"]) for p in rolling) < 1e-6


def test_models_of_one_number_of_tokens_are_fitted_alone():
    """Of 4 tokens a third less loss at equal gmacs: a fit to all is of neither."""
    law = laws.PowerLaw(0.2, 1.0, 0.3)
    rows = [_row(2**i, patch_size=p, seed=s) for i in range(4, 11) for p in (4, 2) for s in (0, 1)]
    rows += [_row(32, patch_size=1), _row(32, network="unet") | dict(tokens=None)]
    for row in rows:
        row["eval_mse"] = float(law(row["gmacs"])) * (2 / 3 if row["patch_size"] == 4 else 1)
    single, four, most = fit.fit_within_tokens(table.from_rows(rows), "eval_mse")["groups"]
    assert single["tokens"] * 16 == four["tokens"] * 4 == most["tokens"]
    for group, patch_size in ((single, 4), (four, 2)):
        alone = [row for row in rows if row["tokens"] and row["patch_size"] == patch_size]
        assert group["line"] == fit.fit_lines(table.from_rows(alone), "eval_mse")["steps"][0]
        assert group["largest"]["model"] == f"h1024d4/{patch_size}"
        assert group["largest"]["relative_error"] == pytest.approx(0, abs=1e-6)
        reaches = [p["reach"] for p in group["rolling"]["predictions"]]
        assert_trees_close(reaches, [4, 16, 64, 4, 16, 4], 1e-6)
    assert "3 models" in most["line"]["left_out"]
    assert "other models" in most["largest"]["left_out"]
    with pytest.raises(ValueError, match="several numbers of tokens"):
        fit.fit_within_tokens(
            table.from_rows([row for row in rows if row["patch_size"] == 2]), "eval_mse"
        )


def test_slopes_hold_all_else_and_pool_groups():
    """log q = -0.5 log tokens - 0.2 log depth - log hidden_size / 3, by construction."""
    sizes = itertools.product((64, 128), (4, 8, 16), (2, 4), (0, 1))
    rows = [_row(h, depth, patch_size=patch, seed=seed) for h, depth, patch, seed in sizes]
    rows = [row | dict(num_heads=row["hidden_size"] // 32) for row in rows]
    for row in rows:
        law = row["tokens"] ** -0.5 * row["depth"] ** -0.2 * row["hidden_size"] ** (-1 / 3)
        row["eval_mse"] = law * (1 + 0.1 * (row["depth"] == 16) * (2 * row["seed"] - 1))
    # Half as steep at 100 steps; a UNet that has neither tokens nor depth.
    rows += [row | dict(step=100, eval_mse=row["eval_mse"] ** 0.5) for row in rows]
    none = dict(tokens=None, depth=None, hidden_size=None)
    rows += [_row(64, eval_mse=1.0, network="unet") | none]
    # gmacs go as tokens, as depth and as the square of hidden_size
    for of, slope, per_gmacs, groups in (
        ("tokens", -0.5, -0.5, 6),
        ("depth", -0.2, -0.2, 4),
        ("hidden_size", -1 / 3, -1 / 6, 6),
    ):
        found = contrasts.fit_slopes(table.from_rows(rows), "eval_mse", of)
        assert len(found["groups"]) == groups
        assert_close([g["slope"] for g in found["groups"]], [slope] * groups, 1e-6)
        assert found["mean"] == pytest.approx(slope)
        assert found["mean_per_gmacs"] == pytest.approx(per_gmacs)
        by_step = {at["step"]: at["mean"] for at in found["by_step"]}
        assert_trees_close(by_step, {100: slope / 2, 1000: slope}, 0.01)
    first = [
        group["models"][0]
        for group in contrasts.fit_slopes(table.from_rows(rows), "eval_mse", "depth")["groups"]
    ]
    assert first == ["h64d4/4", "h64d4/2", "h128d4/4", "h128d4/2"]
    with pytest.raises(ValueError, match="2 models or more that differ in depth alone"):
        contrasts.fit_slopes(
            table.from_rows([row for row in rows if row["depth"] == 4]), "eval_mse", "depth"
        )


def test_pairs_of_equal_cost_against_the_noise_of_seeds():
    """Seeds at 1 -+ d in log: variance 2 d^2 each of one degree, so deviations of means are d."""
    rows = [_row(64, 16, 4, seed=s) for s in (0, 1)] + [_row(64, 4, 2, seed=s) for s in (0, 1)]
    rows += [_row(128, 4, 4, seed=s) for s in (0, 1)]  # the first one's gmacs, params and tokens
    centers = {(64, 16): 0.0, (64, 4): 0.05, (128, 4): -0.05}
    for row in rows:
        center = centers[row["hidden_size"], row["depth"]]
        row["eval_mse"] = np.exp(center + 0.01 * (2 * row["seed"] - 1))
    found = contrasts.compare_equal_gmacs(table.from_rows(rows), "eval_mse")
    assert [of["tokens"] for of in found["noise"]] == [16, 64]
    assert_close([of["deviation"] for of in found["noise"]], [0.01 * 2**0.5] * 2, 1e-6)
    names = [[model["model"] for model in p["pair"]] for p in found["pairs"]]
    assert names == [["h128d4/4", "h64d4/2"], ["h64d16/4", "h64d4/2"]]
    # means are of qualities, not of their logs: cosh(0.01) cancels
    assert_trees_close([p["log_ratio"] for p in found["pairs"]], [0.1, 0.05], 1e-6)
    deviations = [p["deviations"] for p in found["pairs"]]
    assert_trees_close(deviations, [0.1 / 0.01 / 2**0.5, 5 / 2**0.5], 1e-6)
    assert [p["better"] for p in found["pairs"]] == ["h128d4/4", "h64d16/4"]
    (pair,) = contrasts.compare_equal_params(table.from_rows(rows), "eval_mse")["pairs"]
    assert [model["depth"] for model in pair["pair"]] == [4, 16]
    assert pair["better"] == "h128d4/4"
    alone = contrasts.compare_equal_params(
        table.from_rows([r for r in rows if r["seed"] == 0]), "eval_mse"
    )
    assert alone["noise"] == []
    assert alone["pairs"][0]["deviations"] is None
    for row in rows:  # seeds of 64 tokens are twice as far apart: 1 and 2 deviations make root 5
        if row["tokens"] == 64:
            row["eval_mse"] = np.exp(0.05 + 0.02 * (2 * row["seed"] - 1))
    deviations = [
        p["deviations"]
        for p in contrasts.compare_equal_gmacs(table.from_rows(rows), "eval_mse")["pairs"]
    ]
    assert_trees_close(deviations, [10 / 5**0.5, 5 / 5**0.5], 5e-3)
    dearer = [dict(row, gmacs=1.15 * row["gmacs"]) if row["tokens"] == 64 else row for row in rows]
    with pytest.raises(ValueError, match="gmacs are within 10% of each other"):
        contrasts.compare_equal_gmacs(table.from_rows(dearer), "eval_mse")


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
            fit.fit_study(table.from_rows(mixed), "fid")
        fit.fit_study(table.from_rows(mixed), "eval_mse")
    for name, value in dict(block="adaLN", batch_size=2).items():
        with pytest.raises(ValueError, match=rf"across {name}: .* in 4 rows, {value} in 1 rows"):
            fit.fit_study(table.from_rows([*rows[:-1], rows[-1] | {name: value}]), "eval_mse")
    with pytest.raises(ValueError, match="across learning_rate"):
        fit.fit_study(table.from_rows([*rows, rows[0] | dict(learning_rate=2e-4)]), "eval_mse")
    fit.fit_study(table.from_rows([*rows[:-1], rows[-1] | dict(learning_rate=2e-4)]), "eval_mse")
    with pytest.raises(ValueError, match=r"is 0.25 and 0.3 in two rows of one run: h16d4p2s0"):
        fit.fit_study(table.from_rows([*rows, rows[0] | dict(eval_mse=0.3)]), "eval_mse")
    assert fit.fit_study(table.from_rows([*rows, rows[0]]), "eval_mse")["rows"] == 5
    for value in (np.nan, 0, -1, 1e-31, 1e31):
        with pytest.raises(
            ValueError, match=re.escape(f"not {float(value)} of h16d4p2s0 at step 1000")
        ):
            fit.fit_study(table.from_rows([rows[0] | dict(eval_mse=value), *rows[1:]]), "eval_mse")
    with pytest.raises(
        ValueError, match="none of 5 rows has 'kid'; there is fid in 5, eval_mse in 5"
    ):
        fit.fit_study(table.from_rows(rows), "kid")
    with pytest.raises(ValueError, match="higher label_accuracy is better"):
        fit.fit_study(table.from_rows(rows), "label_accuracy")


@pytest.mark.parametrize("name", ["params", "gmacs", "train_gflops", "tokens", "eval_mse"])
@pytest.mark.parametrize("value", [1, 1e-30, 1e30])
def test_rows_in_which_a_number_is_always_the_same(name, value):
    """What does not vary tells nothing; its fits are left out, with their reasons, or flat."""
    rows = [
        _row(2**i, step=step, eval_mse=2.0**-i * step**-0.1)
        for i in range(3, 10)
        for step in (1, 10, 100)
    ]
    result = fit.fit_study(table.from_rows([row | {name: value} for row in rows]), "eval_mse")
    json.dumps(result, allow_nan=False)
    reasons = [fit.get("left_out", "") for fit in result.values() if isinstance(fit, dict)]
    assert not [text for text in reasons if "SVD" in text or "JSON" in text]


def test_seeds_are_averaged_where_all_have_got_to():
    rows = [_row(16, seed=seed, step=step, fid=1.0 + seed) for seed in (0, 2) for step in (1, 2)]
    rows.append(_row(16, seed=0, step=3, fid=0.1))
    means = selection.average_seeds(table.from_rows(rows), "fid")
    assert list(zip(means["step"], means["fid"], strict=True)) == [(1, 2.0), (2, 2.0)]
    rows += [_row(32, step=step, fid=1.0) for step in (1, 2)]
    assert selection.find_last_step(table.from_rows(rows)) == 2


def test_published_models():
    """The paper's correlation is -0.93; tokens matter more the larger the model."""
    result = fit.fit_study(table.read(PUBLISHED), "fid")
    (line,) = result["line"]["steps"]
    assert line["correlation"] == pytest.approx(-0.93, abs=0.005)
    assert line["slope"] == pytest.approx(-54.28, abs=0.005)
    assert line["intercept"] == pytest.approx(126.15, abs=0.005)
    slopes = {group["models"][0][:-2]: group["slope"] for group in result["tokens"]["groups"]}
    printed = dict(S=-0.292, B=-0.374, L=-0.587, XL=-0.613)
    assert {size: round(slope, 3) for size, slope in slopes.items()} == printed
    # From the table's ends alone: log(68.40 / 153.60) / log(256 / 16), 3 points evenly spaced.
    assert slopes["S"] == pytest.approx(np.log(68.40 / 153.60) / np.log(16), rel=1e-6)
    assert result["largest"]["model"] == "XL/2"
    low, high = result["largest"]["interval"]
    assert low < 19.47 < high
    assert "left_out" in result["iso_flop"]
    assert set(result["frontier"][-1].values()) >= {"XL/2", 400_000, 19.47}


def test_published_counts_are_those_of_our_models():
    for row in table.to_rows(table.read(PUBLISHED)):
        name = f"DiT-{row['model']}"
        found = counts.count_names([name])[name]
        assert row["gmacs"] == pytest.approx(found["gmacs"], rel=3e-3, abs=0.005)
        assert (row["params"], row["tokens"]) == (found["params"], found["tokens"])
        assert row["images_seen"] == row["step"] * row["batch_size"]
        assert row["train_gflops"] == pytest.approx(6 * row["gmacs"] * row["images_seen"])
    blocks = table.read(PUBLISHED.with_name("published_blocks.csv")).set_index("block")
    fids = {"in-context": 35.24, "cross-attention": 26.14, "adaLN": 25.21, "adaLN-Zero": 19.47}
    assert blocks["fid"].to_dict() == fids


def test_nearly_empty_table_is_fitted_as_far_as_it_goes():
    rows = [
        _row(h, step=step, eval_mse=h**-0.2 * step**-0.1) for h in (16, 24) for step in (10, 20)
    ]
    with pytest.raises(ValueError, match="nothing can be fitted to 1 rows") as error:
        fit.fit_study(table.from_rows(rows[:1]), "eval_mse")
    assert "law: a + b C^-c needs points at 4 different computes or more" in str(error.value)
    assert "line: a line needs 3 models" in str(error.value)
    result = fit.fit_study(table.from_rows(rows), "eval_mse")
    fitted = {name for name in summary.PARTS if "left_out" not in result[name]}
    assert fitted == {"law_of_frontier", "hidden_size"}
    text = summary.format_study(result)
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
    expected = fit.fit_study(table.from_rows(rows), "eval_mse")
    assert result == json.loads(json.dumps(expected))
    assert done.stdout.startswith(summary.format_study(expected))
    assert "16 rows, 4 models, 2 seeds, steps 100, 1,000" in done.stdout
    assert "needs 6 cells" in result["law"]["no_intervals"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:0], "has no rows"),
        (lambda rows: [row | {"model": None} for row in rows], ":2: model must not be empty"),
        (lambda rows: [row | {"tokens": None} for row in rows], ":2: tokens must not be empty"),
    ],
    ids=["rows", "model", "tokens"],
)
def test_tables_that_lack_what_all_figures_need_are_refused(tmp_path, change, message):
    path = tmp_path / "study.csv"
    published = table.to_rows(table.read(PUBLISHED))
    rows, names = change(published), published[0]
    table.write(path, rows or [dict.fromkeys(names, "")])
    if not rows:
        path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=message):
        table.read(path)


def test_column_of_text_is_no_quality():
    rows = table.read(PUBLISHED)
    table.check_quality(rows, "gmacs")
    table.check_quality(rows, "nowhere")
    with pytest.raises(ValueError, match="the column model has text, such as 'S/8'"):
        table.check_quality(rows, "model")
