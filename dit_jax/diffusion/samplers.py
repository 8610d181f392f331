"""Samplers by name: the solver, its grid, and the keys of `config.sample` that it alone uses.

A new sampler needs a function in `solvers` and a row of SAMPLERS here. The commands' flags, their
help and their checks follow from that row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.diffusion import grids, processes, sampler_settings, solvers
from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler of `config.sample` for one process.

    `solve(problem, x_T)` returns x_0 like x_T, and [n] bool: whether x was finite after each step.
    """

    grid: np.ndarray  # [n + 1] f64
    times: np.ndarray  # all times at which it may call the network, the grid's first
    evaluations: np.ndarray  # [n] network evaluations in each step
    solve: Callable[[solvers.Problem, jax.Array], tuple[jax.Array, jax.Array]]


class Row(NamedTuple):
    """A row of SAMPLERS."""

    make: Callable[..., Sampler]  # (config, process, prediction, grid) -> Sampler
    help: str
    options: tuple[str, ...] = ()  # keys of config.sample that it uses, but not every sampler
    chain: bool = True  # whether it works with process ddpm, a chain
    continuous: bool = True  # whether it works in continuous time
    make_grid: Callable[..., np.ndarray] = grids.from_config  # of (config, process, prediction)


def build(config, process: processes.Process, prediction: str, strength: float = 1.0) -> Sampler:
    """Returns the sampler of `config.sample`, for networks with this prediction.

    Args: strength, the share of the steps that it takes; these are the last ones.
    Raises: ValueError for an unknown sampler, for settings out of range, or for settings that the
      process or the prediction does not allow.
    """
    row = _check(config, process)
    grid = grids.last(row.make_grid(config, process, prediction), strength)
    return row.make(config, process, prediction, grid)


def _plain(solver: Callable, **options: str) -> Callable[..., Sampler]:
    """Returns the maker of a sampler that calls the network once a step, at the grid's times.

    Args: options, the solver's arguments, each with the key of config.sample that sets it.
    """

    def make(config, process, prediction, grid):
        solve = functools.partial(solver, **{name: config[key] for name, key in options.items()})
        return Sampler(grid, grid, np.ones(len(grid) - 1, int), solve)

    return make


def _make_heun(config, process, prediction, grid):
    # Churn calls the network at noisier times too, so their coefficients must be computed.
    noisier, times = None, grid
    if config.churn:
        if isinstance(process, processes.DiscreteProcess) or process.alpha(np.ones(1)) == 0:
            raise UserError(
                f"churn={config.churn} needs diffusion.process=edm or vp, where x_t tells x_0 at "
                "every level, continuous in t."
            )
        noisier = solvers.churn_levels(process, grid, config.churn, config.churn_range)
        times = np.append(grid, noisier)
    solve = functools.partial(solvers.heun, noisier=noisier, noise_scale=config.churn_noise)
    # Only the step to t = 0 has one evaluation: it is Euler's.
    return Sampler(grid, times, 2 - (grid[1:] == 0), solve)


def _make_level_1_grid(config, process, prediction):
    return grids.to_level_1(process, grids.from_config(config, process, prediction))


def _get_last_step_t(config, process, prediction):
    """Returns the time at which euler_maruyama's last step begins; if it takes none, its end."""
    if config.last_step_t is not None:
        return config.last_step_t
    return process.end_t(prediction) if config.last_step == "none" else process.last_step_t


def _make_sde_grid(config, process, prediction):
    last_t = _get_last_step_t(config, process, prediction)
    if not (config.steps > 1 and 0 <= last_t < 1):
        raise UserError(
            f"euler_maruyama needs at least 2 steps, not {config.steps}, and last_step_t="
            f"{config.last_step_t} in [0, 1)."
        )
    # With sbdm, w is infinite where alpha is 0. The grid of a predicted eps begins below that time.
    grid_prediction = "eps" if config.sde_diffusion == "sbdm" else prediction
    grid = grids.from_config(config, process, grid_prediction, steps=config.steps - 1)
    if not last_t < grid[0]:
        raise UserError(f"last_step_t={last_t} must be less than {grid[0]}, the first time.")
    # These steps end at last_t; the last step to data, if there is one, is appended.
    grid = last_t + (1 - last_t / grid[0]) * grid
    return np.append(grid, 0.0) if last_t and config.last_step != "none" else grid


