"""Time grids of samplers: [steps + 1] f64 arrays that decrease from noise to t = 0, data."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dit_jax.diffusion.processes import DiscreteProcess, Process
from dit_jax.errors import UserError


def build(
    process: Process, steps: int, kind: str = "uniform", prediction: str = "eps", *, rho=7, shift=3
) -> np.ndarray:
    """Returns the times [steps + 1] f64 of a sampler, for networks with this prediction.

    Every process has these kinds: 'uniform', uniform in t; 'quadratic', the squares of uniform
    times; 'karras', uniform in (sigma / alpha)^(1 / rho); and 'shifted', the times shift t / (1 +
    (shift - 1) t) for uniform t.
    For a chain, these times are rounded to levels, except that 'uniform' takes `steps` evenly
    spaced levels, including both ends. A chain also has the kinds in CHAIN_GRIDS, and counts such
    as 'a,b,c': the numbers of levels in equal sections of the chain, the section next to data
    first.

    Args: rho > 0, the exponent of 'karras'.   shift > 0, the factor of 'shifted'.
    Raises: ValueError for an unknown kind, or no steps. For a chain also for less than 2 steps,
      more steps than levels, or two times at the same level.
    Sources: Karras et al. 2022, eq. 5; Esser et al. 2024, eq. 23 (shifted); for a chain Nichol &
      Dhariwal 2021, section 4; Song et al. 2021, appendix D.3; Lin et al. 2023, table 2; diffusers'
      DPMSolverMultistepScheduler (dpm_leading, dpm_linspace).
    """
    # Raises ValueError if the prediction does not determine x_0 at the last level of a chain.
    first_t = process.first_t(prediction)
    if isinstance(process, DiscreteProcess):
        return check(_make_chain_grid(process, steps, kind, first_t, rho, shift))
    if kind not in GRIDS:
        raise UserError(f"grid {kind!r} is for process ddpm only; choose {', '.join(GRIDS)}.")
    return check(GRIDS[kind].make(process, steps, first_t, rho, shift))


def from_config(config, process: Process, prediction: str, steps: int | None = None) -> np.ndarray:
    """Returns the grid of `config.sample`; `steps` replaces config.steps.   Raises: as `build`."""
    steps = config.steps if steps is None else steps
    return build(process, steps, config.grid, prediction, rho=config.rho, shift=config.shift)


def _make_karras(process, steps, first_t, rho, shift):
    # first_t may be 1, where sigma / alpha is infinite if alpha is 0. So this grid begins at the
    # largest time at which the ratio is finite.
    ends = np.array([process.last_t_of_eps, process.smallest_t])
    high, low = (process.sigma(ends) / process.alpha(ends)) ** (1 / rho)
    return np.append(process.time_of_ratio(np.linspace(high, low, steps) ** rho), 0.0)


def _make_shifted(process, steps, first_t, rho, shift):
    t = np.linspace(1, 0, steps + 1)
    return first_t * shift * t / (1 + (shift - 1) * t)


class GridSpec(NamedTuple):
    """A kind of grid: the function that makes it, and the config keys of this grid alone."""

    make: Callable[..., np.ndarray]  # (process, steps, first_t, rho, shift) -> [steps + 1] f64
    options: tuple[str, ...] = ()  # keys of config.sample that no other grid uses


GRIDS: dict[str, GridSpec] = {
    "uniform": GridSpec(lambda process, steps, first_t, *_: first_t * np.linspace(1, 0, steps + 1)),
    "quadratic": GridSpec(
        lambda process, steps, first_t, *_: first_t * np.linspace(1, 0, steps + 1) ** 2
    ),
    "karras": GridSpec(_make_karras, ("rho",)),
    "shifted": GridSpec(_make_shifted, ("shift",)),
}


def _make_chain_grid(process, steps, kind, first_t, rho, shift):
    """Returns the grid of a chain; all its times are at levels."""
    num_levels = process.num_steps
    if not 2 <= steps <= num_levels:
        raise UserError(
            f"cannot take {steps} sampling steps: the process has {num_levels} levels. Choose 2 to "
            f"{num_levels}."
        )
    if kind == "uniform":
        indices = _make_sections((steps,), num_levels)
    elif kind in CHAIN_GRIDS:
        indices = CHAIN_GRIDS[kind](steps, num_levels)
        # Some of these grids leave out level 1. With too many steps, their indices exceed the last
        # level, or are all the same.
        if indices[-1] >= num_levels or indices[0] == indices[-1]:
            raise UserError(f"grid {kind} leaves out level 1: take fewer than {steps} steps.")
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", kind, re.ASCII):
        indices = _make_sections(tuple(map(int, kind.split(","))), num_levels)
        if len(indices) != steps:
            raise UserError(f"grid={kind} has {len(indices)} steps, not {steps=}.")
    elif kind in GRIDS:
        t = GRIDS[kind].make(process, steps, first_t, rho, shift)
        # Two times may be rounded to the same level. `check` refuses such a grid.
        return process.level(t) / num_levels
    else:
        raise UserError(
            f"unknown grid {kind!r}; choose {', '.join([*GRIDS, *CHAIN_GRIDS])}, or counts such as "
            "100,50,50."
        )
    return np.append(process.time_of_index(indices[::-1]), 0.0)


def _make_sections(counts, num_levels):
    """Returns counts[i] evenly spaced indices, including both ends, of section i of the chain."""
    indices, sections = [], np.array_split(np.arange(num_levels), len(counts))
    for count, section in zip(counts, sections, strict=True):
        size = len(section)
        if not 1 <= count <= size:
            raise UserError(f"cannot retain {count} of the {size} levels of a section: {counts}.")
        stride = (size - 1) / max(count - 1, 1)
        # The published code adds up the strides one by one. A product would round differently.
        indices.append(section[0] + np.rint(np.cumsum([0.0] + [stride] * (count - 1))))
    return np.concatenate(indices)


def _make_ddim(steps, num_levels):
    """Returns the indices 0, n, 2 n, ... for the n that gives this number of steps."""
    strides = {len(range(0, num_levels, stride)): stride for stride in range(num_levels, 0, -1)}
    if steps in strides:
        return np.arange(0, num_levels, strides[steps])
    nearest = sorted(strides, key=lambda count: (abs(count - steps), count))[:2]
    raise UserError(f"no stride retains {steps} of {num_levels} levels; take one of {nearest}.")


def _make_trailing(steps, num_levels):
    """Returns evenly spaced indices down from the last level; the next one would be data."""
    # The rounding error of this stride decides how halves are rounded, as in the published code.
    stride = num_levels - (num_levels - num_levels / steps)
    return np.rint(num_levels - stride * np.arange(steps))[::-1] - 1


# Grids of a chain only. Each function maps (steps, levels) to increasing indices of levels.
CHAIN_GRIDS = {
    "ddim": _make_ddim,
    # Every n-th index from 1 on, where n = levels // steps: the grid of Stable Diffusion.
    "leading": lambda steps, levels: 1 + levels // steps * np.arange(steps),
    "trailing": _make_trailing,
    # These two leave out the lowest level of a grid with one more step. So their last step leads
    # to data from the second lowest level.
    "dpm_leading": lambda steps, levels: 1 + levels // (steps + 1) * np.arange(1, steps + 1),
    "dpm_linspace": lambda steps, levels: np.rint(np.linspace(0, levels - 1, steps + 1))[1:],
}


def from_config_to_level_1(config, process: DiscreteProcess, prediction: str) -> np.ndarray:
    """Returns the grid of `config.sample`, but with level 1 of the chain in place of data.

    Raises: ValueError as `build`, or if the last step begins at level 1.
    Source: the code of Rombach et al. 2022, ddim_alphas_prev; diffusers' set_alpha_to_one=False.
    """
    grid = from_config(config, process, prediction)
    if process.level(grid[-2]) <= 1:
        raise UserError(
            "the last step of this grid begins at level 1, where sampler ddim_level1 ends. Choose "
            "grid leading, or sampler ddim."
        )
    return np.append(grid[:-1], process.time_of_index(0))


def take_last(grid: np.ndarray, strength: float) -> np.ndarray:
    """Returns the grid of the last steps: the share `strength` of all steps, but at least one.

    Raises: ValueError unless 0 < strength <= 1.
    Source: Meng et al. 2022, "SDEdit", whose t_0 is the first time of the result.
    """
    if not 0 < strength <= 1:
        raise UserError(
            f"{strength=} must be in (0, 1]. With 1, almost nothing of the image stays."
        )
    steps = len(grid) - 1
    return grid[steps - max(round(strength * steps), 1) :]


def check(grid: np.ndarray) -> np.ndarray:
    """Returns the grid; raises ValueError unless its times decrease to 0."""
    if len(grid) < 2 or grid[-1] != 0:
        raise UserError(f"a grid must have a step or more and end at data, t = 0, not {grid[-2:]}.")
    if (not_decreasing := np.flatnonzero(np.diff(grid) >= 0)).size:
        i = int(not_decreasing[0])
        raise UserError(
            f"the grid does not decrease: t = {grid[i]:.6g} is followed by {grid[i + 1]:.6g} at "
            f"step {i + 1} of {len(grid) - 1}. Take fewer steps, or another grid."
        )
    return grid
