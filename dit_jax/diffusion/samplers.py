"""Samplers by name, and the settings in `config.sample`.

A new sampler needs a function in `solvers`, a row of SAMPLERS here, and its name in
docs/sampling.md. The commands' flags, help and checks follow from the row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.diffusion import grids, processes, solvers
from dit_jax.errors import UserError, check_choice

CHAIN, CONTINUOUS = "diffusion.process=ddpm", "a process in continuous time"  # kinds of processes
NO_CHURN, NO_GUIDANCE = ("churn", 0), ("cfg_scale", 1)  # keys of config.sample, and values


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler with its time grid, for one process and prediction.

    `solve(problem, x_T)` returns x_0 like x_T, and [n] bool: whether x was finite after each step.
    """

    grid: np.ndarray  # [n + 1] f64
    times: np.ndarray  # the grid, then all other times at which the network may be called
    evaluations: np.ndarray  # [n] network evaluations in each step
    solve: Callable[[solvers.Problem, jax.Array], tuple[jax.Array, jax.Array]]


def build(config, process: processes.Process, prediction: str, strength: float = 1.0) -> Sampler:
    """Returns the sampler of `config.sample`, for networks with this prediction.

    Args: strength, the share of the grid's steps that are taken, from the end of the grid.
    Raises: ValueError as `check`, or for settings that the sampler, the process or the prediction
      does not allow.
    """
    check(config)
    spec = SAMPLERS[config.sampler]
    _check_process(config.sampler, process)
    for key, setting in SETTINGS.items():
        if setting.zero_if_unused and config[key]:
            _check_key_is_used(config, key)
    grid = grids.take_last(spec.make_grid(config, process, prediction), strength)
    return spec.make(spec, config, process, prediction, grid)


def _make_plain(spec, config, process, prediction, grid):
    """Returns a sampler that calls the network once in each step, at the grid's times."""
    solve = partial(spec.solver, **{key: config[key] for key in spec.options})
    return Sampler(grid, grid, np.ones(len(grid) - 1, int), solve)


def _make_heun(spec, config, process, prediction, grid):
    # With churn, steps begin at noisier times, at which the network is called too.
    noisier_t, times = None, grid
    if config.churn:
        if isinstance(process, processes.DiscreteProcess) or process.ends_without_signal:
            raise UserError(
                f"churn={config.churn} needs diffusion.process=edm or vp, in continuous time and "
                "with alpha > 0 at t = 1."
            )
        noisier_t = solvers.add_churn(process, grid, config.churn, config.churn_range)
        times = np.append(grid, noisier_t)
    solve = partial(spec.solver, noisier_t=noisier_t, noise_scale=config.churn_noise)
    # The step to t = 0 is Euler's, with one evaluation.
    return Sampler(grid, times, np.where(grid[1:] == 0, 1, 2), solve)


def _get_last_step_t(config, process, prediction):
    """Returns the time at which the last step begins; without a last step, sampling ends there."""
    if config.last_step_t is not None:
        return config.last_step_t
    return process.end_t(prediction) if config.last_step == "none" else process.last_step_t


def _make_sde_grid(config, process, prediction):
    if config.steps < 2:
        raise UserError(f"euler_maruyama needs at least 2 steps, not steps={config.steps}.")
    last_t = _get_last_step_t(config, process, prediction)
    # With sbdm, w is infinite where alpha is 0. The grid of a predicted eps begins below that time.
    grid_prediction = "eps" if config.sde_diffusion == "sbdm" else prediction
    grid = grids.from_config(config, process, grid_prediction, steps=config.steps - 1)
    if last_t >= grid[0]:
        raise UserError(f"last_step_t={last_t} must be less than {grid[0]}, the grid's first time.")
    # These steps end at last_t. A last step from last_t to data is appended below.
    grid = last_t + (1 - last_t / grid[0]) * grid
    return np.append(grid, 0.0) if last_t > 0 and config.last_step != "none" else grid


def _make_euler_maruyama(spec, config, process, prediction, grid):
    # A last step that would begin at t = 0 is left out.
    last_step = config.last_step if _get_last_step_t(config, process, prediction) else "none"
    solve = partial(spec.solver, sde_diffusion=config.sde_diffusion, last_step=last_step)
    return Sampler(grid, grid, np.ones(len(grid) - 1, int), solve)


class SamplerSpec(NamedTuple):
    """A sampler's solver, help, keys of `config.sample`, and supported kinds of processes."""

    solver: Callable  # takes (problem, x_T) and arguments that `make` binds
    help: str
    options: tuple[str, ...] = ()  # keys of config.sample that only some samplers use
    kinds: tuple[str, ...] = (CHAIN, CONTINUOUS)  # of processes
    make_grid: Callable[..., np.ndarray] = grids.from_config  # takes (config, process, prediction)
    # Takes (spec, config, process, prediction, grid). `_make_plain` passes the options to the
    # solver, as arguments of the same names.
    make: Callable[..., Sampler] = _make_plain


SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(solvers.ddpm, "ancestral sampling", ("variance",)),
    "ddim": SamplerSpec(solvers.ddim, "to data", ("eta",)),
    "ddim_level1": SamplerSpec(
        solvers.ddim,
        "to the chain's first level, as Stable Diffusion's files",
        ("eta",),
        kinds=(CHAIN,),
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
        kinds=(CONTINUOUS,),
        make_grid=_make_sde_grid,
        make=_make_euler_maruyama,
    ),
}


class Setting(NamedTuple):
    """A key of `config.sample`: its type and help, and when it has no effect."""

    type: type  # tuple stands for two floats, low and high
    help: str  # a flag's help adds the samplers or grids that alone use the key
    choices: tuple[str, ...] = ()
    unused_if: tuple[str, float] | None = None  # (other key, value of it): then this has no effect
    zero_if_unused: bool = False  # must be 0 with samplers that do not use the key


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
    "churn_range": Setting(tuple, "LOW,HIGH of sigma / alpha with churn.", unused_if=NO_CHURN),
    "churn_noise": Setting(float, "Standard deviation of churn's noise.", unused_if=NO_CHURN),
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
        "Time at which the step to data begins, or, with --last_step none, sampling ends; 0 leaves "
        "this step out.",
    ),
    "clip_x_0": Setting(bool, "Clip x_0 of pixels to [-1, 1] in every step."),
    "cfg_scale": Setting(float, "Scale of guidance; 1 is none."),
    "cfg_channels": Setting(
        int, "Guided channels; 0 is all, the paper's samples use 3.", unused_if=NO_GUIDANCE
    ),
    "cfg_interval": Setting(
        tuple,
        "LOW,HIGH of the times t that are guided; with process edm, t = sigma / sigma_max.",
        unused_if=NO_GUIDANCE,
    ),
    "cfg_rescale": Setting(
        float,
        "0..1: how far guided outputs keep the standard deviation of unguided outputs.",
        unused_if=NO_GUIDANCE,
    ),
}


def find_users(key: str) -> dict[str, list[str]]:
    """Finds the samplers or the grids that alone use a key of `config.sample`.

    Returns: {'sampler': names} or {'grid': names}; {} if the key has no such restriction.
    """
    users = {}
    for chooser, specs in (("sampler", SAMPLERS), ("grid", grids.GRIDS)):
        if names := [name for name, spec in specs.items() if key in spec.options]:
            users[chooser] = names
    return users


def check(config) -> None:
    """Raises ValueError for an unknown choice, or a pair that is not low < high.

    The range of every single number is checked by `config.keys`.
    """
    for key, setting in SETTINGS.items():
        value = config[key]
        if setting.choices:
            check_choice(key, value, setting.choices)
        if setting.type is tuple and not (len(value) == 2 and value[0] < value[1]):
            joined = ",".join(map(str, value))
            raise UserError(f"{key}={joined} must be two numbers, low < high.")


def check_used(config, keys, learn_sigma: bool) -> None:
    """Raises ValueError if one of these keys of `config.sample` has no effect.

    Args: learn_sigma, whether the model predicts the variance.
    """
    for key in keys:
        _check_key_is_used(config, key)
        other_key, value = SETTINGS[key].unused_if or (None, None)
        if other_key and config[other_key] == value:
            raise UserError(
                f"{key}={config[key]} has no effect with {other_key}={value}. Give a larger "
                f"{other_key}."
            )
        if key == "variance" and learn_sigma:
            raise UserError(
                f"variance={config.variance} has no effect, because the model predicts the "
                "variance. Leave it out."
            )


def _check_key_is_used(config, key):
    """Raises ValueError if the config's sampler or grid does not use a key."""
    for chooser, users in find_users(key).items():
        if config[chooser] not in users:
            raise UserError(
                f"{key}={config[key]} has no effect with {chooser} {config[chooser]!r}. It is for "
                f"{', '.join(users)}."
            )


def _check_process(name, process):
    """Raises ValueError unless the sampler supports the process."""
    kind = CHAIN if isinstance(process, processes.DiscreteProcess) else CONTINUOUS
    names = [other_name for other_name, spec in SAMPLERS.items() if kind in spec.kinds]
    if name not in names:
        raise UserError(f"sampler {name!r} does not work with {kind}; choose {', '.join(names)}.")
