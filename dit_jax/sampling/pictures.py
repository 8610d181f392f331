"""Many images as one."""

import math
from collections.abc import Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.errors import UserError

CELL, GAP = 48, 2  # pixels
MOST_PIXELS = 2**30  # of a picture: 3 GiB


def grid_columns(count: int) -> int:
    """Columns of a grid that is about square."""
    return math.isqrt(count - 1) + 1


def check_grid(count: int, shape: Sequence[int], columns: int = 0) -> None:
    """Demands a picture that memory holds, before its images are drawn.

    Args: count, the images.   shape: of an image, (height, width, ...).   columns: 0 is about as
      many as rows.
    Raises: ValueError with the picture's pixels.
    """
    columns = columns or grid_columns(count)
    factor = max(1, CELL // shape[0])
    cell_height, cell_width = (side * factor + GAP for side in shape[:2])
    height, width = -(-count // columns) * cell_height, columns * cell_width
    if height * width > MOST_PIXELS:
        raise UserError(
            f"a picture of {count:,} images of {shape[0]} x {shape[1]} pixels would have {width:,} "
            f"x {height:,} pixels, but at most {MOST_PIXELS:,} are drawn: take fewer images."
        )


def image_grid(images: np.ndarray, columns: int, cell: int = CELL, gap: int = GAP) -> np.ndarray:
    """[N, H, W, C] uint8 as one [height, width, 3] uint8 image.

    Images less than `cell` pixels high are enlarged by a whole factor; `gap` grey pixels part them.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    factor = max(1, cell // height)
    height, width = height * factor, width * factor
    grid = np.full((rows, height + gap, columns, width + gap, 3), 128, np.uint8)
    images = images if channels == 3 else images.repeat(3, axis=-1)
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        grid[i // columns, :height, i % columns, :width] = image
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[:-gap, :-gap] if gap else grid


def split_grid(grid: np.ndarray, size: sizes.Size) -> np.ndarray:
    """`image_grid` backwards: the images [N, H, W, 3] of its picture, grey ones at the end.

    Raises: ValueError for a picture that images of this size do not make.
    """
    height, width = sizes.height_and_width(size)
    factor = max(1, CELL // height)
    cell = height * factor + GAP, width * factor + GAP
    rows, columns = (grid.shape[i] // cell[i] + 1 for i in range(2))
    if (rows * cell[0] - GAP, columns * cell[1] - GAP) != grid.shape[:2]:
        raise UserError(
            f"{grid.shape[:2]} pixels are no grid of images of {height} x {width} pixels."
        )
    grid = np.pad(grid, ((0, GAP), (0, GAP), (0, 0)))
    images = grid.reshape(rows, cell[0], columns, cell[1], 3).swapaxes(1, 2)
    images = images[:, :, : height * factor : factor, : width * factor : factor]
    return images.reshape(-1, height, width, 3)
