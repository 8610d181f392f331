"""Time grids of samplers, [steps + 1] f64, decreasing from noise to 0, which is data."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dit_jax.diffusion.processes import DiscreteProcess, Process
from dit_jax.errors import UserError


def build(
    process: Process, steps: int, kind: str = "uniform", prediction: str = "eps", *, rho=7, shift=3
) -> np.ndarray:
    """[steps + 1] f64 times of a sampler of networks with this prediction.

    Args:
      kind: 'uniform' in t; 'quadratic', squares of these; 'karras', uniform in
        (sigma / alpha)^(1 / rho); 'shifted', t -> shift t / (1 + (shift - 1) t). Rounded to the
        levels of a chain, of which 'uniform' retains so many evenly, both ends included; of a
        chain also those in OF_CHAIN; or numbers with commas, 'a,b,c', so many indices of each of
        its parts, the part next to data first.
    Raises: ValueError for an unknown kind, rho or shift out of range, less than 1 step, for a chain
      less than 2 or more than its levels, or times that fall on one level.
    Source: karras: Karras et al. 2022, eq. 5; shifted: Esser et al. 2024, eq. 23; of a chain:
      Nichol & Dhariwal 2021, section 4; Song et al. 2021, appendix D.3; Lin et al. 2023, table 2;
      dpm_leading, dpm_linspace: diffusers' DPMSolverMultistepScheduler.
    """
    if not (0 < rho < np.inf and 0 < shift < np.inf):
        raise UserError(f"{rho=} and {shift=} of a grid must be positive, and finite.")
    if isinstance(process, DiscreteProcess):
        return check(_of_chain(process, steps, kind, prediction, rho, shift))
    if steps < 1:
        raise UserError(f"cannot take {steps} sampling steps; choose at least 1.")
    if kind not in GRIDS:
        raise UserError(f"grid {kind!r} is none of this process; choose {', '.join(GRIDS)}.")
    return check(GRIDS[kind].make(process, steps, process.first_t(prediction), rho, shift))


def from_config(config, process: Process, prediction: str, steps: int | None = None) -> np.ndarray:
    """Returns the grid of `config.sample`, of its steps or of others; else as `build`."""
    options = dict(rho=config.rho, shift=config.shift)
    return build(process, steps or config.steps, config.grid, prediction, **options)


def _karras(process, steps, first_t, rho, shift):
    ends = np.array([process.last_t_of_eps, process.smallest_t])
    high, low = (process.sigma(ends) / process.alpha(ends)) ** (1 / rho)
    return np.append(process.time_of_ratio(np.linspace(high, low, steps) ** rho), 0.0)


def _shifted(process, steps, first_t, rho, shift):
    u = np.linspace(1, 0, steps + 1)
    return first_t * shift * u / (1 + (shift - 1) * u)


class Row(NamedTuple):
    """What is known of a grid."""

    make: Callable[..., np.ndarray]  # (process, steps, first_t, rho, shift) -> [steps + 1] f64
    options: tuple[str, ...] = ()  # keys of config.sample that no other grid heeds


GRIDS: dict[str, Row] = {
    "uniform": Row(lambda _, steps, first_t, *__: first_t * np.linspace(1, 0, steps + 1)),
    "quadratic": Row(lambda _, steps, first_t, *__: first_t * np.linspace(1, 0, steps + 1) ** 2),
    "karras": Row(_karras, ("rho",)),
    "shifted": Row(_shifted, ("shift",)),
}


def _of_chain(process, steps, kind, prediction, rho, shift):
    num_steps = process.num_steps
    if not 2 <= steps <= num_steps:
        raise UserError(
            f"cannot take {steps} sampling steps: the process has {num_steps}, so choose 2 to "
            f"{num_steps}."
        )
    process.first_t(prediction)  # refuses what says nothing at the last level
    if kind == "uniform":
        index = _sections((steps,), num_steps)
    elif kind in OF_CHAIN:
        index = OF_CHAIN[kind](steps, num_steps)
        if index[-1] >= num_steps or index[0] == index[-1]:
            raise UserError(f"grid {kind} leaves out level 1: take fewer than {steps} steps.")
    elif re.fullmatch(r"\d+(,\d+)*", kind, re.ASCII):
        index = _sections(tuple(map(int, kind.split(","))), num_steps)
        if len(index) != steps:
            raise UserError(f"grid={kind} has {len(index)} steps, not {steps=}.")
    elif kind in GRIDS:
        t = GRIDS[kind].make(process, steps, process.first_t(prediction), rho, shift)
        return process.level(t) / num_steps
    else:
        raise UserError(
            f"unknown grid {kind!r}; choose {', '.join([*GRIDS, *OF_CHAIN])}, or counts such as "
            "100,50,50."
        )
    return np.append(process.time_of_index(index[::-1]), 0.0)


def _sections(counts, num_steps):
    """Indices: counts[i] of the i-th of equal parts of the chain, evenly, both ends included."""
    sizes = [num_steps // len(counts) + (i < num_steps % len(counts)) for i in range(len(counts))]
    index, start = [], 0
    for count, size in zip(counts, sizes, strict=True):
        if not 1 <= count <= size:
            raise UserError(f"cannot retain {count} of the {size} levels of a section: {counts}.")
        stride = (size - 1) / max(count - 1, 1)
        # Added up one by one as published, which rounds otherwise than their product.
        index.append(start + np.rint(np.cumsum([0.0] + [stride] * (count - 1))))
        start += size
    return np.concatenate(index)


def _strided(steps, num_steps):
    """Indices 0, n, 2 n, ... for the n that makes them so many."""
    for stride in range(1, num_steps + 1):
        if len(index := np.arange(0, num_steps, stride)) == steps:
            return index
    counts = sorted({len(range(0, num_steps, stride)) for stride in range(1, num_steps + 1)})
    near = sorted(counts, key=lambda count: abs(count - steps))[:2]
    raise UserError(f"no stride retains {steps} of {num_steps} levels; {near} can be had.")


def _trailing(steps, num_steps):
    """Evenly from the last level down, without the first, as if data were level 0."""
    stride = num_steps - (num_steps - num_steps / steps)  # its rounding decides halves as published
    return np.rint(num_steps - stride * np.arange(steps))[::-1] - 1


# Indices of the levels, increasing, of so many steps of a chain of so many.
OF_CHAIN = {
    # Every n-th from 0 on.
    "ddim": _strided,
    # Every n-th from 1 on, n being the whole part of levels / steps, as Stable Diffusion samples.
    "leading": lambda steps, levels: 1 + levels // steps * np.arange(steps),
    "trailing": _trailing,
    # Of one step more, but its lowest level, from which the last of these steps goes to data.
    "dpm_leading": lambda steps, levels: 1 + levels // (steps + 1) * np.arange(1, steps + 1),
    "dpm_linspace": lambda steps, levels: np.rint(np.linspace(0, levels - 1, steps + 1))[1:],
}


def to_level_1(process: DiscreteProcess, grid: np.ndarray) -> np.ndarray:
    """The grid with its last step to the first level of a chain, a little noisy, not to data.

    Raises: ValueError for one that has this level already.
    Source: the code of Rombach et al. 2022, ddim_alphas_prev; diffusers' set_alpha_to_one=False.
    """
    if process.level(grid[-2]) <= 1:
        raise UserError(
            "the last step of this grid begins at level 1, where sampler ddim_level1 ends: choose "
            "grid leading, or sampler ddim."
        )
    return np.append(grid[:-1], process.time_of_index(0))


def last(grid: np.ndarray, strength: float) -> np.ndarray:
    """The last share `strength` of the steps of a grid, at least one: where an edit begins.

    Raises: ValueError unless 0 < strength <= 1.
    Source: Meng et al. 2022, "SDEdit", whose t_0 is the first time that is left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"{strength=} must lie in (0, 1]; 1 keeps next to nothing of the image.")
    steps = len(grid) - 1
    return grid[steps - max(round(strength * steps), 1) :]


def check(grid: np.ndarray) -> np.ndarray:
    """The grid, if its times decrease to 0.

    Raises: ValueError with the first that does not.
    """
    if len(grid) < 2 or grid[-1] != 0:
        raise UserError(f"a grid ends on data, t = 0, after at least one step, not {grid[-2:]}.")
    if (wrong := np.flatnonzero(np.diff(grid) >= 0)).size:
        i = int(wrong[0])
        raise UserError(
            f"the grid does not decrease: t = {grid[i]:.6g} is followed by {grid[i + 1]:.6g} at "
            f"step {i + 1} of {len(grid) - 1}. Take fewer steps, or another grid."
        )
    return grid
