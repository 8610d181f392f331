"""Which rows are drawn, and in which colors."""

import pytest
from helpers.sweep import rows_of, study

from dit_jax.evaluation import plot_style
from experiments.scaling.figures import styles, subsets
from experiments.scaling.fits import table


@pytest.fixture(scope="module")
def rows():
    return study()


def test_models_without_a_size_have_the_color_of_their_width(rows):
    extra = [{**row, "size": None, "hidden_size": 96} for row in rows_of("S", 4)]
    look = styles.Styles.from_table(table.from_rows(rows + extra))
    assert look.get_name(extra[0]) == "width 96"
    assert look.get_color(extra[0]) == plot_style.COLORS[5]


def test_of_more_sizes_than_colors_those_of_a_width_share_theirs():
    many = [
        {**row, "size": f"Z{i}", "params": i, "hidden_size": 32 * (i // 2)}
        for i in range(9)
        for row in rows_of("S", 4)
    ]
    look = styles.Styles.from_table(table.from_rows(many))
    assert list(look.colors) == ["width 0", "width 32", "width 64", "width 96", "width 128"]
    assert look.get_name(many[-1]) == "width 128"
    assert len(set(look.colors.values())) == 5


def test_standard_models_are_of_the_common_block_and_depth(rows):
    standard = subsets.select_standard(table.from_rows(rows))
    assert table.to_rows(standard) == [row for row in rows if row["grid"] == "sizes"]
    unnamed = [{**row, "size": None} for row in rows]
    with pytest.raises(subsets.NoRowsError, match="no row has size"):
        subsets.select_standard(table.from_rows(unnamed))