def _make_euler_maruyama(config, process, prediction, grid):
    # A last step that begins at time 0 is left out.
    last_step = config.last_step if _get_last_step_t(config, process, prediction) else "none"
    make = _plain(
        functools.partial(solvers.euler_maruyama, last_step=last_step), form="sde_diffusion"
    )
    return make(config, process, prediction, grid)


def _dpmpp(order: int, sde: bool = False) -> Callable[..., Sampler]:
    return _plain(functools.partial(solvers.dpmpp, order=order, sde=sde))


def _adams_bashforth(order: int) -> Callable[..., Sampler]:
    return _plain(functools.partial(solvers.adams_bashforth, order=order))


SAMPLERS: dict[str, Row] = {
    "ddpm": Row(_plain(solvers.ddpm, variance="variance"), "ancestral sampling", ("variance",)),
    "ddim": Row(_plain(solvers.ddim, eta="eta"), "to data", ("eta",)),
    "ddim_level1": Row(
        _plain(solvers.ddim, eta="eta"),
        "to the chain's first level, as Stable Diffusion's files",
        ("eta",),
        continuous=False,
        make_grid=_make_level_1_grid,
    ),
    "dpmpp1": Row(_dpmpp(1), "DPM-Solver++ of order 1"),
    "dpmpp2m": Row(_dpmpp(2), "DPM-Solver++ 2M"),
    "dpmpp2m_sde": Row(_dpmpp(2, sde=True), "the same with noise"),
    "euler": Row(_adams_bashforth(1), "the probability flow, order 1"),
    "heun": Row(
        _make_heun,
        "order 2, two evaluations a step; with churn EDM's",
        ("churn", "churn_range", "churn_noise"),
    ),
    "ab2": Row(_adams_bashforth(2), "Adams-Bashforth, order 2"),
    "ab4": Row(_adams_bashforth(4), "order 3 or more"),
    "euler_maruyama": Row(
        _make_euler_maruyama,
        "the SDE, as SiT",
        ("sde_diffusion", "last_step", "last_step_t"),
        chain=False,
        make_grid=_make_sde_grid,
    ),
}


def get_owners(key: str) -> dict[str, list[str]]:
    """Returns the samplers or grids that alone use a key of `config.sample`.

    Returns: {'sampler': names} or {'grid': names}; {} for a key that all use.
    """
    owners = {}
    for chosen, table in (("sampler", SAMPLERS), ("grid", grids.GRIDS)):
        if names := [name for name, row in table.items() if key in row.options]:
            owners[chosen] = names
    return owners


def check_used(config, keys, learn_sigma: bool) -> None:
    """Raises if one of these keys of `config.sample` has no effect.

    Args: learn_sigma, whether the model predicts the variance.
    Raises: ValueError with the first key that has no effect.
    """
    for key in keys:
        value = f"{key}={config[key]}"
        for chosen, owners in get_owners(key).items():
            if config[chosen] not in owners:
                raise UserError(
                    f"{value} is of {chosen} {', '.join(owners)}; {config[chosen]!r} takes none."
                )
        if off := sampler_settings.SETTINGS[key].off:
            other, off_value = off
            if config[other] == off_value:
                raise UserError(
                    f"{value} does nothing with {other}={off_value}: give a larger {other}."
                )
        if key == "variance" and learn_sigma:
            raise UserError(f"{value} does nothing: the model predicts the variance itself.")


def _check(config, process):
    """Returns the row of the config's sampler.

    Raises: ValueError unless the process allows the sampler, and the sampler allows the settings.
    """
    name, discrete = config.sampler, isinstance(process, processes.DiscreteProcess)
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}.")
    row = SAMPLERS[name]
    if not discrete and not row.continuous:
        raise UserError(f"sampler {name!r} is of diffusion.process=ddpm; choose ddim or another.")
    if discrete and not row.chain:
        others = ", ".join(other for other, row in SAMPLERS.items() if row.chain)
        raise UserError(
            f"sampler {name!r} needs a process in continuous time, vp, flow, gvp or edm; for "
            f"diffusion.process=ddpm choose {others}."
        )
    sampler_settings.check(config)
    for key, setting in sampler_settings.SETTINGS.items():
        if setting.refused and config[key] and key not in row.options:
            owners = ", ".join(get_owners(key)["sampler"])
            raise UserError(f"{key}={config[key]} is of sampler {owners}; {name!r} takes none.")
    return row
