"""Samplers by name, and the keys of `config.sample` that choose one and set it.

A new sampler needs a function in `solvers` and a row of SAMPLERS here. The commands' flags, their
help and their checks follow from that row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.diffusion import grids, processes, solvers
from dit_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler of `config.sample` for one process.

    `solve(problem, x_T)` returns x_0 like x_T, and [n] bool: whether x was finite after each step.
    """

    grid: np.ndarray  # [n + 1] f64
    times: np.ndarray  # all times at which it may call the network, the grid's first
    evaluations: np.ndarray  # [n] network evaluations in each step
    solve: Callable[[solvers.Problem, jax.Array], tuple[jax.Array, jax.Array]]


def build(config, process: processes.Process, prediction: str, strength: float = 1.0) -> Sampler:
    """Returns the sampler of `config.sample`, for networks with this prediction.

    Args: strength, the share of the steps that it takes; these are the last ones.
    Raises: ValueError as `check`, or for settings that the sampler, the process or the prediction
      does not allow.
    """
    check(config)
    spec = SAMPLERS[config.sampler]
    _check_process(config.sampler, process)
    for key, setting in SETTINGS.items():
        if setting.zero_if_unused and config[key]:
            _check_users(config, key)
    grid = grids.take_last(spec.make_grid(config, process, prediction), strength)
    return spec.make(spec, config, process, prediction, grid)


def _make_plain(spec, config, process, prediction, grid):
    """Returns a sampler that calls the network once a step, at the grid's times."""
    solve = partial(spec.solver, **{key: config[key] for key in spec.options})
    return Sampler(grid, grid, np.ones(len(grid) - 1, int), solve)


def _make_heun(spec, config, process, prediction, grid):
    # Churn calls the network at noisier times too, so their coefficients must be computed.
    noisier, times = None, grid
    if config.churn:
        if isinstance(process, processes.DiscreteProcess) or process.ends_without_signal:
            raise UserError(
                f"churn={config.churn} needs diffusion.process=edm or vp, where x_t tells x_0 at "
                "every level, continuous in t."
            )
        noisier = solvers.churn_levels(process, grid, config.churn, config.churn_range)
        times = np.append(grid, noisier)
    solve = partial(spec.solver, noisier=noisier, noise_scale=config.churn_noise)
    # Only the step to t = 0 has one evaluation: it is Euler's.
    return Sampler(grid, times, 2 - (grid[1:] == 0), solve)


def _get_last_step_t(config, process, prediction):
    """Returns the time at which euler_maruyama's last step begins; if it takes none, its end."""
    if config.last_step_t is not None:
        return config.last_step_t
    return process.end_t(prediction) if config.last_step == "none" else process.last_step_t


def _make_sde_grid(config, process, prediction):
    if config.steps < 2:
        raise UserError(f"euler_maruyama needs at least 2 steps, not {config.steps}.")
    last_t = _get_last_step_t(config, process, prediction)
    # With sbdm, w is infinite where alpha is 0. The grid of a predicted eps begins below that time.
    grid_prediction = "eps" if config.sde_diffusion == "sbdm" else prediction
    grid = grids.from_config(config, process, grid_prediction, steps=config.steps - 1)
    if last_t >= grid[0]:
        raise UserError(f"last_step_t={last_t} must be less than {grid[0]}, the first time.")
    # These steps end at last_t; the last step to data, if there is one, is appended.
    grid = last_t + (1 - last_t / grid[0]) * grid
    return np.append(grid, 0.0) if last_t and config.last_step != "none" else grid


def _make_euler_maruyama(spec, config, process, prediction, grid):
    # A last step that begins at time 0 is left out.
    last_step = config.last_step if _get_last_step_t(config, process, prediction) else "none"
    solve = partial(spec.solver, sde_diffusion=config.sde_diffusion, last_step=last_step)
    return Sampler(grid, grid, np.ones(len(grid) - 1, int), solve)


class SamplerSpec(NamedTuple):
    """What there is to know of a sampler: its solver, how it is made, and what it works with."""

    solver: Callable  # of (problem, x_T); `make` binds its other arguments
    help: str
    options: tuple[str, ...] = ()  # keys of config.sample that it uses, but not every sampler
    chain: bool = True  # whether it works with process ddpm, a chain
    continuous: bool = True  # whether it works in continuous time
    make_grid: Callable[..., np.ndarray] = grids.from_config  # of (config, process, prediction)
    # (spec, config, process, prediction, grid) -> Sampler. `_make_plain` hands the options to the
    # solver, as arguments of the same names.
    make: Callable[..., Sampler] = _make_plain


SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(solvers.ddpm, "ancestral sampling", ("variance",)),
    "ddim": SamplerSpec(solvers.ddim, "to data", ("eta",)),
    "ddim_level1": SamplerSpec(
        solvers.ddim,
        "to the chain's first level, as Stable Diffusion's files",
        ("eta",),
        continuous=False,
        make_grid=grids.from_config_to_level_1,
    ),
    "dpmpp1": SamplerSpec(partial(solvers.dpmpp, order=1), "DPM-Solver++ of order 1"),
    "dpmpp2m": SamplerSpec(partial(solvers.dpmpp, order=2), "DPM-Solver++ 2M"),
    "dpmpp2m_sde": SamplerSpec(partial(solvers.dpmpp, order=2, sde=True), "2M with noise"),
    "euler": SamplerSpec(partial(solvers.adams_bashforth, order=1), "probability flow, order 1"),
    "heun": SamplerSpec(
        solvers.heun,
        "order 2, two evaluations a step; with churn EDM's",
        ("churn", "churn_range", "churn_noise"),
        make=_make_heun,
    ),
    "ab2": SamplerSpec(partial(solvers.adams_bashforth, order=2), "Adams-Bashforth, order 2"),
    "ab4": SamplerSpec(partial(solvers.adams_bashforth, order=4), "order 3 or more"),
    "euler_maruyama": SamplerSpec(
        solvers.euler_maruyama,
        "the SDE, as SiT",
        ("sde_diffusion", "last_step", "last_step_t"),
        chain=False,
        make_grid=_make_sde_grid,
        make=_make_euler_maruyama,
    ),
}


