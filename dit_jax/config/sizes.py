"""Sizes of images and latents in configs: one number for a square, or (height, width)."""

from collections.abc import Sequence

Size = int | tuple[int, ...]  # JSON files have lists for tuples

# The config keys whose values are sizes.
KEYS = frozenset({"data.image_size", "model.input_size"})


def is_size(value: object) -> bool:
    """Returns whether a value is one number or two, also floats; `ranges` checks the numbers."""
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(type(side) in (int, float) for side in value)
    return type(value) in (int, float)


def sides(size: Size | Sequence[int]) -> tuple[int, ...]:
    """Returns the sides of a size as a tuple, outermost first; (n, n) for one number n."""
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def simplify(size: Size | Sequence[int]) -> Size:
    """Returns one number for a square, else the tuple of the sides."""
    size = sides(size)
    return size[0] if size == sides(size[0]) else size


def height_and_width(size: Size | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of the size of an image."""
    height, width = sides(size)
    return height, width


def scale(size: Size | Sequence[int], factor: int) -> Size:
    """Returns a size with each side multiplied by `factor`."""
    return simplify([side * factor for side in sides(size)])


def to_json(size: Size | Sequence[int]) -> int | list[int]:
    """Returns a size as a JSON value: a number or a list."""
    size = simplify(size)
    return size if isinstance(size, int) else list(size)


def image_shape(data_config) -> tuple[int, ...]:
    """Returns (height, width, channels) of the images that `config.data` describes."""
    return *sides(data_config.image_size), data_config.image_channels


def input_shape(model_config) -> tuple[int, ...]:
    """Returns (height, width, channels) of x_0; takes a `config.model` or a noise predictor."""
    return *sides(model_config.input_size), model_config.in_channels


def show(shape: Sequence[int]) -> str:
    """Returns a shape or its sides as text for messages: '256 x 384 x 3'."""
    return " x ".join(map(str, shape))
