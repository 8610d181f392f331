"""The cells of a sweep: every combination of its grids' values, each the config of a run."""

import dataclasses
import itertools
import json
import math
import re

import jax
from ml_collections import ConfigDict

from dit_jax import models
from dit_jax.errors import UserError
from dit_jax.sampling import generate
from dit_jax.training import programs

MOST_CHECKPOINTS = 100  # of a run: its compute points have a common divisor
# Axes that a table has columns for in any case.
COLUMNS = ("size", "seed", "batch_size", "total_steps", "eval_draws", "optim.learning_rate")
COLUMNS += tuple(f"model.{key}" for key in ("block", "depth", "hidden_size", "num_heads"))
COLUMNS += ("model.patch_size",)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A run and when to evaluate it."""

    name: str  # of its directory: 'S-patch_size=2-seed=0'
    grid: str
    size: str  # by name, else '64x4', hidden size and depth
    config: ConfigDict  # of dit_jax.train
    steps: tuple[int, ...]  # compute points, ascending
    axes: dict  # 'optim.weight_decay': its value, for those of the sweep that no column is of

    @property
    def counts(self) -> dict:
        """Of `models.count`, and the 'train_gflops' of the whole run."""
        counts = models.count(self.config)
        images = self.steps[-1] * self.config.batch_size
        return counts | {"train_gflops": images * counts["train_gflops_per_image"]}


def cells(sweep: ConfigDict, only: str = "") -> list[Cell]:
    """All cells of a sweep's config, the cheapest first, or the only one of a name.

    Raises: ValueError that lists all cells that cannot be, or are there twice; for a name that
      none has.
    """
    found, problems, names = [], [], []
    grids = {name: _flatten(axes) for name, axes in sweep.grids.items()}
    axes = dict.fromkeys(key for grid in grids.values() for key in grid if key not in COLUMNS)
    for grid, values_of in grids.items():
        _check_axes(sweep, grid, values_of)
        for values in itertools.product(*values_of.values()):
            chosen = dict(zip(values_of, values, strict=True))
            name = _name(chosen)
            names.append(name)
            if only not in ("", name):
                continue
            try:
                found.append(_cell(sweep, name, grid, chosen, axes))
            except ValueError as error:
                problems.append(f"  {name}: {error}")
    if not names:
        raise UserError("the sweep has no cells: set config.grids, as configs/default.py tells.")
    if only and only not in names:
        raise UserError(f"the sweep has no cell {only!r}; it has {', '.join(names)}.")
    problems += _duplicates(found)
    if problems:
        raise UserError("these cells of the sweep cannot be:\n" + "\n".join(problems))
    return sorted(found, key=lambda cell: cell.counts["train_gflops"])


def _flatten(axes, prefix=""):
    """'model.patch_size' -> its values; sizes first and seeds last, as cells are named."""
    flat = {}
    for key, value in axes.items():
        nested = isinstance(value, ConfigDict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return dict(sorted(flat.items(), key=lambda axis: (axis[0] != "size", axis[0] == "seed")))


def _check_axes(sweep, grid, axes):
    for key, values in axes.items():
        if not isinstance(values, tuple | list) or not values:
            raise UserError(f"grids.{grid}.{key}={values!r} must be a tuple of values.")
    unknown = [name for name in axes.get("size", ()) if name not in sweep.sizes]
    if unknown:
        known = ", ".join(sweep.sizes) or "none"
        raise UserError(f"grids.{grid}.size has {unknown}; config.sizes has {known}.")


def _name(chosen):
    parts = (
        value if key == "size" else f"{key.rpartition('.')[2]}={value}"
        for key, value in chosen.items()
    )
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts))


def _cell(sweep, name, grid, chosen, axes):
    config = sweep.base.copy_and_resolve_references()
    if "size" in chosen:
        _set_model(config, sweep.sizes[chosen["size"]])
    keys = {key: value for key, value in chosen.items() if key != "size"}
    try:
        config.update_from_flattened_dict(keys)
    except (KeyError, TypeError) as error:
        raise UserError(f"{keys} does not fit config.base: {error.args[0]}") from error
    steps = (config.total_steps,) if "total_steps" in chosen else tuple(sorted(sweep.steps))
    _check_steps(steps, config.optim.schedule)
    every = math.gcd(*steps)
    # Every compute point is a checkpoint, and no more work can be lost than in a run of its own.
    often = min(every, config.checkpoint_every_steps)
    often = next(n for n in range(often, 0, -1) if every % n == 0)
    config.update(total_steps=steps[-1], checkpoint_every_steps=often)
    config.checkpoint_keep_every_steps = every
    if config.eval_every_steps:
        config.eval_every_steps = every
    _check(config)
    size = _size(sweep, config.model, chosen.get("size"))
    return Cell(name, grid, size, config.lock(), steps, {key: _get(config, key) for key in axes})


def _set_model(config, size):
    """Some keys of the base's model; or, with a name, all of another one."""
    if "name" in size:
        with config.unlocked():
            config.model = size.copy_and_resolve_references()
    else:
        config.model.update(size)


def _size(sweep, model, first):
    """The name of the size that the model has, `first` before others, else '64x4'."""
    names = dict.fromkeys([*([first] if first else []), *sweep.sizes])
    for name in names:
        if all(model.get(key) == value for key, value in sweep.sizes[name].items()):
            return name
    if model.name != "dit":
        raise UserError(f"a {model.name} must be one of config.sizes, so that it has a name.")
    return f"{model.hidden_size}x{model.depth}"


def _get(config, key):
    """The value of 'optim.weight_decay'."""
    for part in key.split("."):
        config = config[part]
    return config


def _check_steps(steps, schedule):
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
    """All that can be checked without data and without the devices that the cell will have."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh = dict(data=1, fsdp=1, tensor=1)
        config.model.attention = "auto"  # the cell's device may have what this one has not
        for key, value in (("scale", (1.0,)), ("shift", (0.0,))):
            if not config.latents.get(key, True):  # the moments will tell
                config.latents[key] = value
    program = programs.make_program(config, jax.devices()[:1])
    arguments = program.task.process, config.objective.prediction, program.mesh
    generate.make_sample_fn(program.model, config.sample, *arguments)


def _duplicates(found):
    problems, seen = [], {}
    for cell in found:
        for what in (("name", cell.name.lower()), ("config", _text(cell.config))):
            first = seen.setdefault(what, cell)
            if first is not cell:
                problems.append(
                    f"  {cell.name} of grid {cell.grid}: the same {what[0]} as {first.name} of "
                    f"grid {first.grid}"
                )
                break
    return problems


def _text(config):
    return json.dumps(config.to_dict(), sort_keys=True)
