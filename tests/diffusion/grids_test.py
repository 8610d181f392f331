"""The samplers' time grids against recorded grids and published formulas."""

import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from dit_jax.diffusion import grids

ALL = ("ddpm", "vp", "flow", "gvp", "edm")


def test_uniform_grid_retains_the_published_indices(golden, process):
    for steps, name in ((250, "timesteps_250"), (10, "ddpm_timesteps")):
        grid = grids.build(process, steps)
        assert grid[-1] == 0  # ends on data
        visited = process.network_time(grid[:-1])
        np.testing.assert_array_equal(visited, golden[name][::-1])  # T-1 .. 0, never T or -1


def test_chain_grids_retain_the_expected_indices(process):
    def indices(steps, kind):
        return process.network_time(grids.build(process, steps, kind)[:-1])[::-1].tolist()

    assert indices(6, "3,2,1") == [0, 166, 333, 334, 666, 667]
    assert indices(5, "ddim") == [0, 200, 400, 600, 800]
    assert indices(250, "ddim")[-1] == 996
    assert indices(50, "leading") == list(range(1, 982, 20))
    assert indices(30, "leading")[-2:] == [925, 958]  # stride 33, though no stride gives 30 levels
    assert indices(999, "leading") == list(range(1, 1000))
    assert indices(5, "trailing") == [199, 399, 599, 799, 999]
    assert indices(7, "trailing") == [142, 285, 428, 570, 713, 856, 999]
    for steps in range(2, 1001):
        # The published formula; arange in floats sometimes returns one value too many.
        reference = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
        np.testing.assert_array_equal(indices(steps, "trailing"), reference[::-1])
    assert indices(4, "dpm_leading") == [201, 401, 601, 801]
    assert indices(20, "dpm_leading") == list(range(48, 942, 47))
    assert indices(4, "dpm_linspace") == [250, 500, 749, 999]
    for kind, steps in (("leading", 1000), ("dpm_leading", 999), ("dpm_leading", 1000)):
        with pytest.raises(
            ValueError, match=f"grid {kind} leaves out level 1: take fewer than {steps}"
        ):
            grids.build(process, steps, kind)
    with pytest.raises(ValueError, match=r"grid=3,2,1 has 6 steps, not steps=5"):
        grids.build(process, 5, "3,2,1")
    with pytest.raises(ValueError, match=r"cannot retain 400 of the 333 levels of a section"):
        grids.build(process, 402, "1,400,1")
    with pytest.raises(ValueError, match=r"no stride retains 300 of 1000 levels.* \[334, 250\]"):
        grids.build(process, 300, "ddim")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["uniform", "quadratic", "karras", "shifted"])
def test_grids_decrease_to_data(build_process, name, kind):
    process = build_process(name)
    grid = grids.build(process, 12, kind, "u")
    assert grid.shape == (13,)
    assert 0.9 < grid[0] <= 1
    assert grid[-1] == 0
    assert np.all(np.diff(grid) < 0)
    if name == "ddpm":
        np.testing.assert_array_equal(process.level(grid) / 1000, grid)


def test_karras_grid_equals_the_published_formula(build_process):
    process = build_process("edm")
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    actual = process.sigma(grids.build(process, 18, "karras"))[:-1]
    # As a list, so that each value is compared alone: they go from 80 to 0.002.
    assert_trees_close(actual.tolist(), sigma.tolist(), 1e-12)


def test_shift_s_lowers_log_snr_by_2_log_s(build_process):
    process = build_process("flow")
    plain = process.snr(grids.build(process, 9, "uniform", "u")[1:-1])
    shifted = process.snr(grids.build(process, 9, "shifted", "u", shift=3.0)[1:-1])
    assert_close(np.log(shifted), np.log(plain) - 2 * np.log(3), 1e-12)


def test_grid_for_eps_begins_where_eps_determines_x_0(build_process):
    process = build_process("flow")
    assert grids.build(process, 10, prediction="u")[0] == 1
    assert grids.build(process, 10, prediction="eps")[0] == 0.999
    assert grids.build(build_process("vp"), 10, prediction="eps")[0] == 1


def test_karras_grid_begins_below_a_last_level_without_signal(build_process):
    process = build_process("ddpm", zero_terminal_snr=True)
    assert grids.build(process, 10, "karras", "v")[0] == 0.999
    assert grids.build(process, 20, "uniform", "v")[0] == 1


def test_error_for_a_grid_that_does_not_decrease_names_the_step(process):
    with pytest.raises(ValueError, match=r"t = 0\.202 is followed by 0.202 at step 496 of 900"):
        grids.build(process, 900, "quadratic")
    with pytest.raises(ValueError, match=r"t = 0\.5 is followed by 0\.7 at step 2 of 3"):
        grids.check(np.array([1.0, 0.5, 0.7, 0.0]))
    with pytest.raises(ValueError, match="end at data, t = 0, not"):
        grids.check(np.array([1.0, 0.5]))


@pytest.mark.parametrize("counts", [(175,), (250,), (10, 10, 15, 15, 10), (999,)], ids=str)
def test_sections_round_like_the_published_code(process, counts):
    """The published code adds up strides in floats; a product can round to another index."""
    kind = ",".join(map(str, counts))
    grid = grids.build(process, sum(counts), kind if len(counts) > 1 else "uniform")
    expected, size = [], 1000 // len(counts)
    for section, count in enumerate(counts):
        offset = 0.0
        for _ in range(count):
            expected.append(section * size + round(offset))
            offset += (size - 1) / (count - 1)
    np.testing.assert_array_equal(np.rint(grid[:-1] * 1000 - 1), expected[::-1])


@pytest.mark.parametrize("kind", ["5,,5", ",10", "10,", "5;5", "-5,15", "²,8"])
def test_malformed_lists_of_counts_are_refused(process, kind):
    with pytest.raises(ValueError, match="unknown grid"):
        grids.build(process, 10, kind)


@pytest.mark.parametrize("steps", [1, 1001])
def test_fewer_than_2_or_more_steps_than_levels_are_refused(process, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps.*2 to 1000"):
        grids.build(process, steps)
