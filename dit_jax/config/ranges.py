"""Ranges of numbers, and the constant ranges that several keys or flags share."""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of finite numbers from `low` to `high`; `without_...` excludes an end."""

    low: float
    high: float = math.inf
    whole: bool = False  # whole numbers only
    without_low: bool = False
    without_high: bool = False

    def holds(self, value: object) -> bool:
        """Returns whether a value is a number in this range; bools are not numbers."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        fits_low = self.low < value if self.without_low else self.low <= value
        fits_high = value < self.high if self.without_high else value <= self.high
        return fits_low and fits_high

    def rounds_to_high(self, number: float) -> bool:
        """Returns whether a number below an excluded `high` is rounded to `high` in float32."""
        return self.without_high and number < self.high <= np.float32(number)

    def __str__(self) -> str:
        """Returns 'a whole number in 0..10', 'a number in [0, 1)' or 'a number above 0'."""
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} {'above' if self.without_low else 'of at least'} {self.low:g}"
        if self.whole:
            return f"{kind} in {self.low}..{self.high}"
        opening = "(" if self.without_low else "["
        closing = ")" if self.without_high else "]"
        return f"{kind} in {opening}{self.low:g}, {self.high:g}{closing}"


# The smallest normal and the largest float32. All computations are in float32.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_SEED = 2**32 - 1  # the largest seed that NumPy takes
MAX_COUNT = 2**31 - 1  # JAX counts steps and images in int32
MAX_IMAGE_SIZE = 2**13  # pixels of a side; `pixels.MAX_ENLARGED` is the area of such a square
MAX_PICTURE_IMAGES = 10_000  # images in one picture
COUNT, FROM_0, FROM_2 = (Range(low, MAX_COUNT, whole=True) for low in (1, 0, 2))
SIZE, SIZE_OR_0 = (Range(low, 2**20, whole=True) for low in (1, 0))
IMAGE_SIZE = Range(1, MAX_IMAGE_SIZE, whole=True)
POSITIVE = Range(0, without_low=True)
NOT_NEGATIVE = Range(0)
SHARE, BELOW_1 = Range(0, 1), Range(0, 1, without_high=True)
SIGMA, GUIDANCE = Range(0, 1e6, without_low=True), Range(1, 1000)
INSIDE_0_1 = Range(0, 1, without_low=True, without_high=True)
ANY = Range(-math.inf)


def shorten(value: object) -> str:
    """Returns the repr of a value in one line of at most 103 characters, for messages."""
    # The repr of a ConfigDict has several lines.
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."
