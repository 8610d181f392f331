"""Keys of `config.sample`: their types, ranges and help, from which commands make flags."""

from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError


class Setting(NamedTuple):
    """A key of `config.sample`: its type and help, and when it has no effect."""

    type: type  # tuple stands for two floats
    help: str  # `samplers.get_owners` adds the samplers or grids that use the key
    choices: tuple[str, ...] = ()
    off: tuple[str, float] | None = None  # (other key, its value with which this key has no effect)
    refused: bool = False  # the key must be 0 with samplers that do not use it


SETTINGS: dict[str, Setting] = {
    "sampler": Setting(str, ""),  # its help and choices are in `samplers.SAMPLERS`
    "steps": Setting(int, "Sampling steps."),
    "grid": Setting(str, ""),  # its help and choices are in `grids.GRIDS`
    "rho": Setting(float, "Its exponent."),
    "shift": Setting(float, "Its factor."),
    "variance": Setting(
        str, "Without a learned one: large (beta) or small (the posterior's).", ("large", "small")
    ),
    "eta": Setting(float, "0 deterministic, 1 DDPM's variance.", refused=True),
    "churn": Setting(float, "S_churn of EDM: noise added before steps.", refused=True),
    "churn_range": Setting(tuple, "LOW,HIGH of sigma / alpha where it churns.", off=("churn", 0)),
    "churn_noise": Setting(float, "Deviation of that noise.", off=("churn", 0)),
    "sde_diffusion": Setting(
        str, "Its noise: sigma (SiT's) or sbdm (the process's).", ("sigma", "sbdm")
    ),
    "last_step": Setting(
        str,
        "Its step to data, without noise: mean, euler, tweedie or none.",
        ("mean", "euler", "tweedie", "none"),
    ),
    "last_step_t": Setting(
        float,
        "Time at which that step begins; with none, at which sampling ends; 0 leaves it out.",
    ),
    "clip_x_0": Setting(bool, "Of pixels, keep x_0 in [-1, 1] in every step."),
    "cfg_scale": Setting(float, "Guidance; 1 is none."),
    "cfg_channels": Setting(
        int, "Guided channels; 0 all, the paper's samples use 3.", off=("cfg_scale", 1)
    ),
    "cfg_interval": Setting(
        tuple,
        "LOW,HIGH of the times t that are guided; of process edm t = sigma / sigma_max.",
        off=("cfg_scale", 1),
    ),
    "cfg_rescale": Setting(
        float,
        "0..1: how far guided outputs keep the deviation of unguided ones.",
        off=("cfg_scale", 1),
    ),
}


def check(config) -> None:
    """Raises ValueError for a setting out of its range, even if the sampler does not use it."""
    for key, setting in SETTINGS.items():
        if setting.choices and config[key] not in setting.choices:
            raise UserError(
                f"unknown {key}={config[key]!r}; choose one of {', '.join(setting.choices)}."
            )
    if not 0 <= config.eta <= 1:
        raise UserError(f"eta={config.eta} must lie in [0, 1].")
    if not (0 <= config.churn < np.inf and 0 < config.churn_noise < np.inf):
        raise UserError(
            f"churn={config.churn} must not be negative, churn_noise={config.churn_noise} must be "
            "positive."
        )
    check_churn_range(config.churn_range)


def check_churn_range(churn_range: tuple[float, float]) -> None:
    """Raises ValueError unless the range is two numbers, low < high."""
    low, high = churn_range if len(churn_range) == 2 else (np.nan, np.nan)
    if not low < high:
        shown = ",".join(map(str, churn_range))
        raise UserError(f"churn_range={shown} must be two numbers, low < high.")
