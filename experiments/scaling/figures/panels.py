"""Figures that compare models by one property: tokens, depth, block or network."""

import logging

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import looks
from experiments.scaling.fits import selection

logger = logging.getLogger("dit_jax")

BLOCKS = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")  # in the paper's order
NETWORKS = {"dit": "DiT", "unet": "UNet"}
TITLES = {"tokens": "at equal parameters", "depth": "at equal tokens and width"}


def draw_tokens_depth(rows: list[dict], quality: str):
    """Draws quality against tokens and against depth at the last step; returns the Figure.

    Against tokens, a line has one depth and width. Against depth, it has one width and patch size.
    A panel without lines is left out.
    Raises: NoRowsError if neither panel has a line.
    """
    matplotlib = plot_style.import_matplotlib()

    parts, reasons = {}, []
    for x, select in (("tokens", _against_tokens), ("depth", _against_depth)):
        try:
            parts[x] = select(rows, quality)
        except looks.NoRowsError as error:
            reasons.append(f"{x}: {error}")
    if not parts:
        raise looks.NoRowsError(", ".join(reasons))
    for reason in reasons:
        logger.info("no panel of %s.", reason)
    look = looks.Looks.of(rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure, panels = looks.new_figure(len(parts))
        for axes, (x, lines) in zip(panels, parts.items(), strict=True):
            for line in lines:
                _draw_line(axes, look, line, x, quality)
            axes.set_xlabel(plot_style.label(x))
            axes.set_title(TITLES[x], fontsize=8)
            axes.margins(x=0.08)
            plot_style.log_scale(axes.xaxis)
            looks.tick_values(axes.xaxis, {row[x] for line in lines for row in line})
            looks.name_quality(axes, lines[0], quality, log=True)
        look.legend(figure, [row for lines in parts.values() for line in lines for row in line])
    return figure


def _against_tokens(rows, quality):
    """Returns the rows of each line against tokens.   Raises: NoRowsError if there is none."""
    rows = looks.at_last_step(looks.measured(looks.standard(rows), "tokens"), quality)
    return _lines(looks.group(rows, "size"), "tokens", "size with 2 numbers of tokens")


def _against_depth(rows, quality):
    """Returns the rows of each line against depth.   Raises: NoRowsError if there is none."""
    rows = looks.measured(looks.select_block(rows), "depth", "hidden_size", "patch_size")
    groups = looks.group(looks.complete(rows, quality), "hidden_size", "patch_size")
    lines = _lines(groups, "depth", "width and patch size with 2 depths")
    # The last step is the lines' own, since other models may have been trained for longer.
    rows = looks.at_last_step([row for line in lines for row in line], quality)
    return _lines(looks.group(rows, "hidden_size", "patch_size"), "depth", "2 depths at its step")


def _lines(groups, x, what):
    """Returns the groups with several values of x.   Raises: NoRowsError if there is none.

    Args: what, a description of such a group for the message.
    """
    lines = [rows for rows in groups.values() if len({row[x] for row in rows}) > 1]
    if not lines:
        raise looks.NoRowsError(f"no {what}")
    return lines


def _draw_line(axes, look, rows, x, quality):
    """Draws a line through several models, each with the marker of its patch size."""
    curve = looks.curve(rows, x, quality)
    color = look.color(rows[0])
    looks.draw_curve(axes, curve, color, "")
    markers = {row[x]: look.marker(row) for row in rows}
    for at, mean in zip(curve.points, curve.means(), strict=True):
        looks.draw_point(axes, mean, color, markers[at])


def draw_blocks(rows: list[dict], quality: str):
    """Draws quality against training steps, a color per block; returns the matplotlib Figure.

    It has the models that come with several blocks, a dash style for each.
    Raises: NoRowsError if there are none.   Source: Peebles & Xie 2023, figure 5.
    """
    matplotlib = plot_style.import_matplotlib()

    rows = looks.measured(rows, "block", "model", quality)
    # `complete` refuses rows of several blocks, so it is called for each block.
    rows = [
        r for part in looks.group(rows, "block").values() for r in looks.complete(part, quality)
    ]
    groups = looks.group(rows, "model", "depth", "hidden_size")
    groups = {k: part for k, part in groups.items() if len({row["block"] for row in part}) > 1}
    if not groups:
        raise looks.NoRowsError("no model has several blocks")
    drawn = [row for group in groups.values() for row in group]
    # The paper's blocks come first and always have the same colors, also if some are not drawn.
    known = dict.fromkeys([*BLOCKS, *sorted({row["block"] for row in drawn})])
    colors = dict(zip(known, looks.make_colors(len(known)), strict=True))
    dashes = dict(zip(groups, plot_style.DASHES * len(groups), strict=False))
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = looks.new_figure()
        for model, group in groups.items():
            for variant in looks.group(group, *selection.MODEL).values():
                curve = looks.curve(variant, "step", quality)
                color = colors[variant[0]["block"]]
                looks.draw_curve(axes, curve, color, "o", linestyle=dashes[model])
        axes.set_xlabel(plot_style.label("step"))
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))  # 400k, 1M
        looks.name_quality(axes, drawn, quality, log=True)
        used = {row["block"] for row in drawn}
        blocks = [
            matplotlib.lines.Line2D([], [], color=colors[b], label=b) for b in known if b in used
        ]
        names = [
            matplotlib.lines.Line2D([], [], color="0.3", linestyle=dash, label=model[0])
            for model, dash in dashes.items()
        ]
        # Two lines of blocks, because their names are long.
        looks.draw_legend(figure, ("block", blocks[:2]), ("", blocks[2:]), ("model", names))
    return figure


