"""Plots of curves: their lines, points, axes and legends, and the command."""

import io
import json
import re
import warnings

import pytest
from helpers.evaluations import make_row

from dit_jax.evaluation import curves, plots
from dit_jax.system import files


def test_seeds_are_drawn_with_their_mean():
    rows = [make_row(cfg_scale=1, seed=seed, fid=fid) for seed, fid in enumerate((4.0, 6.0, 8.0))]
    rows.append(make_row(cfg_scale=2, fid=3.0))
    (curve,) = curves.from_rows(rows, "cfg_scale", "fid")
    assert curve.means() == [(1, 6), (2, 3)]
    axes = plots.draw(rows, "cfg_scale", "fid").axes[0]
    line, points = axes.lines
    assert line.get_xydata().tolist() == [[1, 6], [2, 3]]
    assert points.get_xydata().tolist() == [[1, 4], [1, 6], [1, 8]]
    assert points.get_linestyle() == "None"
    assert [text.get_text() for text in axes.get_legend().texts] == ["mean of 1 to 3 seeds"]
    rows[-1:] = [make_row(cfg_scale=2, seed=seed, fid=3.0) for seed in range(3)]
    assert curves.from_rows(rows, "cfg_scale", "fid")[0].describe_seeds() == "mean of 3 seeds"


def test_points_of_two_measures_are_joined_and_labelled_by_guidance():
    recall = {1: 0.6, 1.5: 0.7, 4: 0.2}  # not monotonic
    rows = [make_row(cfg_scale=cfg, recall=recall[cfg], precision=cfg / 5) for cfg in (4, 1, 1.5)]
    axes = plots.draw(rows, "recall", "precision").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.6, 0.2], [0.7, 0.3], [0.2, 0.8]]
    labelled = {text.get_text(): text.xy for text in axes.texts}
    assert labelled == {"1": (0.6, 0.2), "1.5": (0.7, 0.3), "4": (0.2, 0.8)}
    assert axes.get_legend().get_title().get_text() == "at points: guidance scale"
    assert axes.get_xlabel() == "recall"
    assert axes.get_ylabel() == "precision (50,000 samples)"


def test_models_are_points_with_names_and_without_a_line():
    gmacs = {"s": 6.06, "b": 23.0, "xl": 118.6}
    rows = [make_row(workdir=name, gmacs=g, fid=100 / g) for name, g in gmacs.items()]
    axes = plots.draw(rows, "gmacs", "fid").axes[0]
    (line,) = axes.lines
    assert line.get_linestyle() == "None"
    assert line.get_xdata().tolist() == [6.06, 23.0, 118.6]
    assert [text.get_text() for text in axes.texts] == ["s", "b", "xl"]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "multiply-adds of one pass (G)"


@pytest.mark.parametrize(
    ("x", "fids", "scales"),
    [
        ("cfg_scale", (2.0, 19.0), ("linear", "linear")),
        ("cfg_scale", (2.0, 21.0), ("linear", "log")),
        ("steps", (2.0, 3.0), ("log", "linear")),
        ("train_gflops", (2.0, 3.0), ("log", "linear")),
        ("step", (2.0, 3.0), ("linear", "linear")),
    ],
)
def test_scale_of_the_axes(x, fids, scales):
    rows = [make_row(steps=10 * n, cfg_scale=n, step=n, fid=fid) for n, fid in enumerate(fids, 1)]
    axes = plots.draw(rows, x, "fid").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == scales


@pytest.mark.parametrize("values", [(250, 250), (240, 250), (5, 250), (3, 10_000)])
def test_log_axes_have_readable_ticks(values):
    figure = plots.draw([make_row(steps=steps, fid=2.0) for steps in values], "steps", "fid")
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    shown = [label.get_text() for at, label in ticks if low <= at <= high]
    assert len(shown) >= 2
    assert all(shown)


def test_axis_labels_are_readable():
    rows = [make_row(fid=2.0, fd_dinov2=200.0, precision_pixels=0.5)]
    assert plots.get_axis_label(rows, "fid", with_num=True) == "FID (50,000 samples)"
    assert plots.get_axis_label(rows, "fd_dinov2") == "FD of DINOv2"
    assert plots.get_axis_label(rows, "precision_pixels") == "precision of pixels"
    assert plots.get_axis_label(rows, "cfg_scale", with_num=True) == "guidance scale"
    assert plots.get_axis_label(rows, "steps") == "sampling steps"
    bits = [{"step": 1, "likelihood": {"kind": "vlb", "num": 1000}, "bits_per_dim": 3.0}]
    label = plots.get_axis_label(bits, "bits_per_dim", with_num=True)
    assert " ".join(label.split()) == "bits per dimension (1,000 held-out images)"
    other = make_row(num=10, precision_pixels=0.5)  # the same files may have other rows
    axes = plots.draw([*rows, other, *bits], "cfg_scale", "fid").axes[0]
    assert axes.get_ylabel() == "FID (50,000 samples)"


