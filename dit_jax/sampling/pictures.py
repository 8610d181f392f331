"""Pictures of many images in a grid."""

import math
from collections.abc import Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.errors import UserError

CELL, GAP = 48, 2  # pixels: the least height of an image, and the space between images
MAX_PIXELS = 2**30  # of a picture; in RGB they take 3 GiB


def grid_columns(count: int) -> int:
    """Returns the number of columns of a grid that is about square."""
    return math.isqrt(count - 1) + 1


def check_grid(count: int, image_shape: Sequence[int], columns: int = 0) -> None:
    """Raises ValueError if `image_grid` would make a picture of more than MAX_PIXELS.

    Args: image_shape, (height, width, channels).   columns, 0 for a grid that is about square.
    """
    columns = columns or grid_columns(count)
    height, width, _ = image_shape
    factor = _enlargement(height, CELL)
    grid_height = math.ceil(count / columns) * (height * factor + GAP)
    grid_width = columns * (width * factor + GAP)
    if grid_height * grid_width > MAX_PIXELS:
        raise UserError(
            f"a picture of {count:,} images of {height} x {width} pixels would have {grid_width:,} "
            f"x {grid_height:,} pixels, more than {MAX_PIXELS:,}. Take fewer images."
        )


def image_grid(images: np.ndarray, columns: int, cell: int = CELL, gap: int = GAP) -> np.ndarray:
    """Arranges images [N, H, W, C] uint8 in a picture [height, width, 3] uint8.

    Images less than `cell` pixels high are enlarged by a whole factor. Gaps and empty cells are
    grey.
    """
    count, height, width, channels = images.shape
    rows, factor = math.ceil(count / columns), _enlargement(height, cell)
    height, width = height * factor, width * factor
    grid = np.full((rows, height + gap, columns, width + gap, 3), 128, np.uint8)
    images = images if channels == 3 else images.repeat(3, axis=-1)  # grey to RGB
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        grid[i // columns, :height, i % columns, :width] = image
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[:-gap, :-gap] if gap else grid  # no gap at the right and bottom edges


def split_grid(grid: np.ndarray, size: sizes.Size) -> np.ndarray:
    """Returns the images [N, H, W, 3] in a picture that `image_grid` made.

    The images of empty cells, at the end, are grey.
    Raises: ValueError if the picture is no grid of images of this size.
    """
    height, width = sizes.height_and_width(size)
    factor = _enlargement(height, CELL)
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    rows, columns = grid.shape[0] // cell_height + 1, grid.shape[1] // cell_width + 1
    if grid.shape[:2] != (rows * cell_height - GAP, columns * cell_width - GAP):
        raise UserError(
            f"{grid.shape[:2]} pixels are no grid of images of {height} x {width} pixels."
        )
    # `image_grid` cuts off the gaps at the right and bottom edges. With them all cells are equal.
    grid = np.pad(grid, ((0, GAP), (0, GAP), (0, 0)))
    cells = grid.reshape(rows, cell_height, columns, cell_width, 3).swapaxes(1, 2)
    images = cells[:, :, : height * factor : factor, : width * factor : factor]
    return images.reshape(-1, height, width, 3)


def _enlargement(height, cell):
    """Returns the whole factor by which images of this height are enlarged."""
    return max(1, cell // height)
