"""Noise processes: x_t = alpha(t) x_0 + sigma(t) eps, where t = 0 is data and t = 1 is noise.

A process defines everything that depends on t alone: the noise levels, and the time and scale of
the network's input. Samplers pass NumPy arrays and get f64 tables. Training passes JAX arrays and
gets f32 arrays.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import schedules
from dit_jax.errors import UserError, check_choice

# If alpha is 0 at t = 1, x_t and eps do not determine x_0 there. Samplers of a predicted eps then
# begin at this time.
LAST_T_OF_EPS = 1 - 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """A process with continuous t; subclasses define alpha, sigma, velocity and time_of_ratio."""

    time_scale: float  # the network's time at t = 1
    sigma_data: float  # standard deviation of x_0, for EDM's scales and weights and the likelihood
    smallest_t: ClassVar[float] = 1e-3  # least time above 0 of grid karras; also used in `end_t`
    x_T_std: ClassVar[float] = 1.0  # standard deviation of x_T, the first x_t of a sampler
    # Time at which the last step of an SDE sampler begins; the step leads to t = 0. SiT's value.
    last_step_t: ClassVar[float] = 0.04

    def alpha(self, t):
        """Returns the factor of x_0 in x_t."""
        raise NotImplementedError

    def sigma(self, t):
        """Returns the factor of eps in x_t."""
        raise NotImplementedError

    def velocity(self, t):
        """Returns (d alpha / dt, d sigma / dt)."""
        raise NotImplementedError

    def time_of_ratio(self, ratio):
        """Returns the t at which sigma / alpha is `ratio`."""
        raise NotImplementedError

    def snr(self, t):
        """Returns the signal-to-noise ratio, alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def snr_rate(self, t):
        """Returns -d snr / dt, twice the weight of x_0's squared error in the likelihood."""
        (d_alpha, d_sigma), alpha, sigma = self.velocity(t), self.alpha(t), self.sigma(t)
        return 2 * alpha * (alpha * d_sigma - sigma * d_alpha) / sigma**3

    def network_time(self, t):
        """Returns the network's time input for t."""
        return self.time_scale * t

    def network_scale(self, t):
        """Returns the factor that multiplies x_t to give the network's input."""
        return get_array_module(t).ones_like(t)

    @property
    def ends_without_signal(self) -> bool:
        """Whether alpha is 0 at t = 1, where x_t is noise alone."""
        return bool(self.alpha(np.ones(1)) == 0)

    def end_t(self, prediction: str) -> float:
        """Returns the time at which an SDE sampler without a last step ends; SiT's value."""
        # In SiT, only flows that predict neither eps nor the score end at t = 0.
        to_data = self.ends_without_signal and prediction not in ("eps", "score")
        return 0.0 if to_data else self.smallest_t

    def map_uniform(self, u: jax.Array, min_t: float) -> jax.Array:
        """Maps u in [0, 1) to training times that are uniform if u is."""
        return self.clip_time(u, min_t)

    def clip_time(self, t: jax.Array, min_t: float) -> jax.Array:
        """Returns the training time nearest to t."""
        # Where alpha is 0, the weight of a predicted eps is infinite.
        return jnp.clip(t, min_t, 1 - 1e-6 if self.ends_without_signal else 1.0)

    @property
    def last_t_of_eps(self) -> float:
        """The largest time at which x_t and eps determine x_0."""
        return LAST_T_OF_EPS if self.ends_without_signal else 1.0

    def first_t(self, prediction: str) -> float:
        """Returns the time at which samplers of a network with this prediction begin."""
        return self.last_t_of_eps if prediction in ("eps", "score") else 1.0

    def posterior(self, t: np.ndarray, s: np.ndarray) -> "Posterior":
        """Returns q(x_s | x_t, x_0) for times t, s [n] f64 with s < t, noisiest first.

        Source: Kingma et al. 2021, appendix A.2; for DDPM Ho et al. 2020, eq. 6 and 7.
        """
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        sigma_t, sigma_s = self.sigma(t), self.sigma(s)
        beta = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        variance = beta * (sigma_s / sigma_t) ** 2
        # At s = 0 the variance is 0 and has no logarithm. The step before gives its variance.
        clipped = np.where(variance > 0, variance, np.append(beta[:1], variance[:-1]))
        return Posterior(
            x_0_coef=alpha_s * beta / sigma_t**2,
            x_t_coef=alpha_t / alpha_s * (sigma_s / sigma_t) ** 2,
            log_beta=np.log(beta),
            log_variance=np.log(clipped),
        )

    def ode(self, t: np.ndarray) -> "Ode":
        """Returns the probability flow ODE at times t [n] f64.

        The clock is sigma / alpha; if alpha is 0 at t = 1, the clock is t.
        Source: Karras et al. 2022, eq. 4 with s = alpha.
        """
        if self.ends_without_signal:
            return Ode(t, np.ones_like(t), *self.velocity(t))
        alpha = self.alpha(t)
        return Ode(self.sigma(t) / alpha, alpha, np.zeros_like(t), np.ones_like(t))


