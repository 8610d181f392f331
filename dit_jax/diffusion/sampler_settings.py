"""The settings of `config.sample`: what they may be, and which do nothing beside others."""

import numpy as np

from dit_jax.diffusion import processes

SAMPLERS = (
    "ddpm",
    "ddim",
    "ddim_level1",
    "dpmpp1",
    "dpmpp2m",
    "dpmpp2m_sde",
    "euler",
    "heun",
    "ab2",
    "ab4",
    "euler_maruyama",
)
# Keys that are of some samplers, or of one grid, alone.
OF_SAMPLERS = {
    "variance": ("ddpm",),
    "eta": ("ddim", "ddim_level1"),
    "churn": ("heun",),
    "churn_range": ("heun",),
    "churn_noise": ("heun",),
    "sde_diffusion": ("euler_maruyama",),
    "last_step": ("euler_maruyama",),
    "last_step_t": ("euler_maruyama",),
}
OF_GRIDS = {"rho": ("karras",), "shift": ("shifted",)}
# Keys that do nothing while another one has this value.
OFF = {
    "churn_range": ("churn", 0),
    "churn_noise": ("churn", 0),
    "cfg_channels": ("cfg_scale", 1),
    "cfg_interval": ("cfg_scale", 1),
    "cfg_rescale": ("cfg_scale", 1),
}
VARIANCES = ("large", "small")
SDE_DIFFUSIONS = ("sigma", "sbdm")
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def check_used(config, keys, learn_sigma: bool) -> None:
    """Demands that these keys of `config.sample` are heeded.

    Args: learn_sigma, whether the model predicts the variance.
    Raises: ValueError with the first that does nothing.
    """
    for key in keys:
        value = f"{key}={config[key]}"
        for of, chosen in ((OF_SAMPLERS, "sampler"), (OF_GRIDS, "grid")):
            if key in of and config[chosen] not in of[key]:
                raise ValueError(
                    f"{value} is of {chosen} {', '.join(of[key])}; {config[chosen]!r} takes none."
                )
        if key in OFF and config[OFF[key][0]] == OFF[key][1]:
            other, off = OFF[key]
            raise ValueError(f"{value} does nothing with {other}={off}: give a larger {other}.")
        if key == "variance" and learn_sigma:
            raise ValueError(f"{value} does nothing: the model predicts the variance itself.")


def check(config, process: processes.Process) -> None:
    """Demands a sampler and its settings that the process allows.

    Raises: ValueError.
    """
    name, discrete = config.sampler, isinstance(process, processes.DiscreteProcess)
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}.")
    others = ", ".join(s for s in SAMPLERS if s != "euler_maruyama")
    if name == "ddim_level1" and not discrete:
        raise ValueError(f"sampler {name!r} is of diffusion.process=ddpm; choose ddim or another.")
    if discrete and name == "euler_maruyama":
        raise ValueError(
            f"sampler {name!r} needs a process in continuous time, vp, flow, gvp or edm; for "
            f"diffusion.process=ddpm choose {others}."
        )
    if not 0 <= config.eta <= 1:
        raise ValueError(f"eta={config.eta} must lie in [0, 1].")
    if not name.startswith("ddim") and config.eta:
        raise ValueError(f"eta={config.eta} is of sampler ddim; {name!r} takes none.")
    if config.variance not in VARIANCES:
        raise ValueError(f"unknown variance={config.variance!r}; choose large or small.")
    _check_churn(config, process, discrete)
    if config.sde_diffusion not in SDE_DIFFUSIONS or config.last_step not in LAST_STEPS:
        raise ValueError(
            f"sde_diffusion={config.sde_diffusion!r} must be one of {', '.join(SDE_DIFFUSIONS)}, "
            f"last_step={config.last_step!r} one of {', '.join(LAST_STEPS)}."
        )
    last_t = 0.0 if config.last_step_t is None else config.last_step_t
    if name == "euler_maruyama" and not (config.steps > 1 and 0 <= last_t < 1):
        raise ValueError(
            f"euler_maruyama needs at least 2 steps, not {config.steps}, and last_step_t="
            f"{config.last_step_t} in [0, 1)."
        )


def check_churn_range(churn_range: tuple[float, float]) -> None:
    """Raises: ValueError unless the range is two numbers, low < high."""
    low, high = churn_range if len(churn_range) == 2 else (np.nan, np.nan)
    if not low < high:
        shown = ",".join(map(str, churn_range))
        raise ValueError(f"churn_range={shown} must be two numbers, low < high.")


def _check_churn(config, process, discrete):
    churn = config.churn
    if not (0 <= churn < np.inf and 0 < config.churn_noise < np.inf):
        raise ValueError(
            f"{churn=} must not be negative, churn_noise={config.churn_noise} must be positive."
        )
    check_churn_range(config.churn_range)
    if churn and config.sampler != "heun":
        raise ValueError(f"{churn=} is of sampler 'heun'; {config.sampler!r} takes none.")
    if churn and (discrete or process.alpha(np.ones(1)) == 0):
        raise ValueError(
            f"{churn=} needs diffusion.process=edm or vp, where x_t tells x_0 at every level, "
            "continuous in t."
        )
