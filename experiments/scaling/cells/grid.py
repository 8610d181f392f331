"""The cells of a sweep: one run config for every combination of values in its grids."""

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

MOST_CHECKPOINTS = 100  # of a run, which keeps one at each multiple of its steps' common divisor
# Axes with a column in every table.
COLUMNS = ("size", "seed", "batch_size", "total_steps", "eval_draws", "optim.learning_rate")
COLUMNS += tuple(f"model.{key}" for key in ("block", "depth", "hidden_size", "num_heads"))
COLUMNS += ("model.patch_size",)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A run, and the steps at which to evaluate it."""

    name: str  # name of its directory, such as 'S-patch_size=2-seed=0'
    grid: str  # name of its grid
    size: str  # name in config.sizes; without one hidden size x depth, such as '64x4'
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
    """Returns all cells of a sweep, the cheapest first, or only the cell with a given name.

    Args: only, the name of one cell; empty for all.
    Raises: ValueError that lists all invalid or duplicate cells; ValueError for an unknown name.
    """
    valid, problems, names = [], [], []
    grids = {name: _flatten(axes) for name, axes in sweep.grids.items()}
    # Axes of any grid become columns for all cells, so that every row of the table has them.
    axes = dict.fromkeys(key for grid in grids.values() for key in grid if key not in COLUMNS)
    for grid, grid_axes in grids.items():
        _check_axes(sweep, grid, grid_axes)
        for values in itertools.product(*grid_axes.values()):
            chosen = dict(zip(grid_axes, values, strict=True))
            name = _name(chosen)
            names.append(name)
            if only not in ("", name):
                continue
            # Problems are collected, so that one error lists all of them.
            try:
                valid.append(_cell(sweep, name, grid, chosen, axes))
            except ValueError as error:
                problems.append(f"  {name}: {error}")
    if not names:
        raise UserError("the sweep has no cells: set config.grids, as configs/default.py tells.")
    if only and only not in names:
        raise UserError(f"the sweep has no cell {only!r}; it has {', '.join(names)}.")
    problems += _duplicates(valid)
    if problems:
        raise UserError("these cells of the sweep are invalid:\n" + "\n".join(problems))
    return sorted(valid, key=lambda cell: cell.counts["train_gflops"])


def _flatten(axes, prefix=""):
    """Returns {'model.patch_size': its values}, with 'size' first and 'seed' last.

    Names of cells list the axes in this order.
    """
    flat = {}
    for key, value in axes.items():
        nested = isinstance(value, ConfigDict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return dict(sorted(flat.items(), key=lambda axis: (axis[0] != "size", axis[0] == "seed")))


def _check_axes(sweep, grid, axes):
    """Raises: ValueError for an axis that is no tuple of values, or an unknown size."""
    for key, values in axes.items():
        if not isinstance(values, tuple | list) or not values:
            raise UserError(f"grids.{grid}.{key}={values!r} must be a tuple of values.")
    unknown = [name for name in axes.get("size", ()) if name not in sweep.sizes]
    if unknown:
        known = ", ".join(sweep.sizes) or "none"
        raise UserError(f"grids.{grid}.size has {unknown}; config.sizes has {known}.")


def _name(chosen):
    """Returns a cell's name, which is also a valid directory name: 'S-patch_size=2-seed=0'."""
    parts = (
        value if key == "size" else f"{key.rpartition('.')[2]}={value}"
        for key, value in chosen.items()
    )
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts))