class Posterior(NamedTuple):
    """The normal q(x_s | x_t, x_0) = N(x_0_coef x_0 + x_t_coef x_t, exp(log_variance)), [n] f64."""

    x_0_coef: np.ndarray
    x_t_coef: np.ndarray
    log_beta: np.ndarray  # upper bound of a learned log-variance
    log_variance: np.ndarray  # its lower bound; at s = 0 the value of the step before


class Ode(NamedTuple):
    """The probability flow, d(x / scale) / d clock = x_0_coef x_0 + eps_coef eps; all [n] f64."""

    clock: np.ndarray
    scale: np.ndarray
    x_0_coef: np.ndarray
    eps_coef: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteProcess(Process):
    """DDPM's chain of T noise levels: level 0 is data, level k + 1 is DDPM's index k.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models".
    """

    alpha_bar: np.ndarray  # [T + 1] f64: alpha(t)**2 of every level, starting with 1

    @property
    def num_steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alpha_bar) - 1

    @property
    def smallest_t(self) -> float:
        return 1 / self.num_steps

    def level(self, t):
        """Returns the noise level 0..T of t in [0, 1], int32; NumPy in, NumPy out."""
        # Rounds to the nearest level, because rounding errors may leave t just below it.
        return (t * self.num_steps + 0.5).astype(np.int32)

    def time_of_index(self, index):
        """Returns the t of DDPM's index k in 0..T-1."""
        return (index + 1) / self.num_steps

    def network_time(self, t):
        """Returns DDPM's index k, which is the network's time input for t."""
        return (self.level(t) - 1).astype(np.float64 if get_array_module(t) is np else jnp.float32)

    def _look_up(self, table, t):
        """Returns table[level] for the level of t; the table is [T + 1] f64."""
        if get_array_module(t) is jnp:
            table = jnp.asarray(table, jnp.float32)
        return table[self.level(t)]

    def alpha(self, t):
        return self._look_up(np.sqrt(self.alpha_bar), t)

    def sigma(self, t):
        return self._look_up(np.sqrt(1 - self.alpha_bar), t)

    def velocity(self, t):
        """Returns the derivatives, computed as differences of neighbouring levels."""
        alphas, sigmas = np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)
        d_alphas, d_sigmas = (np.gradient(a, 1 / self.num_steps) for a in (alphas, sigmas))
        return self._look_up(d_alphas, t), self._look_up(d_sigmas, t)

    def snr_rate(self, t):
        """Returns T (snr of the level below - snr of this level).

        The snr is infinite at level 0, so level 1 gets the value of level 2.
        Source: Kingma et al. 2021, eq. 13.
        """
        # Level 0 is never trained; its value is NaN.
        snr = self.alpha_bar[1:] / (1 - self.alpha_bar[1:])
        rate = self.num_steps * np.append(snr[:1] - snr[1:2], snr[:-1] - snr[1:])
        return self._look_up(np.append(np.nan, rate), t)

    def time_of_ratio(self, ratio):
        """Returns t by interpolation between the levels, in log(sigma / alpha)."""
        xp = get_array_module(ratio)
        with np.errstate(divide="ignore"):  # the ratio is infinite where alpha is 0
            table = 0.5 * np.log((1 - self.alpha_bar[1:]) / self.alpha_bar[1:])
        times = np.arange(1, self.num_steps + 1) / self.num_steps
        return xp.interp(xp.log(ratio), table, times)

    def ode(self, t):
        """Returns the ODE; if alpha is 0 at t = 1, the clock is the angle of (alpha, sigma)."""
        if not self.ends_without_signal:
            return super().ode(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return Ode(np.arctan2(sigma, alpha), np.ones_like(t), -sigma, alpha)

    def map_uniform(self, u, min_t):
        index = jnp.floor(u * self.num_steps).astype(jnp.int32)
        return self.time_of_index(jnp.clip(index, 0, self.num_steps - 1))

    def clip_time(self, t, min_t):
        return jnp.clip(self.level(t), 1, self.num_steps) / self.num_steps

    @property
    def last_t_of_eps(self) -> float:
        return 1 - 1 / self.num_steps if self.ends_without_signal else 1.0

    def first_t(self, prediction):
        if prediction in ("eps", "score") and self.ends_without_signal:
            raise UserError(
                f"with diffusion.zero_terminal_snr, a predicted {prediction} does not determine "
                "x_0 at the last level. Train with objective.prediction=v, x_0 or u."
            )
        return 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class VariancePreserving(Process):
    """DDPM in continuous time: d log alpha^2 / dt = -beta(t), linear from beta_min to beta_max.

    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 11 and 32.
    """

    beta_min: float
    beta_max: float

    def _log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        return get_array_module(t).exp(self._log_alpha(t))

    def sigma(self, t):
        # expm1 keeps the digits that 1 - alpha^2 would lose near t = 0.
        xp = get_array_module(t)
        return xp.sqrt(-xp.expm1(2 * self._log_alpha(t)))

    def velocity(self, t):
        half_beta = 0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))
        alpha, sigma = self.alpha(t), self.sigma(t)
        return -half_beta * alpha, half_beta * alpha**2 / sigma

    def time_of_ratio(self, ratio):
        xp = get_array_module(ratio)
        minus_log_alpha = 0.5 * xp.log1p(ratio**2)
        slope = self.beta_max - self.beta_min
        root = xp.sqrt(self.beta_min**2 + 4 * slope * minus_log_alpha)
        # This form of the root does not subtract two nearly equal numbers.
        return 4 * minus_log_alpha / (self.beta_min + root)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearFlow(Process):
    """Straight lines between data and noise: alpha = 1 - t, sigma = t.

    Source: Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching".
    """

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1 * t

    def velocity(self, t):
        one = get_array_module(t).ones_like(t)
        return -one, one

    def time_of_ratio(self, ratio):
        return ratio / (1 + ratio)


