"""What the tests of a study's figures read from them, and expect of its rows."""

import numpy as np
from helpers.close import assert_trees_close
from helpers.sweep import STEPS


def read_lines(axes, label=None):
    """The lines of data in the axes; with a label, the lines with that label."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    if label:
        return [line for line in lines if line.get_label() == label]
    return [line for line in lines if line.get_label() not in ("_seeds", "_law", "_optimum")]


def compute_means(rows, x, y="eval_mse"):
    """{(size, patch): [(x, mean of seeds), ...]}, computed the long way."""
    points_of = {}
    for row in rows:
        points = points_of.setdefault((row["size"], row["patch_size"]), {})
        points.setdefault(row[x], []).append(row[y])
    return {
        model: [(value, np.mean(points[value])) for value in sorted(points)]
        for model, points in points_of.items()
    }


def select_last_step(rows):
    return [row for row in rows if row["step"] == STEPS[-1]]


def select_sizes(rows):
    return [row for row in rows if row["grid"] == "sizes"]


def get_look(line):
    return line.get_color(), line.get_marker()


def read_legend(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.texts if text.get_text()]


def assert_points(actual, expected):
    """Compares the points of a line; x and y have different scales."""
    assert_trees_close(list(np.transpose(actual)), list(np.transpose(expected)), 1e-12)
