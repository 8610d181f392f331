"""The figure of samples: a grid of models, a row per size and a column per patch size.

All models are shown with the same noise and labels. If the table has several blocks, the columns
are blocks instead of patch sizes.
"""

import math

import numpy as np
import pandas as pd
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.sampling import pictures
from experiments.scaling.figures import comparisons, styles, subsets

# Pixels: a letter's width, the names' height at the top, gaps between panels and between images.
LETTER, TOP, BETWEEN, GAP = 14, 36, 10, 2
LARGE = 16  # pixels; larger images do not fit a figure one column wide


def draw_samples(rows: pd.DataFrame, arrays: dict[str, np.ndarray]):
    """Draws samples of all models; returns the matplotlib Figure.

    In its .png, a pixel of a sample takes a whole number of pixels. Samples larger than their cell
    of the grid are shrunk.
    Args: arrays: image [models, n, H, W, C] uint8, label [n] int32, cell [models] of str, as the
      rows' 'cell'. Cells without a row are not drawn.
    Raises: ValueError for arrays of other shapes; NoRowsError if no cell has a row.
    """
    matplotlib = plot_style.import_matplotlib()

    # Which model is where in the grid.
    _check(arrays)
    places, across_name = _places(rows, arrays["cell"])
    sizes = [name for name in subsets.get_size_names(rows) if name in {s for s, _ in places}]
    patches = list(dict.fromkeys(across for _, across in sorted(places, key=_column)))

    # All lengths are in whole pixels, from the figure's width down to one image (`cell`).
    count, height, width, _ = arrays["image"].shape[1:]
    columns = _columns(count)
    names = LETTER * max(map(len, sizes)) + BETWEEN
    inches = styles.WIDE if max(height, width) > LARGE else plot_style.WIDTH
    free = round(inches * plot_style.DPI) - names - BETWEEN * (len(patches) - 1)
    cell = free // len(patches) // columns - GAP
    grids = {
        place: pictures.image_grid(_shrunk(arrays["image"][i], cell), columns, cell, GAP)
        for place, i in places.items()
    }
    down, across, _ = next(iter(grids.values())).shape
    total = (
        names + len(patches) * (across + BETWEEN) - BETWEEN,
        TOP + len(sizes) * (down + BETWEEN) - BETWEEN,
    )

    # Axes are placed by hand, so that pixels of the grids and of the figure coincide.
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(figsize=[pixels / plot_style.DPI for pixels in total])
        for (size, patch), grid in grids.items():
            left = names + patches.index(patch) * (across + BETWEEN)
            top = TOP + sizes.index(size) * (down + BETWEEN)
            box = left, total[1] - top - down, across, down
            axes = figure.add_axes([b / t for b, t in zip(box, 2 * total, strict=True)])
            axes.imshow(grid, interpolation="none", aspect="auto")
            axes.axis("off")
            axes.set_label(f"{size}/{patch}")
        for i, patch in enumerate(patches):
            at = names + i * (across + BETWEEN) + across / 2, total[1] - TOP / 2
            _write(figure, at, total, f"{across_name}{patch}")
        for i, size in enumerate(sizes):
            at = names / 2, total[1] - TOP - i * (down + BETWEEN) - down / 2
            _write(figure, at, total, size)
    return figure


def _write(figure, at, total, text):
    """Writes a text centred at the pixel `at` (x, y from below) of a figure of `total` pixels."""
    figure.text(
        at[0] / total[0], at[1] / total[1], plot_style.escape(text), ha="center", va="center"
    )


def _places(rows, cells):
    """Places models in the grid.

    Returns: {(size, patch size or block): index of the cell}; the text in front of the columns'
      names.
    Raises: NoRowsError if no cell has a row.
    """
    # A cell has a row per step, all of one model.
    rows = rows.drop_duplicates("cell", keep="last").set_index("cell")
    known = pd.Series(cells, dtype="string")
    known = known[known.isin(rows.index)]
    if known.empty:
        raise subsets.NoRowsError(f"no row is of the cells of the samples, {', '.join(cells)}")
    rows = rows.loc[known]
    blocks = rows["block"].nunique(dropna=False) > 1
    places = zip(rows["size"], rows["block" if blocks else "patch_size"], strict=True)
    return dict(zip(places, known.index, strict=True)), "" if blocks else "patch size "


def _columns(count):
    """Returns the columns of a grid of `count` images.

    It is the smallest number from the square root to twice of it that fills all rows, else the
    root.
    """
    root = math.ceil(math.sqrt(count))
    return next((n for n in range(root, 2 * root) if count % n == 0), root)


def _column(place):
    """Returns the sort key of a column: few tokens first; blocks in the paper's order."""
    across = place[1]
    return comparisons.BLOCKS.index(across) if across in comparisons.BLOCKS else -across


def _shrunk(images, cell):
    """Returns the images, shrunk to the size of a cell if they are larger."""
    height, width = images.shape[1:3]
    if height <= cell and width <= cell:
        return images
    scale = cell / max(height, width)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    channels = images.shape[-1]
    pillow = (Image.fromarray(image[..., 0] if channels == 1 else image) for image in images)
    shrunk = [np.asarray(image.resize(size, Image.Resampling.BOX)) for image in pillow]
    return np.reshape(shrunk, (len(images), *size[::-1], channels))


def _check(arrays):
    """Raises: ValueError unless the arrays are as `draw_samples` takes them."""
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