@dataclasses.dataclass(frozen=True, eq=False)
class TrigonometricFlow(Process):
    """The generalised variance-preserving path: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Source: Albergo & Vanden-Eijnden 2022; Ma et al. 2024, "SiT", section 2 (GVP).
    """

    def alpha(self, t):
        xp = get_array_module(t)
        return xp.where(t == 1, 0.0, xp.cos(np.pi / 2 * t))  # cos(pi / 2) rounds to 6e-17

    def sigma(self, t):
        return get_array_module(t).sin(np.pi / 2 * t)

    def velocity(self, t):
        return -np.pi / 2 * self.sigma(t), np.pi / 2 * self.alpha(t)

    def time_of_ratio(self, ratio):
        return 2 / np.pi * get_array_module(ratio).arctan(ratio)


@dataclasses.dataclass(frozen=True, eq=False)
class VarianceExploding(Process):
    """EDM's process: alpha = 1, sigma = sigma_max t. The network's input has unit variance.

    Source: Karras et al. 2022, "Elucidating the Design Space", table 1, last column.
    """

    sigma_min: float
    sigma_max: float

    @property
    def smallest_t(self) -> float:
        return self.sigma_min / self.sigma_max

    @property
    def x_T_std(self) -> float:
        return self.sigma_max

    @property
    def last_step_t(self) -> float:
        return self.smallest_t

    def alpha(self, t):
        return get_array_module(t).ones_like(t)

    def sigma(self, t):
        return self.sigma_max * t

    def velocity(self, t):
        xp = get_array_module(t)
        return xp.zeros_like(t), xp.full_like(t, self.sigma_max)

    def time_of_ratio(self, ratio):
        return ratio / self.sigma_max

    def network_time(self, t):
        """Returns log(sigma) / 4."""
        return get_array_module(t).log(self.sigma(t)) / 4

    def network_scale(self, t):
        return 1 / get_array_module(t).sqrt(self.sigma(t) ** 2 + self.sigma_data**2)


