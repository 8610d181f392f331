"""The cells of a sweep: which there are, what they share, and which cannot be."""

import jax
import numpy as np
import pytest

from configs import smoke
from dit_jax import latents
from dit_jax.data import loader
from dit_jax.training import programs, tasks
from experiments.scaling.cells import grid
from experiments.scaling.configs import default
from experiments.scaling.configs import smoke as smoke_sweep


@pytest.fixture
def sweep():
    """Without cells, of configs/smoke.py at a constant learning rate, free to change."""
    base = smoke.get_config()
    base.optim.schedule = "constant"
    config = default.get_config(base)
    config.sizes = dict(
        XS=dict(hidden_size=16, depth=1, num_heads=1), S=dict(hidden_size=32, depth=2, num_heads=2)
    )
    config.steps = (20, 40)
    return config


def test_cells_are_all_combinations_the_cheapest_first(sweep):
    sweep.grids = dict(
        main=dict(seed=(1, 2), model=dict(patch_size=(4, 2)), size=("S", "XS")),
        deep=dict(model=dict(depth=(3,))),
    )
    cells = grid.make_cells(sweep)
    assert [cell.name for cell in cells] == [
        "XS-patch_size=4-seed=1",
        "XS-patch_size=4-seed=2",
        "XS-patch_size=2-seed=1",
        "XS-patch_size=2-seed=2",
        "S-patch_size=4-seed=1",
        "S-patch_size=4-seed=2",
        "S-patch_size=2-seed=1",
        "S-patch_size=2-seed=2",
        "depth=3",
    ]
    assert {cell.grid for cell in cells} == {"main", "deep"}
    cell = cells[3]
    model = cell.config.model
    assert (model.hidden_size, model.depth, model.num_heads) == (16, 1, 1)
    assert (model.patch_size, cell.config.seed, cell.size) == (2, 2, "XS")
    assert cell.steps == (20, 40)
    assert cells[-1].size == "32x3"
    expected = 40 * 16 * cell.counts["train_gflops_per_image"]
    assert cell.counts["train_gflops"] == pytest.approx(expected)


def test_cell_of_a_named_size_without_that_axis_bears_its_name(sweep):
    sweep.grids = dict(main=dict(model=dict(hidden_size=(16, 32), depth=(1,), num_heads=(1,))))
    assert [cell.size for cell in grid.make_cells(sweep)] == ["XS", "32x1"]


def test_a_cell_differs_from_the_base_in_its_values_alone(sweep):
    sweep.grids = dict(main=dict(size=("XS",), seed=(3,)))
    sweep.base.update(checkpoint_every_steps=7, checkpoint_keep_every_steps=0)
    (cell,) = grid.make_cells(sweep)
    expected = sweep.base.to_dict() | dict(seed=3, total_steps=40, eval_every_steps=20)
    # Each compute point is kept, and saved as often as in a run of its own or more.
    expected |= dict(checkpoint_every_steps=5, checkpoint_keep_every_steps=20)
    expected["model"] |= dict(hidden_size=16, depth=1, num_heads=1)
    assert cell.config.to_dict() == expected
    sweep.base.update(checkpoint_every_steps=1000, eval_every_steps=0)
    (cell,) = grid.make_cells(sweep)
    assert cell.config.checkpoint_every_steps == 20
    assert cell.config.eval_every_steps == 0


def test_size_with_another_depth_is_not_that_size(sweep):
    sweep.grids = dict(main=dict(size=("XS", "S"), model=dict(depth=(2, 3))))
    found = {cell.name: cell.size for cell in grid.make_cells(sweep)}
    assert found == {
        "XS-depth=2": "16x2",
        "XS-depth=3": "16x3",
        "S-depth=2": "S",
        "S-depth=3": "32x3",
    }


def test_axes_that_no_column_is_of_are_kept(sweep):
    sweep.grids = dict(main=dict(optim=dict(weight_decay=(0.0, 0.1))), other=dict(seed=(1, 2)))
    axes = {cell.name: cell.axes for cell in grid.make_cells(sweep)}
    assert axes == {
        "weight_decay=0.0": {"optim.weight_decay": 0.0},
        "weight_decay=0.1": {"optim.weight_decay": 0.1},
        "seed=1": {"optim.weight_decay": 0.0},
        "seed=2": {"optim.weight_decay": 0.0},
    }


def test_attention_of_the_cells_devices_is_not_asked_for_here(sweep):
    sweep.base.model.update(attention="cudnn", dtype="bfloat16")
    sweep.grids = dict(main=dict(seed=(0,)))
    (cell,) = grid.make_cells(sweep)
    assert cell.config.model.attention == "cudnn"


