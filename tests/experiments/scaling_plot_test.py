"""What the figures of a study show of its table."""

import logging
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from helpers.close import assert_close, assert_trees_close
from helpers.sweep import SIZES, STEPS, rows_of, samples_of, study
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import comparisons, curves, plot, styles, subsets
from experiments.scaling.fits import fit, laws, table

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return study()


@pytest.fixture
def log(caplog):
    """The lines of the log so far."""
    logging.getLogger("dit_jax").propagate = True
    caplog.set_level(logging.INFO, logger="dit_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def _lines(axes, label=None):
    """Of data; or those of a label."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    if label:
        return [line for line in lines if line.get_label() == label]
    return [line for line in lines if line.get_label() not in ("_seeds", "_law", "_optimum")]


def _means(rows, x, y="eval_mse"):
    """{(size, patch): [(x, mean of seeds), ...]}, the long way."""
    found = {}
    for row in rows:
        points = found.setdefault((row["size"], row["patch_size"]), {})
        points.setdefault(row[x], []).append(row[y])
    return {
        model: [(at, np.mean(points[at])) for at in sorted(points)]
        for model, points in found.items()
    }


def _at_last(rows):
    return [row for row in rows if row["step"] == STEPS[-1]]


def _sizes(rows):
    return [row for row in rows if row["grid"] == "sizes"]


def _runs(rows, quality):
    """multiply-adds and quality of each run of the sizes at the last step."""
    return np.array([[row["gmacs"], row[quality]] for row in _at_last(_sizes(rows))]).T


def _look(line):
    return line.get_color(), line.get_marker()


def _legend(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.texts if text.get_text()]


def _assert_points(actual, expected):
    """Of a line: its x and its y have scales of their own."""
    assert_trees_close(list(np.transpose(actual)), list(np.transpose(expected)), 1e-12)


def test_gflops_are_of_all_models_at_the_last_step_with_line_and_correlation(rows):
    figure = curves.draw_gflops(table.from_rows(rows), "fd_pixels")
    (axes,) = figure.axes
    expected = _means(_at_last(_sizes(rows)), "gmacs", "fd_pixels")
    drawn = sorted(tuple(line.get_xydata()[0]) for line in _lines(axes))
    _assert_points(drawn, sorted(p for (p,) in expected.values()))
    assert {line.get_linestyle() for line in _lines(axes)} <= {"-"}  # of one point each
    x, y = _runs(rows, "fd_pixels")
    line = laws.fit_line(x, y)  # of runs, as `fit.fit_lines`
    (law,) = _lines(axes, "_law")
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
    (line,) = _lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata()), 1e-9)
    text = rf"fit ${law.a:.3g} + {law.b:.3g}\,G^{{-{law.c:.2g}}}$, $r = -0."
    assert axes.get_title("right").startswith(text)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "held-out MSE"  # of no samples


def test_compute_has_a_line_to_a_model_and_the_law_of_the_best(rows):
    figure = curves.draw_compute(table.from_rows(rows), "eval_mse")
    (axes,) = figure.axes
    expected = _means(_sizes(rows), "train_gflops")
    drawn = {tuple(line.get_ydata()): line.get_xdata() for line in _lines(axes)}
    assert len(drawn) == len(expected) == 15
    for points in expected.values():
        x, y = zip(*points, strict=True)
        assert_close(drawn[y], np.array(x) / 1e3, 1e-14)
    assert axes.get_xlabel() == "training compute (TFLOPs)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    best = fit.find_envelope(table.from_rows(_sizes(rows)), "eval_mse")
    law = laws.fit_power_law(best["train_gflops"], best["eval_mse"])
    (line,) = _lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata() * 1e3), 1e-4)
    b = f"{law.b * 1e3**-law.c:.3g}"
    assert axes.get_title("right") == (
        rf"best of all ${law.a:.3g} + {b}\,C^{{-{law.c:.2g}}}$, $C$ in TFLOPs"
    )


def test_seeds_are_faint_beside_their_mean(rows):
    (axes,) = curves.draw_compute(table.from_rows(rows), "fd_pixels").axes
    seeds = _lines(axes, "_seeds")
    assert sum(len(line.get_xdata()) for line in seeds) == len(_sizes(rows))
    assert {line.get_alpha() for line in seeds} == {0.5}
    single = [row for row in rows if row["seed"] == 0]
    assert not _lines(curves.draw_compute(table.from_rows(single), "fd_pixels").axes[0], "_seeds")


def test_what_rises_with_compute_has_no_law_and_no_optimum(rows):
    (axes,) = curves.draw_compute(table.from_rows(rows), "label_accuracy").axes
    assert not _lines(axes, "_law")
    assert axes.get_yscale() == "linear"
    with pytest.raises(subsets.NoRowsError, match="of label_accuracy more is better"):
        curves.draw_isoflop(table.from_rows(rows), "label_accuracy")


def test_what_is_not_positive_has_a_linear_axis_and_no_law(rows):
    (axes,) = curves.draw_compute(
        table.from_rows([{**row, "eval_vb": -1.0} for row in rows]), "eval_vb"
    ).axes
    assert axes.get_yscale() == "linear"
    assert not _lines(axes, "_law")
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
    found = fit.find_optima(table.from_rows(_sizes(rows)), "eval_mse")
    shown = 0
    for panel, tokens in zip(axes, (4, 16, 64), strict=True):
        of_tokens = [budget for budget in found if budget["tokens"] == tokens]
        known = {tuple(m["quality"] for m in b["models"]): b for b in of_tokens}
        lines = [line for line in _lines(panel) if len(line.get_xdata()) > 1]
        assert 2 <= len(lines) <= curves.BUDGETS
        budgets = [known[tuple(line.get_ydata())] for line in lines]
        greys = [line.get_color()[0] for line in lines]
        assert greys == sorted(greys, reverse=True)  # darker with compute
        optima = [(b["gmacs"], b["quality"]) for b in budgets if b["bracketed"]]
        stars = [tuple(*line.get_xydata()) for line in _lines(panel, "_optimum")]
        assert stars == optima
        shown += len(stars)
    assert shown >= 2
    assert "optimum" in _legend(figure)


def test_tokens_and_depth_are_side_by_side(rows):
    figure = comparisons.draw_tokens_depth(table.from_rows(rows), "eval_mse")
    tokens, depth = figure.axes
    assert [a.get_xlabel() for a in figure.axes] == ["tokens of an image", "depth (blocks)"]
    sized = _at_last(_sizes(rows))
    lines = [line for line in _lines(tokens) if len(line.get_xdata()) > 1]
    for line, size in zip(lines, SIZES, strict=True):
        ((_, expected),) = _means(
            [{**row, "patch_size": 0} for row in sized if row["size"] == size], "tokens"
        ).items()
        _assert_points(line.get_xydata(), expected)
    grid = [row for row in _at_last(rows) if row["patch_size"] == 4 and row["size"] in ("S", "L")]
    expected = _means(grid, "depth")
    lines = [line for line in _lines(depth) if len(line.get_xdata()) > 1]
    assert len(lines) == 2
    for line, size in zip(lines, ("S", "L"), strict=True):
        assert list(line.get_xdata()) == [2, 4, 8, 16]
        _assert_points(line.get_xydata(), expected[size, 4])
    ticks = [text.get_text() for text in depth.get_xticklabels()]
    assert ticks == ["2", "4", "8", "16"]


def test_depths_of_several_patch_sizes_are_lines_of_their_own(rows):
    more = rows + rows_of("S", 2, depth=8, grid="depth")
    _, axes = comparisons.draw_tokens_depth(table.from_rows(more), "eval_mse").axes
    lines = [line for line in _lines(axes) if len(line.get_xdata()) > 1]
    assert sorted(list(line.get_xdata()) for line in lines) == [[2, 4, 8, 16]] * 2 + [[4, 8]]
    marks = [line.get_marker() for line in _lines(axes, "_mean")]
    assert sorted(marks) == ["o"] * 2 + ["s"] * 8


def test_models_look_the_same_in_all_figures(rows):
    look = styles.Styles.from_table(table.from_rows(rows))
    assert look.colors == dict(zip(SIZES, plot_style.COLORS, strict=False))  # by parameters
    assert look.markers == {2: "o", 4: "s", 8: "D"}
    expected = {(look.colors[size], m) for size in SIZES for m in look.markers.values()}
    for draw in (curves.draw_gflops, curves.draw_compute):
        figure = draw(table.from_rows(rows), "eval_mse")
        assert sorted(map(_look, _lines(figure.axes[0]))) == sorted(expected)
        assert _legend(figure) == [
            *("size", "patch size", "XS", "2", "S", "4", "B", "8", "L", "XL")
        ]
    tokens, depth = comparisons.draw_tokens_depth(table.from_rows(rows), "eval_mse").axes
    assert {_look(line) for line in _lines(tokens, "_mean")} == expected
    assert {_look(line) for line in _lines(depth, "_mean")} == {
        (look.colors[size], "s") for size in ("S", "L")
    }
    deep = comparisons.draw_tokens_depth(
        table.from_rows([r for r in rows if r["patch_size"] == 4]), "eval_mse"
    )
    assert _legend(deep) == ["size", "patch size", "S", "4", "L"]  # no more than is drawn
    for axes in curves.draw_isoflop(table.from_rows(rows), "eval_mse").axes[:-1]:
        points = {_look(line) for line in _lines(axes) if len(line.get_xdata()) == 1}
        assert points <= expected
        assert len(points) >= 3


def test_of_many_sizes_the_legend_has_the_widths():
    many = [
        {**row, "size": f"{size}x{i}", "model": f"{size}x{i}/4"}
        for size in ("S", "L")
        for i in (2, 3, 4, 5)
        for row in rows_of(size, 4, depth=i)
    ]
    figure = curves.draw_gflops(table.from_rows(many), "eval_mse")
    assert _legend(figure) == ["width", "patch size", "128", "4", "256"]
    assert len({line.get_color() for line in _lines(figure.axes[0])}) == 2
    finer = [{**row, "tokens": 64, "patch_size": 2, "size": f"{row['size']}+"} for row in many]
    figure = curves.draw_compute(table.from_rows([*many, *finer]), "eval_mse")
    assert [axes.get_title() for axes in figure.axes] == ["16 tokens", "64 tokens"]
    assert [len(_lines(axes)) for axes in figure.axes] == [8, 8]
    assert figure.get_suptitle().startswith("best of all ")


def test_small_numbers_are_written_as_powers_of_ten():
    law = laws.PowerLaw(0.128, 2.44e-5, 0.78)
    assert curves._equation(law, "G") == r"$0.128 + 2.44\times 10^{-5}\,G^{-0.78}$"


def test_blocks_have_a_color_each_over_steps(rows):
    figure = comparisons.draw_blocks(table.from_rows(rows), "eval_mse")
    (axes,) = figure.axes
    names = ["in-context", "cross-attention", "adaLN", "adaLN-Zero"]
    entries = {
        t.get_text(): h
        for t, h in zip(figure.legends[0].texts, figure.legends[0].legend_handles, strict=True)
    }
    colors = {entries[name].get_color(): name for name in names}
    assert "S/2" in entries
    lines = _lines(axes)
    assert len(lines) == len(colors) == 4
    for line in lines:
        block = [r for r in rows if r["block"] == colors[line.get_color()] and r["model"] == "S/2"]
        ((_, expected),) = _means(block, "step").items()
        _assert_points(line.get_xydata(), expected)
    assert axes.get_xlabel() == "training steps"


def test_gflops_are_at_the_last_step_that_all_have(rows):
    short = [r for r in rows if not (r["model"] == "XL/2" and r["step"] == STEPS[-1])]
    (axes,) = curves.draw_gflops(table.from_rows(short), "eval_mse").axes
    expected = _means([row for row in _sizes(rows) if row["step"] == STEPS[-2]], "gmacs")
    drawn = sorted(tuple(line.get_xydata()[0]) for line in _lines(axes))
    _assert_points(drawn, sorted(p for (p,) in expected.values()))


def test_rows_that_cannot_be_compared_are_refused_with_a_way_out(rows, tmp_path):
    other = [{**row, "learning_rate": 1e-4} for row in rows_of("S", 2)]
    with pytest.raises(ValueError, match=r"across learning_rate: (?s:.*)--where"):
        plot.write(table.from_rows(rows + other), ["eval_mse"], None, tmp_path)
    other = [{**row, "sampling_steps": 250} for row in rows_of("S", 2)]
    with pytest.raises(ValueError, match="label_accuracy cannot be compared across sampling_steps"):
        plot.write(table.from_rows(rows + other), ["label_accuracy"], None, tmp_path)
    assert list(tmp_path.iterdir()) == []
    twice = [{**row, "grid": "again"} for row in rows if row["seed"] == 1]
    pair = (
        curves.draw_compute(table.from_rows(rows), "eval_mse"),
        curves.draw_compute(table.from_rows(rows + twice), "eval_mse"),
    )
    first, second = ([line.get_xydata().tolist() for line in _lines(f.axes[0])] for f in pair)
    assert first == second


def test_extrapolation_shows_the_largest_model_beside_the_law_of_the_others(rows):
    figure = curves.draw_extrapolation(table.from_rows(rows), "eval_mse")
    (axes,) = figure.axes
    sized = _at_last(_sizes(rows))
    most = max(row["gmacs"] for row in sized)
    others = [row for row in sized if row["gmacs"] < most]
    largest = [row["eval_mse"] for row in sized if row["gmacs"] == most]
    law = laws.fit_power_law(*([row[name] for row in others] for name in ("gmacs", "eval_mse")))
    (line,) = _lines(axes, "_law")
    assert_close(line.get_ydata(), law(line.get_xdata()), 1e-9)
    assert line.get_xdata()[-1] == pytest.approx(most)
    (held_out,) = [line for line in _lines(axes) if line.get_markerfacecolor() == "white"]
    _assert_points(held_out.get_xydata(), [[most, np.mean(largest)]])
    assert _look(held_out) == (plot_style.COLORS[4], "o")
    assert len(_lines(axes)) == 15
    found = fit.predict_largest(table.from_rows(sized), "eval_mse")
    drawn = {c.get_label(): c.get_paths()[0].vertices for c in axes.collections}
    _assert_points(drawn["_interval"], [(most, end) for end in found["interval"]])
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
        alone = [row for row in _at_last(_sizes(rows)) if row["patch_size"] == patch]
        found = fit.predict_largest(table.from_rows(alone), "eval_mse")
        tokens = f"{alone[0]['tokens']} tokens"
        title = f"{tokens}, fit of all but {found['model']}:"
        assert axes.get_title("right").startswith(title)
        drawn = {line.get_xdata()[0] for line in _lines(axes)}
        assert {row["gmacs"] for row in alone} <= drawn
    with pytest.raises(subsets.NoRowsError, match="all models have the same tokens"):
        curves.draw_extrapolation_tokens(
            table.from_rows([r for r in rows if r["patch_size"] == 2]), "eval_mse"
        )


def test_published_models_correlate_as_published():
    published = table.read(ROOT / "experiments/scaling/published.csv")
    (axes,) = curves.draw_gflops(published, "fid").axes
    assert len(_lines(axes)) == 12
    assert axes.get_title("right").endswith("$r = -0.93$")  # the paper's figure 2
    assert axes.get_ylabel() == "FID (50,000 samples)"
    blocks = table.read(ROOT / "experiments/scaling/published_blocks.csv")
    (axes,) = comparisons.draw_blocks(blocks, "fid").axes
    assert sorted(float(line.get_ydata()[0]) for line in _lines(axes)) == [
        *(19.47, 25.21, 26.14, 35.24)
    ]


def test_ticks_and_labels_do_not_overlap(rows):
    some = [row for row in _sizes(rows) if row["patch_size"] == 2]
    unets = [dict(row, network="unet", block=None, patch_size=None) for row in some]
    drawn = [
        draw(table.from_rows([*some, *unets] if name == "networks" else rows), quality)
        for quality in ("eval_mse", "fd_pixels")
        for name, draw in plot.FIGURES.items()
    ]
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        renderer = figure.canvas.get_renderer()
        texts = [text for legend in figure.legends for text in legend.texts]
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if not axis.get_tick_params().get("labelleft", True):
                    continue  # shared with the panel on the left
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                shown = [label for at, label in ticks if low <= at <= high]
                # A colorbar has an axis without ticks.
                assert len(shown) >= 2 or not shown
                texts += [*shown, axis.label]
            texts += [axes.title, axes._right_title]
        boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert figure.get_size_inches()[0] in (plot_style.WIDTH, styles.WIDE)


def test_a_table_that_cannot_be_compared_is_refused_before_anything_is_drawn(rows, tmp_path):
    mixed = [*rows[:-1], {**rows[-1], "num": 50}]
    with pytest.raises(ValueError, match="fd_pixels cannot be compared across num"):
        plot.write(table.from_rows(mixed), ["eval_mse", "fd_pixels"], None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_figures_without_rows_are_left_out_and_told(rows, log, tmp_path):
    one = [r for r in rows if r["model"] == "S/2" and r["grid"] == "sizes"]
    some = one + [r for r in rows if r["model"] == "B/2"]
    for row in (some := [dict(row) for row in some])[:3]:
        row["eval_mse"] = None
    written = plot.write(table.from_rows(some), ["eval_mse", "kid"], None, tmp_path)
    names = {path.name for path in written}
    assert names == {f"{n}_eval_mse.{s}" for n in ("gflops", "compute") for s in ("png", "svg")}
    assert names == {path.name for path in tmp_path.iterdir()}
    lines = "\n".join(log())
    for line in (
        "3 of 16 rows have no eval_mse",
        "no isoflop_eval_mse: no compute was passed by 3 models of equal tokens.",
        "no tokens_depth_eval_mse: tokens: no size with 2 numbers of tokens, depth: no width",
        "no blocks_eval_mse: no model has several blocks.",
        "no gflops_kid: no row has kid.",
        "no line of eval_mse: a line needs points at 3",
    ):
        assert line in lines
    with pytest.raises(
        ValueError, match=r"nothing to draw:(?s:.*)gflops_eval_mse: all rows are of"
    ):
        plot.write(table.from_rows(one), ["eval_mse"], None, tmp_path)


def test_a_panel_without_rows_leaves_the_other(rows, log):
    figure = comparisons.draw_tokens_depth(table.from_rows(_sizes(rows)), "eval_mse")
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens of an image"]
    assert figure.get_size_inches()[0] == plot_style.WIDTH
    assert log() == ["no panel of depth: no width and patch size with 2 depths."]


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.scaling.plot", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_command_writes_all_files_small_and_the_same_in_any_process(tmp_path):
    small = [
        row for size in ("XS", "S") for patch in (2, 4) for row in rows_of(size, patch, seeds=1)
    ]
    arrays = samples_of(["XS/2", "S/4"])
    table.write(tmp_path / "toy.csv", small)
    np.savez(tmp_path / "samples.npz", **arrays)
    given = "--table", tmp_path / "toy.csv", "--samples", tmp_path / "samples.npz"
    done = _command(*given, "--qualities", "eval_mse")
    assert done.returncode == 0, done.stderr
    names = ("gflops_eval_mse", "compute_eval_mse", "tokens_depth_eval_mse", "samples")
    paths = [tmp_path / "figures" / f"{name}.{form}" for name in names for form in ("png", "svg")]
    assert done.stdout.split() == [str(path) for path in paths]
    assert "no blocks_eval_mse" in done.stderr
    for path, again in zip(
        paths,
        plot.write(table.from_rows(small), ["eval_mse"], arrays, tmp_path / "again"),
        strict=True,
    ):
        data = path.read_bytes()
        assert data == again.read_bytes()
        assert len(data) < 300_000
        if path.suffix == ".svg":
            ElementTree.fromstring(data)
            assert not re.search(rb"\d{4}-\d\d-\d\dT", data)
        else:
            assert_close(Image.open(path).info["dpi"], (200, 200), 5e-5)
            assert b"Software" not in data


def test_command_refuses_without_a_traceback(tmp_path):
    done = _command("--table", tmp_path / "toy.csv")
    assert done.returncode == 1
    assert f"error: no table {tmp_path}/toy.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figures").exists()
