"""Pictures of many images in a grid."""

import math
from collections.abc import Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.errors import UserError

CELL, GAP = 48, 2  # pixels: least height of an image, and between images
MAX_PIXELS = 2**30  # of a picture, 3 GiB in RGB


def grid_columns(count: int) -> int:
    """Returns how many columns make a grid about square."""
    return math.isqrt(count - 1) + 1


def check_grid(count: int, shape: Sequence[int], columns: int = 0) -> None:
    """Raises ValueError, before images are drawn, if their picture would not fit in memory.

    Args: shape, of an image, (height, width, ...).   columns, 0 for a grid that is about square.
    """
    columns = columns or grid_columns(count)
    # Small images are enlarged, as in `image_grid`.
    factor = max(1, CELL // shape[0])
    cell_height, cell_width = (side * factor + GAP for side in shape[:2])
    height, width = -(-count // columns) * cell_height, columns * cell_width
    if height * width > MAX_PIXELS:
        raise UserError(
            f"a picture of {count:,} images of {shape[0]} x {shape[1]} pixels would have {width:,} "
            f"x {height:,} pixels, but at most {MAX_PIXELS:,} are drawn: take fewer images."
        )


def image_grid(images: np.ndarray, columns: int, cell: int = CELL, gap: int = GAP) -> np.ndarray:
    """Puts images [N, H, W, C] uint8 into one picture [height, width, 3] uint8.

    Images less than `cell` pixels high are enlarged by a whole factor. Gaps and empty cells are
    grey.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    factor = max(1, cell // height)
    height, width = height * factor, width * factor
    grid = np.full((rows, height + gap, columns, width + gap, 3), 128, np.uint8)
    images = images if channels == 3 else images.repeat(3, axis=-1)  # grey to RGB
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        grid[i // columns, :height, i % columns, :width] = image
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[:-gap, :-gap] if gap else grid  # none at the right and bottom edges


def split_grid(grid: np.ndarray, size: sizes.Size) -> np.ndarray:
    """Returns the images [N, H, W, 3] of a picture that `image_grid` made; grey ones at the end.

    Raises: ValueError if a grid of images of this size cannot have the picture's size.
    """
    height, width = sizes.height_and_width(size)
    factor = max(1, CELL // height)
    cell = height * factor + GAP, width * factor + GAP
    rows, columns = (grid.shape[i] // cell[i] + 1 for i in range(2))
    if (rows * cell[0] - GAP, columns * cell[1] - GAP) != grid.shape[:2]:
        raise UserError(
            f"{grid.shape[:2]} pixels are no grid of images of {height} x {width} pixels."
        )
    # Adds the gaps that `image_grid` cut off at the edges, so that all cells are equal.
    grid = np.pad(grid, ((0, GAP), (0, GAP), (0, 0)))
    images = grid.reshape(rows, cell[0], columns, cell[1], 3).swapaxes(1, 2)
    images = images[:, :, : height * factor : factor, : width * factor : factor]
    return images.reshape(-1, height, width, 3)
