"""Sizes of images and latents in configs: one number for a square, or (height, width)."""

from collections.abc import Sequence

Size = int | tuple[int, int]  # JSON files have lists for tuples

# The config keys whose values are sizes.
KEYS = frozenset({"data.image_size", "model.input_size"})


def is_size(value: object) -> bool:
    """Returns whether a value is one number or two, also floats; `ranges` checks the numbers."""
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(type(one) in (int, float) for one in value)
    return type(value) in (int, float)


def simplify(size: Size | Sequence[int]) -> Size:
    """Returns one number for a square, else (height, width)."""
    height, width = height_and_width(size)
    return height if height == width else (height, width)


def height_and_width(size: Size | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of a size."""
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return height, width


def scale(size: Size | Sequence[int], factor: int) -> Size:
    """Returns a size with both sides multiplied by `factor`."""
    height, width = height_and_width(size)
    return simplify((height * factor, width * factor))


def to_json(size: Size | Sequence[int]) -> int | list[int]:
    """Returns a size as a JSON value: a number or a list."""
    size = simplify(size)
    return size if isinstance(size, int) else list(size)


def image_shape(data_config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that `config.data` describes."""
    return *height_and_width(data_config.image_size), data_config.image_channels


def input_shape(model_config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of x_0, of a `config.model` or of a noise predictor."""
    return *height_and_width(model_config.input_size), model_config.in_channels


def show(shape: Sequence[int]) -> str:
    """Returns a shape as text for messages: '256 x 384 x 3'."""
    return " x ".join(map(str, shape))
