"""The cells of a sweep: a run config for every combination of values in its grids."""

import dataclasses
import functools
import itertools
import math
import operator
import re

import jax
from ml_collections import ConfigDict

from dit_jax import models
from dit_jax.errors import UserError
from dit_jax.sampling import generate
from dit_jax.training import programs

# A run keeps a checkpoint at each multiple of the common divisor of its compute points.
MOST_CHECKPOINTS = 100
# Axes with a column in every table.
COLUMNS = ("size", "seed", "batch_size", "total_steps", "eval_draws", "optim.learning_rate")
COLUMNS += tuple(f"model.{key}" for key in ("block", "depth", "hidden_size", "num_heads"))
COLUMNS += ("model.patch_size",)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A run of a sweep, and the steps at which to evaluate it."""

    name: str  # also the name of the cell's directory, such as 'S-patch_size=2-seed=0'
    grid: str  # name of the grid
    size: str  # name in config.sizes; for a model without a name '64x4', hidden size x depth
    config: ConfigDict  # for dit_jax.train
    steps: tuple[int, ...]  # compute points, ascending
    axes: dict  # values of the sweep's axes without a column, such as {'optim.weight_decay': 0.1}

    @property
    def counts(self) -> dict:
        """The counts of `models.count`, and 'train_gflops' of the whole run."""
        counts = models.count(self.config)
        images = self.steps[-1] * self.config.batch_size
        return counts | {"train_gflops": images * counts["train_gflops_per_image"]}


def make_cells(sweep: ConfigDict, only: str = "") -> list[Cell]:
    """Returns the cells of a sweep, the cheapest first.

    Args: only, the name of the single cell to return; empty for all.
    Raises: ValueError that lists all invalid or duplicate cells; ValueError for an unknown name.
    """
    valid, problems, names = [], [], []
    grids = {name: _flatten_axes(axes) for name, axes in sweep.grids.items()}
    # An axis of one grid becomes a column for all cells, so that every row of the table has it.
    columns = dict.fromkeys(key for grid in grids.values() for key in grid if key not in COLUMNS)
    for grid, grid_axes in grids.items():
        _check_axes(sweep, grid, grid_axes)
        for values in itertools.product(*grid_axes.values()):
            axis_values = dict(zip(grid_axes, values, strict=True))
            name = _make_name(axis_values)
            names.append(name)
            if only not in ("", name):
                continue
            # Problems are collected, so that one error lists all of them.
            try:
                valid.append(_make_cell(sweep, name, grid, axis_values, columns))
            except ValueError as error:
                problems.append(f"  {name}: {error}")
    if not names:
        raise UserError("the sweep has no cells: set config.grids, see configs/default.py.")
    if only and only not in names:
        raise UserError(f"the sweep has no cell {only!r}; it has {', '.join(names)}.")
    problems += _list_duplicates(valid)
    if problems:
        raise UserError("these cells of the sweep are invalid:\n" + "\n".join(problems))
    return sorted(valid, key=lambda cell: cell.counts["train_gflops"])


def _flatten_axes(axes, prefix=""):
    """Returns the axes of a grid by their full keys, {'model.patch_size': (2, 4)}.

    'size' is first and 'seed' last, as in the names of cells.
    """
    flat = {}
    for key, value in axes.items():
        nested = isinstance(value, ConfigDict)
        flat |= _flatten_axes(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return dict(sorted(flat.items(), key=lambda axis: (axis[0] != "size", axis[0] == "seed")))


def _check_axes(sweep, grid, axes):
    """Raises a ValueError for an axis that is no tuple of values, or for an unknown size."""
    for key, values in axes.items():
        if not isinstance(values, tuple | list) or not values:
            raise UserError(f"grids.{grid}.{key}={values!r} must be a tuple of values.")
    unknown = [name for name in axes.get("size", ()) if name not in sweep.sizes]
    if unknown:
        known = ", ".join(sweep.sizes) or "none"
        raise UserError(f"grids.{grid}.size has {unknown}; config.sizes has {known}.")


def _make_name(axis_values):
    """Returns the name of a cell, a valid directory name such as 'S-patch_size=2-seed=0'."""
    parts = (
        value if key == "size" else f"{key.rpartition('.')[2]}={value}"
        for key, value in axis_values.items()
    )
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts))


def _make_cell(sweep, name, grid, axis_values, columns):
    """Makes and checks a cell.

    Args: axis_values, by key.   columns: the keys whose values `Cell.axes` has.
    Raises: ValueError if the values do not fit the base or do not make a valid run.
    """
    config = sweep.base.copy_and_resolve_references()
    if "size" in axis_values:
        _set_model(config, sweep.sizes[axis_values["size"]])
    overrides = {key: value for key, value in axis_values.items() if key != "size"}
    try:
        config.update_from_flattened_dict(overrides)
    except (KeyError, TypeError) as error:
        raise UserError(f"{overrides} does not fit config.base: {error.args[0]}") from error
    # If total_steps is an axis, each cell is measured at its own end only.
    steps = (config.total_steps,) if "total_steps" in axis_values else tuple(sorted(sweep.steps))
    _check_steps(steps, config.optim.schedule)
    divisor = math.gcd(*steps)
    # Every compute point must have a checkpoint, so the interval divides `divisor`. It is at most
    # that of the base, so that a crash loses no more work than in an ordinary run.
    longest = min(divisor, config.checkpoint_every_steps)
    interval = next(n for n in range(longest, 0, -1) if divisor % n == 0)
    config.update(total_steps=steps[-1], checkpoint_every_steps=interval)
    config.checkpoint_keep_every_steps = divisor
    if config.eval_every_steps:
        config.eval_every_steps = divisor
    _check_config(config)
    size = _find_size_name(sweep, config.model, axis_values.get("size"))
    # A key has dots, as in 'optim.weight_decay'.
    axes = {key: functools.reduce(operator.getitem, key.split("."), config) for key in columns}
    return Cell(name, grid, size, config.lock(), steps, axes)


def _set_model(config, size):
    """Sets the model's keys that a size has; a size with a 'name' replaces the whole model."""
    if "name" in size:
        with config.unlocked():
            config.model = size.copy_and_resolve_references()
    else:
        config.model.update(size)


