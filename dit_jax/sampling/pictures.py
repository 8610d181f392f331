"""Many images as one."""

import math

import numpy as np

CELL, GAP = 48, 2  # pixels
MOST_PIXELS = 2**30  # of a picture: 3 GiB


def grid_columns(count: int) -> int:
    """Columns of a grid that is about square."""
    return math.isqrt(count - 1) + 1


def check_grid(count: int, size: int, columns: int = 0) -> None:
    """Demands a picture that memory holds, before its images are drawn.

    Args: count, the images, `size` pixels high and wide.   columns: 0 is about as many as rows.
    Raises: ValueError with the picture's pixels.
    """
    columns = columns or grid_columns(count)
    cell = size * max(1, CELL // size) + GAP
    height, width = -(-count // columns) * cell, columns * cell
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"a picture of {count:,} images of {size} pixels would have {width:,} x {height:,} "
            f"pixels, but at most {MOST_PIXELS:,} are drawn: take fewer images."
        )


def image_grid(images: np.ndarray, columns: int, cell: int = CELL, gap: int = GAP) -> np.ndarray:
    """[N, H, W, C] uint8 as one [height, width, 3] uint8 image.

    Images smaller than `cell` pixels are enlarged by a whole factor; `gap` grey pixels part them.
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


def split_grid(grid: np.ndarray, size: int) -> np.ndarray:
    """`image_grid` backwards: the images [N, size, size, 3] of its picture, grey ones at the end.

    Raises: ValueError for a picture that images of this size do not make.
    """
    factor = max(1, CELL // size)
    cell = size * factor + GAP
    height, width = (length + GAP for length in grid.shape[:2])
    if height % cell or width % cell:
        raise ValueError(f"{grid.shape[:2]} pixels are no grid of images of {size} pixels.")
    grid = np.pad(grid, ((0, GAP), (0, GAP), (0, 0)))
    images = grid.reshape(height // cell, cell, width // cell, cell, 3).swapaxes(1, 2)
    images = images[:, :, : size * factor : factor, : size * factor : factor]
    return images.reshape(-1, size, size, 3)
