"""Which rows are drawn, and in which colors."""

import pytest
from sweep import rows_of, study

from dit_jax import style
from experiments.scaling import looks


@pytest.fixture(scope="module")
def rows():
    return study()


def test_widths_of_no_size_and_many_sizes_have_colors_of_their_own(rows):
    extra = [{**row, "size": None, "hidden_size": 96} for row in rows_of("S", 4)]
    look = looks.Looks.of(rows + extra)
    assert look.name(extra[0]) == "width 96"
    assert look.color(extra[0]) == style.COLORS[5]
    deep = next(row for row in rows if row["grid"] == "depth" and row["hidden_size"] == 128)
    assert look.color({**deep, "size": None}) == look.colors["S"]
    many = [{**row, "size": f"Z{i}", "params": i} for i in range(9) for row in rows_of("S", 4)]
    assert len(set(looks.Looks.of(many).colors.values())) == 9


def test_standard_models_are_of_the_common_block_and_depth(rows):
    assert looks.standard(rows) == [row for row in rows if row["grid"] == "sizes"]
    unnamed = [{**row, "size": None} for row in rows]
    with pytest.raises(looks.LackingError, match="no row has size"):
        looks.standard(unnamed)
