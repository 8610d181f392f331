"""Time grids of samplers: [steps + 1] f64 arrays that decrease from noise to 0, which is data."""

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

    For every process `kind` may be 'uniform', uniform in t; 'quadratic', the squares of uniform
    times; 'karras', uniform in (sigma / alpha)^(1 / rho); or 'shifted', which maps uniform times by
    t -> shift t / (1 + (shift - 1) t).
    A chain rounds these times to its levels. Its 'uniform' takes `steps` of its levels, evenly
    spaced, both ends included. A chain also has the kinds in CHAIN_GRIDS, and counts such as
    'a,b,c': the number of levels in each of equal parts of the chain, the part next to data first.

    Args: rho > 0, the exponent of 'karras'.   shift > 0, the factor of 'shifted'.
    Raises: ValueError for an unknown kind, or no steps. For a chain also for less than 2 steps,
      more steps than levels, or two times at the same level.
    Source: karras: Karras et al. 2022, eq. 5; shifted: Esser et al. 2024, eq. 23; kinds of a chain:
      Nichol & Dhariwal 2021, section 4; Song et al. 2021, appendix D.3; Lin et al. 2023, table 2;
      dpm_leading, dpm_linspace: diffusers' DPMSolverMultistepScheduler.
    """
    # Raises if the prediction does not determine x_0 at the last level of a chain.
    first_t = process.first_t(prediction)
    if isinstance(process, DiscreteProcess):
        return check(_make_chain_grid(process, steps, kind, first_t, rho, shift))
    if kind not in GRIDS:
        raise UserError(f"grid {kind!r} is for process ddpm only; choose {', '.join(GRIDS)}.")
    return check(GRIDS[kind].make(process, steps, first_t, rho, shift))


def from_config(config, process: Process, prediction: str, steps: int | None = None) -> np.ndarray:
    """Returns the grid of `config.sample`, or with another number of steps; raises as `build`."""
    steps = config.steps if steps is None else steps
    return build(process, steps, config.grid, prediction, rho=config.rho, shift=config.shift)


def _karras(process, steps, first_t, rho, shift):
    # first_t may be 1, where sigma / alpha is infinite if alpha ends at 0. So this grid begins at
    # the last time at which the ratio is finite.
    ends = np.array([process.last_t_of_eps, process.smallest_t])
    high, low = (process.sigma(ends) / process.alpha(ends)) ** (1 / rho)
    return np.append(process.time_of_ratio(np.linspace(high, low, steps) ** rho), 0.0)


def _shifted(process, steps, first_t, rho, shift):
    u = np.linspace(1, 0, steps + 1)
    return first_t * shift * u / (1 + (shift - 1) * u)


class GridSpec(NamedTuple):
    """A kind of grid: how to make it, and the config keys that it alone uses."""

    make: Callable[..., np.ndarray]  # (process, steps, first_t, rho, shift) -> [steps + 1] f64
    options: tuple[str, ...] = ()  # keys of config.sample that no other grid uses


GRIDS: dict[str, GridSpec] = {
    "uniform": GridSpec(lambda _, steps, first_t, *__: first_t * np.linspace(1, 0, steps + 1)),
    "quadratic": GridSpec(
        lambda _, steps, first_t, *__: first_t * np.linspace(1, 0, steps + 1) ** 2
    ),
    "karras": GridSpec(_karras, ("rho",)),
    "shifted": GridSpec(_shifted, ("shift",)),
}


def _make_chain_grid(process, steps, kind, first_t, rho, shift):
    """Returns the grid of a chain, on its levels."""
    num_steps = process.num_steps
    if not 2 <= steps <= num_steps:
        raise UserError(
            f"cannot take {steps} sampling steps: the process has {num_steps}, so choose 2 to "
            f"{num_steps}."
        )
    if kind == "uniform":
        index = _sections((steps,), num_steps)
    elif kind in CHAIN_GRIDS:
        index = CHAIN_GRIDS[kind](steps, num_steps)
        # Some of these grids leave out level 1. With too many steps they run past the end of the
        # chain, or take the same level in every step.
        if index[-1] >= num_steps or index[0] == index[-1]:
            raise UserError(f"grid {kind} leaves out level 1: take fewer than {steps} steps.")
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", kind, re.ASCII):
        index = _sections(tuple(map(int, kind.split(","))), num_steps)
        if len(index) != steps:
            raise UserError(f"grid={kind} has {len(index)} steps, not {steps=}.")
    elif kind in GRIDS:
        t = GRIDS[kind].make(process, steps, first_t, rho, shift)
        # Two times may be rounded to the same level, which `check` refuses.
        return process.level(t) / num_steps
    else:
        raise UserError(
            f"unknown grid {kind!r}; choose {', '.join([*GRIDS, *CHAIN_GRIDS])}, or counts such as "
            "100,50,50."
        )
    return np.append(process.time_of_index(index[::-1]), 0.0)


def _sections(counts, num_steps):
    """Returns counts[i] evenly spaced indices of equal part i of the chain, with both ends."""
    sizes = [num_steps // len(counts) + (i < num_steps % len(counts)) for i in range(len(counts))]
    index, start = [], 0
    for count, size in zip(counts, sizes, strict=True):
        if not 1 <= count <= size:
            raise UserError(f"cannot retain {count} of the {size} levels of a section: {counts}.")
        stride = (size - 1) / max(count - 1, 1)
        # The published code adds up the strides one by one. A product would round differently.
        index.append(start + np.rint(np.cumsum([0.0] + [stride] * (count - 1))))
        start += size
    return np.concatenate(index)


def _strided(steps, num_steps):
    """Returns the indices 0, n, 2 n, ... for the n that gives this number of steps."""
    strides = {len(range(0, num_steps, stride)): stride for stride in range(num_steps, 0, -1)}
    if steps in strides:
        return np.arange(0, num_steps, strides[steps])
    near = sorted(strides, key=lambda count: (abs(count - steps), count))[:2]
    raise UserError(f"no stride retains {steps} of {num_steps} levels; {near} can be had.")


def _trailing(steps, num_steps):
    """Returns indices evenly spaced from the last level down; one more would be data, level 0."""
    # The rounding of this stride decides which way halves are rounded, as in the published code.
    stride = num_steps - (num_steps - num_steps / steps)
    return np.rint(num_steps - stride * np.arange(steps))[::-1] - 1


# Grids of a chain only. Each maps (steps, levels) to increasing indices of levels.
CHAIN_GRIDS = {
    # Every n-th index, beginning with 0.
    "ddim": _strided,
    # Every n-th index, beginning with 1, n = levels // steps: the grid of Stable Diffusion.
    "leading": lambda steps, levels: 1 + levels // steps * np.arange(steps),
    "trailing": _trailing,
    # These two are grids of one more step, without their lowest level. The last step goes to data
    # from the level above it.
    "dpm_leading": lambda steps, levels: 1 + levels // (steps + 1) * np.arange(1, steps + 1),
    "dpm_linspace": lambda steps, levels: np.rint(np.linspace(0, levels - 1, steps + 1))[1:],
}


def from_config_to_level_1(config, process: DiscreteProcess, prediction: str) -> np.ndarray:
    """Returns the grid of `config.sample`, but ending at level 1 of the chain, a little noisy.

    Raises: ValueError as `build`, or if the last step begins at this level.
    Source: the code of Rombach et al. 2022, ddim_alphas_prev; diffusers' set_alpha_to_one=False.
    """
    grid = from_config(config, process, prediction)
    if process.level(grid[-2]) <= 1:
        raise UserError(
            "the last step of this grid begins at level 1, where sampler ddim_level1 ends: choose "
            "grid leading, or sampler ddim."
        )
    return np.append(grid[:-1], process.time_of_index(0))


def take_last(grid: np.ndarray, strength: float) -> np.ndarray:
    """Returns the last steps of a grid, the share `strength` of all steps, and at least one.

    Raises: ValueError unless 0 < strength <= 1.
    Source: Meng et al. 2022, "SDEdit", whose t_0 is the first of these times.
    """
    if not 0 < strength <= 1:
        raise UserError(f"{strength=} must lie in (0, 1]; 1 keeps next to nothing of the image.")
    steps = len(grid) - 1
    return grid[steps - max(round(strength * steps), 1) :]


def check(grid: np.ndarray) -> np.ndarray:
    """Returns the grid; raises ValueError unless its times decrease to 0."""
    if len(grid) < 2 or grid[-1] != 0:
        raise UserError(f"a grid ends on data, t = 0, after at least one step, not {grid[-2:]}.")
    if (wrong := np.flatnonzero(np.diff(grid) >= 0)).size:
        i = int(wrong[0])
        raise UserError(
            f"the grid does not decrease: t = {grid[i]:.6g} is followed by {grid[i + 1]:.6g} at "
            f"step {i + 1} of {len(grid) - 1}. Take fewer steps, or another grid."
        )
    return grid
