"""The coordinate check of tiny models finds what each class of matrices does with the width."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from experiments.mup import coordinate_check

pytestmark = pytest.mark.slow
KINDS = coordinate_check.KINDS
WIDTHS, STEPS = (16, 64), 4  # of the config 32
# The output of each matrix that mup_base_width scales, but the time embedding's.
SCALED = (
    "blocks/adaLN_modulation",
    "blocks/attn/qkv",
    "blocks/attn/proj",
    "blocks/mlp/fc1",
    "blocks/mlp/fc2",
    "final_layer/adaLN_modulation",
    "final_layer/linear",
)


@pytest.fixture(scope="module")
def config(digits_dir):
    config = smoke.get_config()
    config.data.data_dir = str(digits_dir)
    config.model.update(depth=1, num_heads=4, learn_sigma=False, scan_unroll=False)
    return config


@pytest.fixture(scope="module")
def rows(config):
    configs = [
        coordinate_check.set_width(config, width, scaled)
        for width in WIDTHS
        for scaled in (False, True)
    ]
    return [row for c in configs for row in coordinate_check.measure_movements(c, STEPS, seeds=1)]


@pytest.mark.parametrize("name", [*SCALED, "stream"])
def test_with_one_rate_wide_models_move_further(rows, name):
    """A matrix that keeps its rate moves its output as width^1; of small inputs, above 0.4."""
    same, by_width = coordinate_check.fit_exponents(rows, STEPS).loc[name, [*KINDS.values()]]
    assert abs(by_width) < 0.25
    assert same > by_width + 0.3


def test_time_embedding_grows_by_its_initial_values_alone(rows):
    """They have one deviation at all widths, as published: up to width^0.5; with its rate, ^0.8."""
    exponents = coordinate_check.fit_exponents(rows, STEPS)
    assert exponents.loc["t_embedder/mlp_2", KINDS[True]] < 0.6


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_moves_before_the_output_has(rows, scaled):
    """All gates and the last matrix are 0: the first step moves that matrix alone."""
    moved = [row["moved"] for row in rows if row["step"] == 1 and row["scaled"] == scaled]
    assert len(moved) == len(WIDTHS)
    for found in moved:
        assert [name for name, value in found.items() if value] == ["final_layer/linear"]


def test_exponent_is_that_of_a_power_of_the_mean_over_seeds():
    rows = [
        dict(width=width, scaled=False, step=1, moved=dict(a=factor * width**-0.5, b=0.0))
        for width in (8, 16, 64)
        for factor in (1.0, 3.0)
    ]
    exponents = coordinate_check.fit_exponents(rows, 1)[KINDS[False]]
    assert exponents["a"] == pytest.approx(-0.5)
    assert np.isnan(exponents["b"])


def test_table_json_and_plot_are_written(rows, config, tmp_path):
    out = tmp_path / "check.json"
    coordinate_check.write(out, config, rows)
    assert json.loads(out.read_text())["rows"] == rows
    assert json.loads(out.read_text())["of"]["base_width"] == 32
    assert Image.open(out.with_suffix(".png")).width == pytest.approx(660, abs=1)
    lines = coordinate_check.format_exponents(rows).splitlines()
    assert {line.split()[0] for line in lines[1:]} == rows[0]["moved"].keys()


def test_width_must_hold_whole_heads(config):
    wide = coordinate_check.set_width(config, 64, True)
    assert (wide.model.num_heads, wide.optim.mup_base_width) == (8, 32)
    with pytest.raises(ValueError, match=r"width=20 must be a multiple of .* head size, 8"):
        coordinate_check.set_width(config, 20, False)
