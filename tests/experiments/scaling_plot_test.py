"""All figures of a study: their common look, their files, and tables without their rows."""

import logging
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from helpers.close import assert_close
from helpers.figures import get_look, read_legend, read_lines, select_sizes
from helpers.sweep import SIZES, rows_of, samples_of, study
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import comparisons, curves, plot, styles
from experiments.scaling.fits import table

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


def test_models_look_the_same_in_all_figures(rows):
    look = styles.Styles.from_table(table.from_rows(rows))
    assert look.colors == dict(zip(SIZES, plot_style.COLORS, strict=False))  # by parameters
    assert look.markers == {2: "o", 4: "s", 8: "D"}
    expected = {(look.colors[size], m) for size in SIZES for m in look.markers.values()}
    for draw in (curves.draw_gflops, curves.draw_compute):
        figure = draw(table.from_rows(rows), "eval_mse")
        assert sorted(map(get_look, read_lines(figure.axes[0]))) == sorted(expected)
        assert read_legend(figure) == [
            *("size", "patch size", "XS", "2", "S", "4", "B", "8", "L", "XL")
        ]
    tokens, depth = comparisons.draw_tokens_depth(table.from_rows(rows), "eval_mse").axes
    assert {get_look(line) for line in read_lines(tokens, "_mean")} == expected
    assert {get_look(line) for line in read_lines(depth, "_mean")} == {
        (look.colors[size], "s") for size in ("S", "L")
    }
    deep = comparisons.draw_tokens_depth(
        table.from_rows([r for r in rows if r["patch_size"] == 4]), "eval_mse"
    )
    assert read_legend(deep) == ["size", "patch size", "S", "4", "L"]  # no more than is drawn
    for axes in curves.draw_isoflop(table.from_rows(rows), "eval_mse").axes[:-1]:
        points = {get_look(line) for line in read_lines(axes) if len(line.get_xdata()) == 1}
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
    assert read_legend(figure) == ["width", "patch size", "128", "4", "256"]
    assert len({line.get_color() for line in read_lines(figure.axes[0])}) == 2
    finer = [{**row, "tokens": 64, "patch_size": 2, "size": f"{row['size']}+"} for row in many]
    figure = curves.draw_compute(table.from_rows([*many, *finer]), "eval_mse")
    assert [axes.get_title() for axes in figure.axes] == ["16 tokens", "64 tokens"]
    assert [len(read_lines(axes)) for axes in figure.axes] == [8, 8]
    assert figure.get_suptitle().startswith("best of all ")


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
    first, second = ([line.get_xydata().tolist() for line in read_lines(f.axes[0])] for f in pair)
    assert first == second


def test_published_models_correlate_as_published():
    published = table.read(ROOT / "experiments/scaling/published.csv")
    (axes,) = curves.draw_gflops(published, "fid").axes
    assert len(read_lines(axes)) == 12
    assert axes.get_title("right").endswith("$r = -0.93$")  # the paper's figure 2
    assert axes.get_ylabel() == "FID (50,000 samples)"
    blocks = table.read(ROOT / "experiments/scaling/published_blocks.csv")
    (axes,) = comparisons.draw_blocks(blocks, "fid").axes
    assert sorted(float(line.get_ydata()[0]) for line in read_lines(axes)) == [
        *(19.47, 25.21, 26.14, 35.24)
    ]


def test_ticks_and_labels_do_not_overlap(rows):
    some = [row for row in select_sizes(rows) if row["patch_size"] == 2]
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
    single = [r for r in rows if r["model"] == "S/2" and r["grid"] == "sizes"]
    some = single + [r for r in rows if r["model"] == "B/2"]
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
        plot.write(table.from_rows(single), ["eval_mse"], None, tmp_path)


def test_a_panel_without_rows_leaves_the_other(rows, log):
    figure = comparisons.draw_tokens_depth(table.from_rows(select_sizes(rows)), "eval_mse")
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
