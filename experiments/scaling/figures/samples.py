"""The figure of samples: a grid of models, a row per size and a column per patch size.

The samples of all models have the same noise and labels. If the table has several blocks, the
columns are blocks instead of patch sizes.
"""

import math

import numpy as np
import pandas as pd
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.sampling import pictures
from experiments.scaling.figures import comparisons, styles, subsets

# Pixels: width of a letter, height of the names at the top, gaps between panels and between images.
LETTER, TOP, PANEL_GAP, IMAGE_GAP = 14, 36, 10, 2
LARGE = 16  # pixels; larger images do not fit a figure one column wide


def draw_samples(rows: pd.DataFrame, arrays: dict[str, np.ndarray]):
    """Draws samples of all models; returns the matplotlib Figure.

    In its .png, a pixel of a sample takes a whole number of pixels. Samples larger than their place
    in the grid are shrunk.
    Args: arrays, image [models, n, H, W, C] uint8, label [n] int32, cell [models] of str, which are
      values of the column 'cell'. Cells without a row are not drawn.
    Raises: ValueError for arrays of other shapes; NoRowsError if no cell has a row.
    """
    matplotlib = plot_style.import_matplotlib()

    # The sizes are the rows of the grid; the patch sizes or blocks are its columns.
    _check_arrays(arrays)
    places, column_prefix = _place_models(rows, arrays["cell"])
    used_sizes = {size for size, _ in places}
    sizes = [size for size in subsets.get_size_names(rows) if size in used_sizes]
    columns = sorted({column for _, column in places}, key=_get_column_order)

    # All lengths are in whole pixels, from the figure's width down to the side of an image.
    count, height, width, _ = arrays["image"].shape[1:]
    per_line = _choose_images_per_line(count)
    names_width = LETTER * max(map(len, sizes)) + PANEL_GAP
    inches = styles.WIDE if max(height, width) > LARGE else plot_style.WIDTH
    free_width = round(inches * plot_style.DPI) - names_width - PANEL_GAP * (len(columns) - 1)
    side = free_width // len(columns) // per_line - IMAGE_GAP
    panels = {
        place: pictures.image_grid(_shrink(arrays["image"][i], side), per_line, side, IMAGE_GAP)
        for place, i in places.items()
    }
    panel_height, panel_width, _ = next(iter(panels.values())).shape
    total_width = names_width + len(columns) * (panel_width + PANEL_GAP) - PANEL_GAP
    total_height = TOP + len(sizes) * (panel_height + PANEL_GAP) - PANEL_GAP
    total = total_width, total_height

    # Axes are placed by hand, so that pixels of the panels and of the figure coincide.
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(figsize=[pixels / plot_style.DPI for pixels in total])
        for (size, column), panel in panels.items():
            left = names_width + columns.index(column) * (panel_width + PANEL_GAP)
            top = TOP + sizes.index(size) * (panel_height + PANEL_GAP)
            box = left, total_height - top - panel_height, panel_width, panel_height
            axes = figure.add_axes([b / t for b, t in zip(box, 2 * total, strict=True)])
            axes.imshow(panel, interpolation="none", aspect="auto")
            axes.axis("off")
            axes.set_label(f"{size}/{column}")
        for i, column in enumerate(columns):
            x = names_width + i * (panel_width + PANEL_GAP) + panel_width / 2
            _write_text(figure, (x, total_height - TOP / 2), total, f"{column_prefix}{column}")
        for i, size in enumerate(sizes):
            y = total_height - TOP - i * (panel_height + PANEL_GAP) - panel_height / 2
            _write_text(figure, (names_width / 2, y), total, size)
    return figure


def _write_text(figure, center, total, text):
    """Writes a text around the pixel `center` (x, y from below) of a figure of `total` pixels."""
    x, y = center[0] / total[0], center[1] / total[1]
    figure.text(x, y, plot_style.escape(text), ha="center", va="center")


def _place_models(rows, cells):
    """Places models in the grid.

    Returns: {(size, patch size or block): index of the cell}; the text before a column's name.
    Raises: NoRowsError if no cell has a row.
    """
    # A cell has a row per step, all of one model.
    rows = rows.drop_duplicates("cell", keep="last").set_index("cell")
    known = pd.Series(cells, dtype="string")
    known = known[known.isin(rows.index)]
    if known.empty:
        raise subsets.NoRowsError(f"no row has a cell of the samples, {', '.join(cells)}")
    rows = rows.loc[known]
    column, prefix = "patch_size", "patch size "
    if rows["block"].nunique(dropna=False) > 1:
        column, prefix = "block", ""
    places = zip(rows["size"], rows[column], strict=True)
    return dict(zip(places, known.index, strict=True)), prefix


def _choose_images_per_line(count):
    """Chooses how many of `count` images are in a line of a panel.

    It is the smallest number from the square root to twice the root that fills all lines, else the
    root.
    """
    root = math.ceil(math.sqrt(count))
    return next((n for n in range(root, 2 * root) if count % n == 0), root)


def _get_column_order(column):
    """Returns the sort key of a column: few tokens first; blocks in the paper's order."""
    return comparisons.BLOCKS.index(column) if column in comparisons.BLOCKS else -column


def _shrink(images, side):
    """Returns the images, shrunk to `side` pixels if they are larger."""
    height, width = images.shape[1:3]
    if height <= side and width <= side:
        return images
    scale = side / max(height, width)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    channels = images.shape[-1]
    if channels == 1:
        images = images[..., 0]  # as Pillow takes grey images
    pillow_images = [Image.fromarray(image) for image in images]
    shrunk = [np.asarray(image.resize(size, Image.Resampling.BOX)) for image in pillow_images]
    return np.reshape(shrunk, (len(images), *size[::-1], channels))


def _check_arrays(arrays):
    """Raises a ValueError unless the arrays have the shapes that `draw_samples` takes."""
    shapes = {name: array.shape for name, array in arrays.items()}
    image, label, cell = (arrays.get(name) for name in ("image", "label", "cell"))
    if (
        image is None
        or label is None
        or cell is None
        or image.dtype != np.uint8
        or image.ndim != 5
        or image.shape[:2] != (len(cell), len(label))
        or image.shape[-1] not in (1, 3)
    ):
        raise UserError(
            "samples must be image [models, n, H, W, 1 or 3] uint8, label [n] and cell [models], "
            f"not {shapes}."
        )
