"""The figure of samples shows their pixels, in their models' places."""

import numpy as np
import pytest
from helpers.sweep import cell_of, samples_of, study
from PIL import Image

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import samples, styles, subsets
from experiments.scaling.fits import table


@pytest.fixture(scope="module")
def rows():
    return study()


def test_samples_are_whole_pixels_in_places_of_sizes_and_patches(rows, tmp_path):
    arrays = samples_of(["L/2", "XS/8", "XS/2"])
    figure = samples.draw_samples(table.from_rows(rows), arrays)
    assert [text.get_text() for text in figure.texts] == ["patch size 8", "patch size 2", "XS", "L"]
    assert figure.get_size_inches()[0] <= plot_style.WIDTH
    plot_style.save(figure, tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    places = {axes.get_label(): axes.get_position() for axes in figure.axes}
    assert places.keys() == {"L/2", "XS/8", "XS/2"}
    assert places["XS/8"].x1 < places["XS/2"].x0 == places["L/2"].x0
    assert places["L/2"].y1 < places["XS/2"].y0 == places["XS/8"].y0
    for model, images in zip(("L/2", "XS/8", "XS/2"), arrays["image"], strict=True):
        box = places[model]
        left, right = (round(x * picture.shape[1]) for x in (box.x0, box.x1))
        top, bottom = (round((1 - y) * picture.shape[0]) for y in (box.y1, box.y0))
        panel = picture[top:bottom, left:right]
        factor = (panel.shape[0] - samples.IMAGE_GAP) // 16
        side = 8 * factor
        assert factor > 5
        for i, image in enumerate(images):
            y, x = (i // 2) * (side + samples.IMAGE_GAP), (i % 2) * (side + samples.IMAGE_GAP)
            expected = np.kron(image[..., 0], np.ones((factor, factor), np.uint8))
            np.testing.assert_array_equal(panel[y : y + side, x : x + side, 1], expected)


@pytest.mark.parametrize(("count", "columns", "lines"), [(7, 3, 3), (10, 5, 2), (12, 4, 3)])
def test_samples_fill_their_lines_where_they_can(rows, count, columns, lines):
    figure = samples.draw_samples(table.from_rows(rows), samples_of(["S/2"], count=count))
    height, width, _ = figure.axes[0].images[0].get_array().shape
    side = (width + samples.IMAGE_GAP) // columns
    assert (height, width) == (lines * side - samples.IMAGE_GAP, columns * side - samples.IMAGE_GAP)


def test_large_samples_are_made_smaller(rows):
    arrays = samples_of(["S/2", "S/4"], count=9, side=300, channels=3)
    arrays["image"][:] = [10, 200, 30]
    figure = samples.draw_samples(table.from_rows(rows), arrays)
    assert styles.WIDE - 0.2 < figure.get_size_inches()[0] <= styles.WIDE
    for axes in figure.axes:
        grid = axes.images[0].get_array()
        assert (grid[5, 5] == [10, 200, 30]).all()
        assert grid.shape[1] / plot_style.DPI == pytest.approx(3.3, abs=0.1)


def test_samples_of_blocks_are_side_by_side(rows):
    arrays = samples_of(["S/2", "S/2"])
    arrays["cell"] = np.array([cell_of("S", 2), cell_of("S", 2, block="in-context")])
    figure = samples.draw_samples(table.from_rows(rows), arrays)
    assert [text.get_text() for text in figure.texts] == ["in-context", "adaLN-Zero", "S"]
    places = {axes.get_label(): axes.get_position() for axes in figure.axes}
    assert places["S/in-context"].x1 < places["S/adaLN-Zero"].x0


def test_cells_without_a_row_are_not_drawn(rows):
    kept = [row for row in rows if row["size"] != "S"]
    figure = samples.draw_samples(table.from_rows(kept), samples_of(["S/2", "L/2"]))
    assert [axes.get_label() for axes in figure.axes] == ["L/2"]
    with pytest.raises(subsets.NoRowsError, match="no row has a cell of the samples, S-2-4"):
        samples.draw_samples(table.from_rows(kept), samples_of(["S/2"]))


def test_samples_of_other_shapes_are_refused(rows):
    with pytest.raises(ValueError, match=r"image \[models, n, H, W, 1 or 3\]"):
        samples.draw_samples(table.from_rows(rows), {**samples_of(["S/2"]), "label": np.arange(3)})
    with pytest.raises(ValueError, match="label"):
        samples.draw_samples(table.from_rows(rows), {"image": samples_of(["S/2"])["image"]})