class Setting(NamedTuple):
    """A key of `config.sample`: its type and help, and when it has no effect."""

    type: type  # tuple stands for two floats, low and high
    help: str  # a flag's help adds the samplers or grids that alone use the key
    choices: tuple[str, ...] = ()
    needs: tuple[str, float] | None = None  # (other key, its value with which this key is unused)
    zero_if_unused: bool = False  # whether it must be 0 with samplers that do not use it


SETTINGS: dict[str, Setting] = {
    "sampler": Setting(
        str,
        f"{', '.join(f'{name} ({spec.help})' for name, spec in SAMPLERS.items())}.",
        tuple(SAMPLERS),
    ),
    "steps": Setting(int, "Sampling steps."),
    "grid": Setting(
        str,
        f"Times of the steps: {', '.join(grids.GRIDS)}; of process ddpm also "
        f"{', '.join(grids.CHAIN_GRIDS)}, or counts.",
    ),
    "rho": Setting(float, "Exponent of a grid that is uniform in (sigma / alpha)^(1 / rho)."),
    "shift": Setting(float, "Factor by which the grid is shifted towards noise."),
    "variance": Setting(
        str, "Variance, unless learned: large (beta) or small (posterior).", ("large", "small")
    ),
    "eta": Setting(float, "Noise: 0 is deterministic, 1 is DDPM's variance.", zero_if_unused=True),
    "churn": Setting(float, "EDM's S_churn: noise added before steps.", zero_if_unused=True),
    "churn_range": Setting(tuple, "LOW,HIGH of sigma / alpha that churn.", needs=("churn", 0)),
    "churn_noise": Setting(float, "Standard deviation of churn's noise.", needs=("churn", 0)),
    "sde_diffusion": Setting(
        str, "Noise of the SDE: sigma (SiT's) or sbdm (the process's).", ("sigma", "sbdm")
    ),
    "last_step": Setting(
        str,
        "The step to data, without noise: mean, euler, tweedie or none.",
        ("mean", "euler", "tweedie", "none"),
    ),
    "last_step_t": Setting(
        float,
        "Time at which the step to data begins; with --last_step none, at which sampling ends; 0 "
        "leaves this step out.",
    ),
    "clip_x_0": Setting(bool, "Keep x_0 of pixels in [-1, 1] in every step."),
    "cfg_scale": Setting(float, "Scale of guidance; 1 is none."),
    "cfg_channels": Setting(
        int, "Guided channels; 0 is all, the paper's samples use 3.", needs=("cfg_scale", 1)
    ),
    "cfg_interval": Setting(
        tuple,
        "LOW,HIGH of the times t that are guided; of process edm t = sigma / sigma_max.",
        needs=("cfg_scale", 1),
    ),
    "cfg_rescale": Setting(
        float,
        "0..1: how far guided outputs keep the deviation of unguided ones.",
        needs=("cfg_scale", 1),
    ),
}


def find_users(key: str) -> dict[str, list[str]]:
    """Finds the samplers or grids that alone use a key of `config.sample`.

    Returns: {'sampler': names} or {'grid': names}; {} for a key that all use.
    """
    users = {}
    for chooser, specs in (("sampler", SAMPLERS), ("grid", grids.GRIDS)):
        if names := [name for name, spec in specs.items() if key in spec.options]:
            users[chooser] = names
    return users


def check(config) -> None:
    """Raises ValueError for an unknown choice, or for two numbers that are no range.

    All numbers by themselves are checked by `config.keys`.
    """
    for key, setting in SETTINGS.items():
        value = config[key]
        if setting.choices:
            check_choice(key, value, setting.choices)
        if setting.type is tuple and not (len(value) == 2 and value[0] < value[1]):
            shown = ",".join(map(str, value))
            raise UserError(f"{key}={shown} must be two numbers, low < high.")


def check_used(config, keys, learn_sigma: bool) -> None:
    """Raises ValueError for the first of these keys of `config.sample` that has no effect.

    Args: learn_sigma, whether the model predicts the variance.
    """
    for key in keys:
        _check_users(config, key)
        other, unused_at = SETTINGS[key].needs or (None, None)
        if other and config[other] == unused_at:
            raise UserError(
                f"{key}={config[key]} does nothing with {other}={unused_at}: give a larger {other}."
            )
        if key == "variance" and learn_sigma:
            raise UserError(
                f"variance={config.variance} does nothing: the model predicts the variance itself."
            )


def _check_users(config, key):
    """Raises ValueError if only other samplers or grids than the config's use a key."""
    for chooser, users in find_users(key).items():
        if config[chooser] not in users:
            raise UserError(
                f"{key}={config[key]} is of {chooser} {', '.join(users)}; {config[chooser]!r} "
                "takes none."
            )


def _check_process(name, process):
    """Raises ValueError unless the sampler works with the process."""
    kind = "chain" if isinstance(process, processes.DiscreteProcess) else "continuous"
    others = [other for other, spec in SAMPLERS.items() if getattr(spec, kind)]
    if name not in others:
        where = {"chain": "diffusion.process=ddpm", "continuous": "a process in continuous time"}
        raise UserError(
            f"sampler {name!r} does not work with {where[kind]}; choose {', '.join(others)}."
        )
