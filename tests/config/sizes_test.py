"""Sizes, of squares and others: read from words, compared, held to their form."""

import pytest

from configs import default
from dit_jax.config import keys, overrides, parsers, sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", 256), ("256x384", (256, 384)), ("(8, 12)", (8, 12)), ("8,12", (8, 12)), ("8x8", 8)],
)
def test_size_is_read_from_a_word(text, size):
    assert parsers.SizeParser().parse(text) == size
    config = default.get_config().lock()
    overrides.override(config, "data.image_size", text)
    overrides.override(config, "model.input_size", text)
    assert (config.data.image_size, config.model.input_size) == (size, size)
    assert sizes.image_shape(config.data) == (*sizes.sides(size), 3)
    assert sizes.input_shape(config.model) == (*sizes.sides(size), 4)


@pytest.mark.parametrize(
    "text", ["", "x8", "8x", "8x8x8", "8.5", "a", "1e3", "-8", "9" * 30, "9" * 5000]
)
def test_word_that_is_no_size_is_refused(text):
    config = default.get_config().lock()
    with pytest.raises(ValueError, match=r"must be a whole number in 1..8192, or two, as 256x384"):
        overrides.override(config, "data.image_size", text)


@pytest.mark.parametrize("key", sorted(sizes.KEYS))
@pytest.mark.parametrize(
    ("value", "match"),
    [
        ((8, 8, 8), r"=\(8, 8, 8\) must be a whole number, or \(height, width\)"),
        ((8, "8"), r"=\(8, '8'\) must be a whole number, or \(height, width\)"),
        (None, "=None must be a whole number, or"),
        ((8, 0), r"=\(8, 0\) must be a whole number in 1\.\.8192"),
        ((2.5, 8), r"=\(2.5, 8\) must be a whole number in 1\.\.8192"),
    ],
)
def test_value_that_is_no_size_is_refused(key, value, match):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"{key}{match}"):
        keys.check(config)


def test_square_has_one_form():
    assert sizes.simplify([8, 8]) == 8
    assert sizes.simplify([8, 12]) == (8, 12)
    assert sizes.to_json((8, 12)) == [8, 12]
    assert sizes.scale((4, 6), 8) == (32, 48)


def test_size_may_have_more_than_two_sides():
    """Configs have sizes of images only, so `is_size` refuses others."""
    assert sizes.simplify([16, 8, 12]) == sizes.sides((16, 8, 12)) == (16, 8, 12)
    assert sizes.simplify((8, 8, 8)) == (8, 8, 8)  # 8 stands for (8, 8)
    assert sizes.to_json((8, 8, 8)) == [8, 8, 8]
    assert sizes.scale((2, 4, 6), 8) == (16, 32, 48)
    assert not sizes.is_size((8, 8, 8))
    with pytest.raises(ValueError, match="too many values"):
        sizes.height_and_width((8, 8, 8))