@pytest.mark.parametrize("name", ["fid", "cfg_scale"])
def test_numbers_that_matplotlib_cannot_draw_are_refused_with_their_row(name):
    for value in (1.7e308, -1.7e308, 5e-324, -1e-200, 10**308):
        rows = [make_row(fid=2.0), make_row(seed=1, fid=2.0, place="runs/a row 3") | {name: value}]
        message = re.escape(f"runs/a row 3 has {name}={str(value)[:100]}")
        with pytest.raises(ValueError, match=message):
            curves.from_rows(rows, "cfg_scale", "fid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ((1e100, -1e100), (1e100, 1e-100), (0, -1e-100)):
            rows = [make_row(cfg_scale=c, fid=2.0) | {name: c} for c in values]
            plots.draw(rows, "cfg_scale", "fid").savefig(io.BytesIO(), format="svg")


def test_many_curves_look_different_and_have_their_legend_outside():
    rows = [make_row(workdir=f"run{i:02}", cfg_scale=c, fid=3.0) for i in range(12) for c in (1, 2)]
    figure = plots.draw(rows, "cfg_scale", "fid")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12
    assert figure.axes[0].get_legend() is None
    assert len(figure.legends[0].texts) == 12


@pytest.mark.parametrize("count", [2, 6])  # the legend is inside and outside the axes
def test_names_are_drawn_unchanged(count):
    """matplotlib gives a leading underscore and dollar signs a meaning."""
    names = ["_small", "a$b$c", "$\\nothing$", "__", "_curve", "_seeds"][:count]
    rows = [make_row(workdir=n, cfg_scale=c, fid=3.0, gmacs=c) for n in names for c in (1, 2)]
    figure = plots.draw(rows, "cfg_scale", "fid")
    legend = figure.axes[0].get_legend() or figure.legends[0]
    assert sorted(map(_get_drawn_text, legend.texts)) == sorted(names)
    assert len({handle.get_marker() for handle in legend.legend_handles}) == count
    figure = plots.draw(rows, "workdir", "fid")
    figure.canvas.draw()
    assert sorted(map(_get_drawn_text, figure.axes[0].get_xticklabels())) == sorted(names)
    figure = plots.draw(rows, "gmacs", "fid")
    figure.canvas.draw()
    assert {_get_drawn_text(text) for text in figure.axes[0].texts} == {*names}


def test_control_characters_of_names_are_drawn_as_escapes():
    """matplotlib would warn of each, because no font has them."""
    rows = [make_row(sampler=f"a\x1b[31m\n{c}", cfg_scale=c, fid=c, gmacs=c) for c in (1, 2)]
    rows = [row | {"workdir": "b\x07"} for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in ("cfg_scale", "sampler", "gmacs"):
            figure = plots.draw(rows, x, "fid")
            figure.savefig(io.BytesIO(), format="png")
            texts = [*figure.axes[0].texts, *figure.axes[0].get_xticklabels()]
            for legend in (figure.axes[0].get_legend(), *figure.legends):
                texts += legend.texts if legend else []
            shown = " ".join(map(_get_drawn_text, texts))
            assert r"a\x1b[31m\n1" in shown or (x == "gmacs" and r"b\x07" in shown)
            assert files.printable(shown) == shown


def _get_drawn_text(text):
    """Returns the string that matplotlib draws for a Text."""
    drawn, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    return drawn


def test_command_draws_a_png_or_refuses_without_a_traceback(run_command, tmp_path):
    path, out = tmp_path / "dit" / "evaluations.jsonl", tmp_path / "plots" / "fid.png"
    path.parent.mkdir()
    rows = [make_row(sampler, cfg_scale=c, fid=c) for sampler in ("ddpm", "ddim") for c in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "plot", "--rows", f"{tmp_path}/*/evaluations.jsonl", "--x", "cfg_scale"
    printed = run_command(*arguments, "--y", "fid", "--where", "sampler=ddpm", "--out", out)
    assert printed.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    error = run_command(
        *arguments, "--y", "fid", "--where", "sampler=heun", "--out", out, fails=True
    )
    assert "error: no row has sampler=heun. The rows have sampler ddpm, ddim." in error
    assert "Traceback" not in error


def test_svg_file_is_svg(tmp_path):
    plots.plot([make_row(fid=2.0)], "cfg_scale", "fid", tmp_path / "fid.svg")
    assert "<svg" in (tmp_path / "fid.svg").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["fid.svg"]