def _find_size_name(sweep, model, preferred):
    """Returns the name of the size whose keys the model has, else '64x4', hidden size x depth.

    A grid may change the keys of a size, so the values decide.
    Args: preferred, the name to try first, or None.
    Raises: ValueError for a UNet without a name.
    """
    names = [preferred, *sweep.sizes] if preferred else sweep.sizes
    for name in names:
        if all(model.get(key) == value for key, value in sweep.sizes[name].items()):
            return name
    if model.name != "dit":
        raise UserError(f"a {model.name} must be one of config.sizes, so that it has a name.")
    return f"{model.hidden_size}x{model.depth}"


def _check_steps(steps, schedule):
    """Raises a ValueError unless one run of this schedule can have these compute points."""
    whole = all(isinstance(step, int) for step in steps)
    if not steps or not whole or steps[0] < 1 or len(set(steps)) < len(steps):
        raise UserError(f"{steps=} must be different whole numbers of at least 1.")
    if len(steps) > 1 and schedule != "constant":
        raise UserError(
            f"{steps=} of a run with optim.schedule={schedule}: only its last step is a compute "
            "point. Use a constant schedule, or put total_steps into the grid."
        )
    divisor = math.gcd(*steps)
    checkpoints = steps[-1] // divisor
    if checkpoints > MOST_CHECKPOINTS:
        raise UserError(
            f"{steps=} are multiples of {divisor} only, so that a run would keep {checkpoints} "
            f"checkpoints, more than {MOST_CHECKPOINTS}. Choose steps with a larger common divisor."
        )


def _check_config(config):
    """Raises a ValueError for a config that fails without its data and its devices.

    It builds the whole program, so that errors come before any cell has run.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh = dict(data=1, fsdp=1, tensor=1)
        config.model.attention = "auto"  # the cell's device may have a kernel that this one lacks
        for key, value in (("scale", (1.0,)), ("shift", (0.0,))):
            if not config.latents.get(key, True):  # empty: read from the moments in a run
                config.latents[key] = value
    program = programs.make_program(config, jax.devices()[:1])
    arguments = program.task.process, config.objective.prediction, program.mesh
    generate.make_sample_fn(program.model, config.sample, *arguments)


def _list_duplicates(cells):
    """Returns a line for each cell with the name or the config of an earlier cell."""
    problems, seen = [], {}
    for cell in cells:
        # File systems may ignore case, so names that differ only in case share a directory.
        identity = {"name": cell.name.lower(), "config": cell.config.to_json(sort_keys=True)}
        for kind, value in identity.items():
            earlier = seen.setdefault((kind, value), cell)
            if earlier is not cell:
                problems.append(
                    f"  {cell.name} of grid {cell.grid}: the same {kind} as {earlier.name} of "
                    f"grid {earlier.grid}"
                )
                break
    return problems