def test_every_cell_of_a_seed_learns_from_the_same_examples(sweep, digits_dir):
    """Images in the same order, at the same times, with the same noise and dropped labels."""
    sweep.base.data.data_dir = str(digits_dir)
    sweep.grids = dict(main=dict(size=("XS", "S"), model=dict(patch_size=(2, 4)), seed=(0, 1)))

    def examples(cell):
        config = cell.config
        program = programs.make_program(config, jax.devices()[:1])
        batches = loader.TrainIterator(
            latents.open_split(config, "train"), config, np.arange(16), None
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 5)
        return jax.device_get(
            program.task.draw_examples(next(batches), key, tasks.Frozen(), dropout=True)
        )

    found = [(cell.config.seed, examples(cell)) for cell in grid.make_cells(sweep)]
    assert len(found) == 8
    first = {seed: part for seed, part in reversed(found)}
    for seed, part in found:
        jax.tree.map(np.testing.assert_array_equal, part, first[seed])
    assert not np.array_equal(first[0].x_0, first[1].x_0)


def test_steps_may_be_an_axis(sweep):
    """As decaying schedules need it: every run then has one compute point."""
    sweep.base.optim.schedule = "cosine"
    sweep.grids = dict(main=dict(total_steps=(30, 60)))
    assert [cell.steps for cell in grid.make_cells(sweep)] == [(30,), (60,)]


@pytest.mark.parametrize(
    ("grids", "messages"),
    [
        (
            dict(main=dict(model=dict(patch_size=(2, 3), num_heads=(2, 5)))),
            [
                "num_heads=5-patch_size=2: num_heads=5 must divide hidden_size=32",
                r"num_heads=2-patch_size=3: patch_size=3 must divide input_size=8",
                "num_heads=5-patch_size=3: ",
            ],
        ),
        (
            dict(main=dict(size=("S", "XS")), deep=dict(model=dict(depth=(1, 2)))),
            ["S of grid main: the same config as depth=2 of grid deep"],
        ),
        (dict(main=dict(seed=(0, 0))), ["seed=0 of grid main: the same name as seed=0"]),
        (dict(main=dict(size=("XL",))), [r"grids.main.size has \['XL'\]; config.sizes has S, XS"]),
        (dict(main=dict(seed=3)), ["grids.main.seed=3 must be a tuple of values"]),
        (dict(main=dict(model=dict(width=(3,)))), ["width=3: .*width"]),
        (dict(main=dict(optim=dict(schedule=("cosine",)))), [r"steps=\(20, 40\).*schedule=cosine"]),
        (
            dict(main=dict(sample=dict(steps=(1, 2000)))),
            ["steps=1: cannot take 1", "steps=2000: cannot take 2000"],
        ),
        (dict(), ["the sweep has no cells"]),
    ],
    ids=str,
)
def test_all_cells_that_cannot_be_are_told(sweep, grids, messages):
    sweep.base.sample.update(grid="uniform", cfg_scale=1.0)
    sweep.grids = grids
    for message in messages:
        with pytest.raises(ValueError, match=message):
            grid.make_cells(sweep)


def test_names_that_a_file_system_takes_for_one_are_told(sweep):
    sweep.sizes["xs"] = dict(sweep.sizes.XS, depth=7)
    sweep.grids = dict(main=dict(size=("XS", "xs")))
    with pytest.raises(ValueError, match="xs of grid main: the same name as XS"):
        grid.make_cells(sweep)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "different whole numbers"),
        ((0, 20), "different whole numbers"),
        ((20, 20), "different whole numbers"),
        ((10.0, 20.0), "different whole numbers"),
        ((20, 2001), "multiples of 1 only, so that a run would keep 2001 checkpoints"),
    ],
    ids=str,
)
def test_compute_points_that_cannot_be_are_refused(sweep, steps, message):
    sweep.grids = dict(main=dict(seed=(0,)))
    sweep.steps = steps
    with pytest.raises(ValueError, match=message):
        grid.make_cells(sweep)


def test_one_cell_by_its_name():
    (cell,) = grid.make_cells(smoke_sweep.get_config(), only="XS-patch_size=4")
    assert cell.name == "XS-patch_size=4"
    with pytest.raises(ValueError, match=r"no cell 'XL'; it has XS-patch_size=2, XS-patch_size=4"):
        grid.make_cells(smoke_sweep.get_config(), only="XL")
