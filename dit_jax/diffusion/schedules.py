"""Schedules of betas, for process ddpm."""

import numpy as np

from dit_jax.errors import check_choice


def _cosine_betas(start, end, num_steps):
    """Returns the betas of the cosine schedule, which does not use start and end.

    Source: Nichol & Dhariwal 2021, eq. 17.
    """
    t = np.arange(num_steps + 1) / num_steps
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # alpha_bar, but for a constant factor
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


# Each maps (beta_start, beta_end, num_steps) to betas [num_steps] f64.
SCHEDULES = {
    "linear": lambda start, end, num_steps: np.linspace(start, end, num_steps, dtype=np.float64),
    # Rombach et al. 2022
    "scaled_linear": lambda start, end, num_steps: (
        np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float64) ** 2
    ),
    "cosine": _cosine_betas,
}


def make_alpha_bar(config) -> np.ndarray:
    """Returns alpha_bar = alpha^2 [num_steps + 1] f64 of `config.diffusion`, data first.

    Raises: ValueError for an unknown schedule.
    Source of zero_terminal_snr: Lin et al. 2023, algorithm 1.
    """
    start, end, num_steps = config.beta_start, config.beta_end, config.num_steps
    check_choice("diffusion.schedule", config.schedule, SCHEDULES)
    betas = SCHEDULES[config.schedule](start, end, num_steps)
    alpha_bar = np.cumprod(1 - betas)
    if config.zero_terminal_snr:
        # Shifts and scales alpha so that the last one is 0 and the first one stays.
        alpha = np.sqrt(alpha_bar)
        alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return np.append(1.0, alpha_bar)
