"""Figures of quality against size and compute show the table's points and their fits."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers.close import assert_close, assert_trees_close
from helpers.figures import (
    assert_points,
    compute_means,
    get_look,
    read_legend,
    read_lines,
    select_last_step,
    select_sizes,
)
from helpers.sweep import STEPS, study

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import curves, subsets
from experiments.scaling.fits import fit, laws, table


@pytest.fixture(scope="module")
def rows():
    return study()


def _runs(rows, quality):
    """multiply-adds and quality of each run of the sizes at the last step."""
    return np.array(
        [[row["gmacs"], row[quality]] for row in select_last_step(select_sizes(rows))]
    ).T


def test_gflops_are_of_all_models_at_the_last_step_with_line_and_correlation(rows):
    figure = curves.draw_gflops(table.from_rows(rows), "fd_pixels")
    (axes,) = figure.axes
    expected = compute_means(select_last_step(select_sizes(rows)), "gmacs", "fd_pixels")
    drawn = sorted(tuple(line.get_xydata()[0]) for line in read_lines(axes))
    assert_points(drawn, sorted(p for (p,) in expected.values()))
    assert {line.get_linestyle() for line in read_lines(axes)} <= {"-"}  # of one point each
    x, y = _runs(rows, "fd_pixels")
    line = laws.fit_line(x, y)  # of runs, as `fit.fit_lines`
    (law,) = read_lines(axes, "_law")
    assert_close(law.get_ydata(), line(law.get_xdata()), 1e-9)
    assert_trees_close([law.get_xdata()[0], law.get_xdata()[-1]], [min(x), max(x)], 1e-6)
    assert axes.get_title("right") == (
        rf"fit ${line.intercept:.3g} - {-line.slope:.3g}\,\log_{{10}} G$, "
        f"$r = {line.correlation:.2f}$"
    )
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert axes.get_xlabel() == "multiply-adds of one pass (G)"
    assert axes.get_ylabel() == "FD of pixels (5,000 samples)"


def test_a_loss_has_a_power_law_of_gflops_on_log_axes(rows):
    (axes,) = curves.draw_gflops(table.from_rows(rows), "eval_mse").axes
    law = laws.fit_power_law(*_runs(rows, "eval_mse"))
    (line,) = read_lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata()), 1e-9)
    text = rf"fit ${law.a:.3g} + {law.b:.3g}\,G^{{-{law.c:.2g}}}$, $r = -0."
    assert axes.get_title("right").startswith(text)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "held-out MSE"  # of no samples


def test_gflops_are_at_the_last_step_that_all_have(rows):
    short = [r for r in rows if not (r["model"] == "XL/2" and r["step"] == STEPS[-1])]
    (axes,) = curves.draw_gflops(table.from_rows(short), "eval_mse").axes
    expected = compute_means(
        [row for row in select_sizes(rows) if row["step"] == STEPS[-2]], "gmacs"
    )
    drawn = sorted(tuple(line.get_xydata()[0]) for line in read_lines(axes))
    assert_points(drawn, sorted(p for (p,) in expected.values()))


def test_compute_has_a_line_to_a_model_and_the_law_of_the_best(rows):
    figure = curves.draw_compute(table.from_rows(rows), "eval_mse")
    (axes,) = figure.axes
    expected = compute_means(select_sizes(rows), "train_gflops")
    drawn = {tuple(line.get_ydata()): line.get_xdata() for line in read_lines(axes)}
    assert len(drawn) == len(expected) == 15
    for points in expected.values():
        x, y = zip(*points, strict=True)
        assert_close(drawn[y], np.array(x) / 1e3, 1e-14)
    assert axes.get_xlabel() == "training compute (TFLOPs)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    best = fit.find_envelope(table.from_rows(select_sizes(rows)), "eval_mse")
    law = laws.fit_power_law(best["train_gflops"], best["eval_mse"])
    (line,) = read_lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata() * 1e3), 1e-4)
    b = f"{law.b * 1e3**-law.c:.3g}"
    assert axes.get_title("right") == (
        rf"best of all ${law.a:.3g} + {b}\,C^{{-{law.c:.2g}}}$, $C$ in TFLOPs"
    )


def test_seeds_are_faint_beside_their_mean(rows):
    (axes,) = curves.draw_compute(table.from_rows(rows), "fd_pixels").axes
    seeds = read_lines(axes, "_seeds")
    assert sum(len(line.get_xdata()) for line in seeds) == len(select_sizes(rows))
    assert {line.get_alpha() for line in seeds} == {0.5}
    single = [row for row in rows if row["seed"] == 0]
    assert not read_lines(
        curves.draw_compute(table.from_rows(single), "fd_pixels").axes[0], "_seeds"
    )


def test_what_rises_with_compute_has_no_law_and_no_optimum(rows):
    (axes,) = curves.draw_compute(table.from_rows(rows), "label_accuracy").axes
    assert not read_lines(axes, "_law")
    assert axes.get_yscale() == "linear"
    with pytest.raises(subsets.NoRowsError, match="higher label_accuracy is better"):
        curves.draw_isoflop(table.from_rows(rows), "label_accuracy")


def test_what_is_not_positive_has_a_linear_axis_and_no_law(rows):
    (axes,) = curves.draw_compute(
        table.from_rows([{**row, "eval_vb": -1.0} for row in rows]), "eval_vb"
    ).axes
    assert axes.get_yscale() == "linear"
    assert not read_lines(axes, "_law")
    with pytest.raises(subsets.NoRowsError, match="eval_vb must be in 1e-30"):
        curves.draw_isoflop(table.from_rows([{**row, "eval_vb": -1.0} for row in rows]), "eval_vb")


@pytest.mark.parametrize(
    ("values", "factor", "unit"),
    [
        ([2, 40], 1, "GFLOPs"),
        ([1e-3, 1e-2], 1, "GFLOPs"),
        ([5e3, 5e4], 1e3, "TFLOPs"),
        ([1e5, 1e7], 1e6, "PFLOPs"),
        ([1e10, 1e11], 1e9, "EFLOPs"),
    ],
)
def test_unit_of_compute_is_of_its_middle(values, factor, unit):
    assert subsets.choose_unit(pd.Series(values)) == (factor, unit)


def test_isoflop_has_a_panel_to_tokens_and_marks_the_optima(rows):
    figure = curves.draw_isoflop(table.from_rows(rows), "eval_mse")
    *axes, bar = figure.axes
    assert [a.get_title() for a in axes] == ["4 tokens", "16 tokens", "64 tokens"]
    assert bar.get_ylabel() == "training compute (TFLOPs)"
    found = fit.find_optima(table.from_rows(select_sizes(rows)), "eval_mse")
    shown = 0
    for panel, tokens in zip(axes, (4, 16, 64), strict=True):
        of_tokens = [budget for budget in found if budget["tokens"] == tokens]
        known = {tuple(m["quality"] for m in b["models"]): b for b in of_tokens}
        lines = [line for line in read_lines(panel) if len(line.get_xdata()) > 1]
        assert 2 <= len(lines) <= curves.BUDGETS
        budgets = [known[tuple(line.get_ydata())] for line in lines]
        greys = [line.get_color()[0] for line in lines]
        assert greys == sorted(greys, reverse=True)  # darker with compute
        optima = [(b["gmacs"], b["quality"]) for b in budgets if b["bracketed"]]
        stars = [tuple(*line.get_xydata()) for line in read_lines(panel, "_optimum")]
        assert stars == optima
        shown += len(stars)
    assert shown >= 2
    assert "optimum" in read_legend(figure)


def test_small_numbers_are_written_as_powers_of_ten():
    law = laws.PowerLaw(0.128, 2.44e-5, 0.78)
    assert curves._format_equation(law, "G") == r"$0.128 + 2.44\times 10^{-5}\,G^{-0.78}$"


def test_extrapolation_shows_the_largest_model_beside_the_law_of_the_others(rows):
    figure = curves.draw_extrapolation(table.from_rows(rows), "eval_mse")
    (axes,) = figure.axes
    sized = select_last_step(select_sizes(rows))
    most = max(row["gmacs"] for row in sized)
    others = [row for row in sized if row["gmacs"] < most]
    largest = [row["eval_mse"] for row in sized if row["gmacs"] == most]
    law = laws.fit_power_law(*([row[name] for row in others] for name in ("gmacs", "eval_mse")))
    (line,) = read_lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata()), 1e-9)
    assert line.get_xdata()[-1] == pytest.approx(most)
    (held_out,) = [line for line in read_lines(axes) if line.get_markerfacecolor() == "white"]
    assert_points(held_out.get_xydata(), [[most, np.mean(largest)]])
    assert get_look(held_out) == (plot_style.COLORS[4], "o")
    assert len(read_lines(axes)) == 15
    found = fit.predict_largest(table.from_rows(sized), "eval_mse")
    drawn = {c.get_label(): c.get_paths()[0].vertices for c in axes.collections}
    assert_points(drawn["_interval"], [(most, end) for end in found["interval"]])
    band = drawn["_band"]
    for end in found["interval"]:
        assert np.abs(band - [most, end]).max(axis=1).min() < 1e-7 * most
    assert band[:, 0].min() == pytest.approx(max(row["gmacs"] for row in others))
    assert band[:, 0].max() == pytest.approx(most)
    low, high = found["interval"]
    assert axes.get_title("right").splitlines()[1] == (
        f"XL/2: predicted {law(most):.3f} (95%: {low:.3f} to {high:.3f}), "
        f"measured {np.mean(largest):.3f}"
    )


def test_extrapolation_of_few_models_has_no_interval(rows):
    few = [row for row in rows if row["patch_size"] == 2 and row["grid"] == "sizes"]
    (axes,) = curves.draw_extrapolation(table.from_rows(few), "eval_mse").axes
    assert not axes.collections
    assert re.search(r"predicted [\d.]+, measured", axes.get_title("right"))
    fewer = [row for row in few if row["size"] != "XS"]
    with pytest.raises(subsets.NoRowsError, match=r"needs points at 4 .* here are 3$"):
        curves.draw_extrapolation(table.from_rows(fewer), "eval_mse")


def test_extrapolation_of_each_number_of_tokens_is_of_its_models_alone(rows):
    figure = curves.draw_extrapolation_tokens(table.from_rows(rows), "eval_mse")
    assert len(figure.axes) == 3
    for axes, patch in zip(figure.axes, (8, 4, 2), strict=True):
        alone = [row for row in select_last_step(select_sizes(rows)) if row["patch_size"] == patch]
        found = fit.predict_largest(table.from_rows(alone), "eval_mse")
        tokens = f"{alone[0]['tokens']} tokens"
        title = f"{tokens}, fit of all but {found['model']}:"
        assert axes.get_title("right").startswith(title)
        drawn = {line.get_xdata()[0] for line in read_lines(axes)}
        assert {row["gmacs"] for row in alone} <= drawn
    with pytest.raises(subsets.NoRowsError, match="all models have the same tokens"):
        curves.draw_extrapolation_tokens(
            table.from_rows([r for r in rows if r["patch_size"] == 2]), "eval_mse"
        )