def _cell(sweep, name, grid, chosen, axes):
    """Builds and checks a cell.

    Args: chosen, the value of every axis of the grid.   axes: those without a column.
    Raises: ValueError if the values do not fit the base or do not make a valid run.
    """
    config = sweep.base.copy_and_resolve_references()
    if "size" in chosen:
        _set_model(config, sweep.sizes[chosen["size"]])
    keys = {key: value for key, value in chosen.items() if key != "size"}
    try:
        config.update_from_flattened_dict(keys)
    except (KeyError, TypeError) as error:
        raise UserError(f"{keys} does not fit config.base: {error.args[0]}") from error
    # With total_steps as an axis, each cell is a run of its own length, measured at its end only.
    steps = (config.total_steps,) if "total_steps" in chosen else tuple(sorted(sweep.steps))
    _check_steps(steps, config.optim.schedule)
    every = math.gcd(*steps)
    # Every compute point must be a checkpoint, so the interval divides their common divisor. It is
    # at most the base's, so that a crash loses no more work than in an ordinary run.
    interval = min(every, config.checkpoint_every_steps)
    interval = next(n for n in range(interval, 0, -1) if every % n == 0)
    config.update(total_steps=steps[-1], checkpoint_every_steps=interval)
    config.checkpoint_keep_every_steps = every
    if config.eval_every_steps:
        config.eval_every_steps = every
    _check(config)
    size = _size(sweep, config.model, chosen.get("size"))
    # A key has dots: 'optim.weight_decay'.
    values = {key: functools.reduce(operator.getitem, key.split("."), config) for key in axes}
    return Cell(name, grid, size, config.lock(), steps, values)


def _set_model(config, size):
    """Sets some keys of the base's model; a size with a 'name' replaces the whole model."""
    if "name" in size:
        with config.unlocked():
            config.model = size.copy_and_resolve_references()
    else:
        config.model.update(size)


def _size(sweep, model, first):
    """Returns the name of the size whose keys the model has, else '64x4', hidden size x depth.

    A grid may set the keys of a size itself, so a size is recognised by its values.
    Args: first, the name to try first.
    Raises: ValueError for another network than a DiT without a name.
    """
    names = dict.fromkeys([*([first] if first else []), *sweep.sizes])
    for name in names:
        if all(model.get(key) == value for key, value in sweep.sizes[name].items()):
            return name
    if model.name != "dit":
        raise UserError(f"a {model.name} must be one of config.sizes, so that it has a name.")
    return f"{model.hidden_size}x{model.depth}"


def _check_steps(steps, schedule):
    """Raises: ValueError unless one run of this schedule can have these compute points."""
    whole = all(isinstance(step, int) for step in steps)
    if not steps or not whole or steps[0] < 1 or len(set(steps)) < len(steps):
        raise UserError(f"{steps=} must be different whole numbers of at least 1.")
    if len(steps) > 1 and schedule != "constant":
        raise UserError(
            f"{steps=} of a run with optim.schedule={schedule}: only its last step is a compute "
            "point. Use a constant schedule, or put total_steps into the grid."
        )
    every = math.gcd(*steps)
    if steps[-1] // every > MOST_CHECKPOINTS:
        raise UserError(
            f"{steps=} are multiples of {every} only, so that a run would keep "
            f"{steps[-1] // every} checkpoints, more than {MOST_CHECKPOINTS}; take rounder numbers."
        )


def _check(config):
    """Raises: ValueError for a config that fails without its data and its devices.

    It builds the whole program, so that errors come before any cell has run.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh = dict(data=1, fsdp=1, tensor=1)
        config.model.attention = "auto"  # the cell's device may support a kernel that is not here
        for key, value in (("scale", (1.0,)), ("shift", (0.0,))):
            if not config.latents.get(key, True):  # empty: to be read from the moments
                config.latents[key] = value
    program = programs.make_program(config, jax.devices()[:1])
    arguments = program.task.process, config.objective.prediction, program.mesh
    generate.make_sample_fn(program.model, config.sample, *arguments)


def _duplicates(found):
    """Returns a line for each cell with the name or the config of an earlier cell."""
    problems, seen = [], {}
    for cell in found:
        # File systems may ignore case, so names that differ only in case share a directory.
        for key in (("name", cell.name.lower()), ("config", cell.config.to_json(sort_keys=True))):
            first = seen.setdefault(key, cell)
            if first is not cell:
                problems.append(
                    f"  {cell.name} of grid {cell.grid}: the same {key[0]} as {first.name} of "
                    f"grid {first.grid}"
                )
                break
    return problems
