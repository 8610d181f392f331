"""Figures that compare models by one property: tokens, depth, block or network."""

import itertools
import logging

import pandas as pd

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import styles, subsets
from experiments.scaling.fits import selection

logger = logging.getLogger("dit_jax")

BLOCKS = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")  # in the paper's order
NETWORKS = {"dit": "DiT", "unet": "UNet"}
TITLES = {"tokens": "at equal parameters", "depth": "at equal tokens and width"}


def draw_tokens_depth(rows: pd.DataFrame, quality: str):
    """Draws quality against tokens and against depth at the last step; returns the Figure.

    In the panel of tokens, all models of a line have the same depth and width. In the panel of
    depth, they have the same width and patch size. A panel without lines is left out.
    Raises: NoRowsError if neither panel has a line.
    """
    matplotlib = plot_style.import_matplotlib()

    panel_rows, reasons = {}, []
    for x, select in (("tokens", _select_for_tokens), ("depth", _select_for_depth)):
        try:
            panel_rows[x] = select(rows, quality)
        except subsets.NoRowsError as error:
            reasons.append(f"{x}: {error}")
    if not panel_rows:
        raise subsets.NoRowsError(", ".join(reasons))
    for reason in reasons:
        logger.info("no panel of %s.", reason)
    look = styles.Styles.from_table(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = styles.new_figure(len(panel_rows))
        for axes, (x, lines) in zip(panels, panel_rows.items(), strict=True):
            for _, line in lines.groupby("line", sort=False):
                _draw_line(axes, look, line, x, quality)
            axes.set_xlabel(plot_style.get_label(x))
            axes.set_title(TITLES[x], fontsize=8)
            axes.margins(x=0.08)
            plot_style.set_log_scale(axes.xaxis)
            styles.tick_values(axes.xaxis, set(lines[x]))
            styles.name_quality(axes, lines, quality, log=True)
        look.draw_legend(figure, pd.concat(panel_rows.values()))
    return figure


def _select_for_tokens(rows, quality):
    """Selects the lines against tokens, as `_select_lines`."""
    rows = subsets.require_last_step(subsets.select_standard(rows, "tokens"), quality)
    return _select_lines(rows, ["size"], "tokens", "size with 2 numbers of tokens")


def _select_for_depth(rows, quality):
    """Selects the lines against depth, as `_select_lines`."""
    same = ["hidden_size", "patch_size"]
    rows = subsets.require(subsets.select_common_block(rows), "depth", *same)
    rows = subsets.require_complete(rows, quality)
    rows = _select_lines(rows, same, "depth", "width and patch size with 2 depths")
    # Only now the last step is chosen, since other models may have been trained for longer.
    rows = subsets.require_last_step(rows, quality)
    return _select_lines(rows, same, "depth", "2 depths at its step")


def _select_lines(rows, same, x, description):
    """Returns the rows of lines with several values of x; a column `line` numbers the lines.

    Args: same, the columns that are equal in a line.   description, of a line, for the message.
    Raises: NoRowsError if there is no line.
    """
    lines = rows.groupby(same, sort=False)
    rows = rows.assign(line=lines.ngroup())[lines[x].transform("nunique") > 1]
    if rows.empty:
        raise subsets.NoRowsError(f"no {description}")
    return rows


def _draw_line(axes, look, rows, x, quality):
    """Draws a line through several models, each with the marker of its patch size."""
    curve = subsets.make_curve(rows, x, quality)
    color = look.get_color(rows.iloc[0])
    styles.draw_curve(axes, curve, color, "")
    # The models of a line differ in x, and so may their markers.
    models = rows.drop_duplicates(x, keep="last").set_index(x)
    for value, mean in zip(curve.points, curve.means(), strict=True):
        styles.draw_point(axes, mean, color, look.get_marker(models.loc[value]))


def draw_blocks(rows: pd.DataFrame, quality: str):
    """Draws quality against training steps, a color per block; returns the matplotlib Figure.

    It has all models with several blocks, each with its own dash style.
    Raises: NoRowsError if no model has several blocks.   Source: Peebles & Xie 2023, figure 5.
    """
    matplotlib = plot_style.import_matplotlib()
    new_line = matplotlib.lines.Line2D

    rows = subsets.require(rows, "block", "model", quality)
    # `require_complete` refuses rows of several blocks, so it is called for each block.
    by_block = rows.groupby("block", sort=False)
    rows = pd.concat([subsets.require_complete(of_block, quality) for _, of_block in by_block])
    sizes = ["model", "depth", "hidden_size"]
    blocks = rows.groupby(sizes, dropna=False)["block"].transform("nunique")
    drawn = rows[blocks > 1]
    if drawn.empty:
        raise subsets.NoRowsError("no model has several blocks")
    # The paper's blocks come first, so that they have the same colors in all figures.
    known = dict.fromkeys([*BLOCKS, *sorted(drawn["block"].unique())])
    colors = dict(zip(known, styles.make_colors(len(known)), strict=True))
    groups = drawn.groupby(sizes, sort=False, dropna=False)
    dashes = itertools.cycle(plot_style.DASHES)
    model_handles = []
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = styles.new_figure()
        for ((name, *_), model), dash in zip(groups, dashes, strict=False):
            for _, variant in model.groupby(selection.name_models(model), sort=False):
                curve = subsets.make_curve(variant, "step", quality)
                color = colors[variant["block"].iloc[0]]
                styles.draw_curve(axes, curve, color, "o", linestyle=dash)
            model_handles.append(new_line([], [], color="0.3", linestyle=dash, label=name))
        axes.set_xlabel(plot_style.get_label("step"))
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))  # 400k, 1M
        styles.name_quality(axes, drawn, quality, log=True)
        drawn_blocks = [block for block in known if block in set(drawn["block"])]
        handles = [new_line([], [], color=colors[block], label=block) for block in drawn_blocks]
        # The blocks take two lines, because their names are long.
        models = "model", model_handles
        styles.draw_legend(figure, ("block", handles[:2]), ("", handles[2:]), models)
    return figure


