"""Figures that compare tokens, depths and blocks have a line for each."""

import pytest
from helpers.figures import (
    assert_points,
    compute_means,
    read_lines,
    select_last_step,
    select_sizes,
)
from helpers.sweep import SIZES, rows_of, study

from experiments.scaling.figures import comparisons
from experiments.scaling.fits import table


@pytest.fixture(scope="module")
def rows():
    return study()


def test_tokens_and_depth_are_side_by_side(rows):
    figure = comparisons.draw_tokens_depth(table.from_rows(rows), "eval_mse")
    tokens, depth = figure.axes
    assert [a.get_xlabel() for a in figure.axes] == ["tokens of an image", "depth (blocks)"]
    sized = select_last_step(select_sizes(rows))
    lines = [line for line in read_lines(tokens) if len(line.get_xdata()) > 1]
    for line, size in zip(lines, SIZES, strict=True):
        ((_, expected),) = compute_means(
            [{**row, "patch_size": 0} for row in sized if row["size"] == size], "tokens"
        ).items()
        assert_points(line.get_xydata(), expected)
    grid = [
        row
        for row in select_last_step(rows)
        if row["patch_size"] == 4 and row["size"] in ("S", "L")
    ]
    expected = compute_means(grid, "depth")
    lines = [line for line in read_lines(depth) if len(line.get_xdata()) > 1]
    assert len(lines) == 2
    for line, size in zip(lines, ("S", "L"), strict=True):
        assert list(line.get_xdata()) == [2, 4, 8, 16]
        assert_points(line.get_xydata(), expected[size, 4])
    ticks = [text.get_text() for text in depth.get_xticklabels()]
    assert ticks == ["2", "4", "8", "16"]


def test_depths_of_several_patch_sizes_are_lines_of_their_own(rows):
    more = rows + rows_of("S", 2, depth=8, grid="depth")
    _, axes = comparisons.draw_tokens_depth(table.from_rows(more), "eval_mse").axes
    lines = [line for line in read_lines(axes) if len(line.get_xdata()) > 1]
    assert sorted(list(line.get_xdata()) for line in lines) == [[2, 4, 8, 16]] * 2 + [[4, 8]]
    marks = [line.get_marker() for line in read_lines(axes, "_mean")]
    assert sorted(marks) == ["o"] * 2 + ["s"] * 8


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
    lines = read_lines(axes)
    assert len(lines) == len(colors) == 4
    for line in lines:
        block = [r for r in rows if r["block"] == colors[line.get_color()] and r["model"] == "S/2"]
        ((_, expected),) = compute_means(block, "step").items()
        assert_points(line.get_xydata(), expected)
    assert axes.get_xlabel() == "training steps"