def draw_networks(rows: list[dict], quality: str):
    """Draws DiTs against UNets, a color per network; returns the matplotlib Figure.

    On the left is quality against multiply-adds at the last step, with a line per network. On the
    right is quality against training compute, with a line per model.
    Raises: NoRowsError if all rows are of one network.
    """
    matplotlib = plot_style.import_matplotlib()

    rows = looks.measured(rows, "network", "gmacs", "train_gflops", "step", quality)
    # A UNet has no block, so the rows may differ in both columns.
    rows = selection.comparable(rows, quality, across=("network", "block"))
    networks = looks.group(rows, "network")
    if len(networks) < 2:
        raise looks.NoRowsError(f"all rows are of one network, {rows[0]['network']}")
    colors = dict(zip(NETWORKS, plot_style.COLORS, strict=False))
    unit, name = looks.compute_unit([row["train_gflops"] for row in rows])
    last = selection.at_step(rows, selection.last_step(rows))
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (by_size, by_compute) = looks.new_figure(2)
        for (network,), group in looks.group(last, "network").items():
            curve = looks.curve(group, "gmacs", quality)
            looks.draw_curve(by_size, curve, colors[network], "o")
        for model in looks.group(rows, *selection.MODEL).values():
            curve = looks.curve(looks.in_unit(model, unit), "compute", quality)
            looks.draw_curve(by_compute, curve, colors[model[0]["network"]], "o")
        by_size.set_title(f"after {last[0]['step']:,} steps", fontsize=8)
        by_size.set_xlabel(plot_style.label("gmacs"))
        by_compute.set_title("a line to a model", fontsize=8)
        by_compute.set_xlabel(f"training compute ({name})")
        for axes in (by_size, by_compute):
            plot_style.log_scale(axes.xaxis)
            looks.name_quality(axes, rows, quality, log=True)
        handles = [
            matplotlib.lines.Line2D(
                [], [], color=colors[network], marker="o", label=NETWORKS[network]
            )
            for network in colors
            if (network,) in networks
        ]
        looks.draw_legend(figure, ("network", handles))
    return figure