def draw_networks(rows: pd.DataFrame, quality: str):
    """Draws DiTs and UNets, a color per network; returns the matplotlib Figure.

    The left panel has quality against multiply-adds at the last step, a line per network. The right
    panel has quality against training compute, a line per model.
    Raises: NoRowsError if all rows are of one network.
    """
    matplotlib = plot_style.import_matplotlib()

    rows = subsets.require(rows, "network", "gmacs", "train_gflops", "step", quality)
    # A UNet has no block, so the rows differ in both columns.
    rows = selection.select_comparable(rows, quality, across=("network", "block"))
    networks = rows["network"].unique()
    if len(networks) < 2:
        raise subsets.NoRowsError(f"all rows are of one network, {networks[0]}")
    colors = dict(zip(NETWORKS, plot_style.COLORS, strict=False))
    unit, name = subsets.choose_unit(rows["train_gflops"])
    rows = rows.assign(compute=rows["train_gflops"] / unit)
    last = selection.select_last_step(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (by_size, by_compute) = styles.new_figure(2)
        for network, group in last.groupby("network", sort=False):
            curve = subsets.make_curve(group, "gmacs", quality)
            styles.draw_curve(by_size, curve, colors[network], "o")
        for _, model in rows.groupby(selection.name_models(rows), sort=False):
            curve = subsets.make_curve(model, "compute", quality)
            styles.draw_curve(by_compute, curve, colors[model["network"].iloc[0]], "o")
        by_size.set_title(f"after {last['step'].iloc[0]:,} steps", fontsize=8)
        by_size.set_xlabel(plot_style.get_label("gmacs"))
        by_compute.set_title("a line to a model", fontsize=8)
        by_compute.set_xlabel(f"training compute ({name})")
        for axes in (by_size, by_compute):
            plot_style.set_log_scale(axes.xaxis)
            styles.name_quality(axes, rows, quality, log=True)
        handles = [
            matplotlib.lines.Line2D(
                [], [], color=colors[network], marker="o", label=NETWORKS[network]
            )
            for network in colors
            if network in networks
        ]
        styles.draw_legend(figure, ("network", handles))
    return figure