def build(config) -> Process:
    """Returns the process of `config.diffusion`.

    Raises: ValueError for an unknown process or schedule, and values that do not fit together.
    """
    check_choice("diffusion.process", config.process, PROCESSES)
    if config.process != "ddpm" and (config.schedule != "linear" or config.zero_terminal_snr):
        raise UserError(
            f"diffusion.schedule={config.schedule!r} and diffusion.zero_terminal_snr="
            f"{config.zero_terminal_snr} are for process=ddpm. Omit them for {config.process!r}."
        )
    return PROCESSES[config.process](config, config.num_steps, config.sigma_data)


def _make_ddpm(config, *base_fields):
    _check_betas(config)
    return DiscreteProcess(*base_fields, schedules.make_alpha_bar(config))


def _make_vp(config, *base_fields):
    _check_betas(config)
    beta_min, beta_max = (config.num_steps * b for b in (config.beta_start, config.beta_end))
    return VariancePreserving(*base_fields, beta_min, beta_max)


def _check_betas(config):
    if config.beta_start > config.beta_end:
        raise UserError(
            f"diffusion.beta_start={config.beta_start} must be at most beta_end={config.beta_end}. "
            "The paper's values are 1e-4 and 0.02."
        )


def _make_edm(config, *base_fields):
    if config.sigma_min >= config.sigma_max:
        raise UserError(
            f"diffusion.sigma_min={config.sigma_min} must be less than sigma_max="
            f"{config.sigma_max}. The paper's values are 0.002 and 80."
        )
    return VarianceExploding(*base_fields, config.sigma_min, config.sigma_max)


# Each function takes the config and the fields of `Process`: time_scale and sigma_data.
PROCESSES = {
    "ddpm": _make_ddpm,
    "vp": _make_vp,
    "flow": lambda config, *base_fields: LinearFlow(*base_fields),
    "gvp": lambda config, *base_fields: TrigonometricFlow(*base_fields),
    "edm": _make_edm,
}


def q_sample(process: Process, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Adds noise to clean data: x_t = alpha(t) x_0 + sigma(t) eps.

    Args:
      x_0: [B, ...] f32, unit variance.   t: [B] in [0, 1].   eps: like x_0, N(0, I).
    Raises: ValueError if t is not [B].   Source: Ho et al. 2020, eq. 4.
    """
    if t.shape != x_0.shape[:1]:
        raise UserError(f"t has shape {t.shape}, but x_0 {x_0.shape} needs one time per example.")
    return expand(process.alpha(t), x_0) * x_0 + expand(process.sigma(t), x_0) * eps


def expand(a: jax.Array, x: jax.Array) -> jax.Array:
    """Adds trailing axes to a, a scalar or [B], so that a * x is defined for x [B, ...]."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def get_array_module(t):
    """Returns numpy for a NumPy array or a float, else jax.numpy."""
    return np if isinstance(t, (np.ndarray, np.generic, float)) else jnp
