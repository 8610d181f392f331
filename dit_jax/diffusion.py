"""The noise process: alpha(t), sigma(t), q(x_t | x_0) and q(x_s | x_t, x_0).

t = 0 is data, t = 1 is noise. A process owns the map from t to what the network is fed.
Schedules are computed in f64 on the host; a gather casts them to f32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteProcess:
    """DDPM's chain of T noise levels; level 0 is data, level k + 1 is DDPM's index k.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models".
    """

    alpha_bar: np.ndarray  # [T + 1] f64: alpha(t)**2 of every level, starting with 1

    @property
    def num_steps(self) -> int:
        return len(self.alpha_bar) - 1

    def level(self, t):
        """The noise level 0..T of t in [0, 1], int32; numpy in, numpy out."""
        return (t * self.num_steps + 0.5).astype(np.int32)

    def time_of_index(self, index):
        """t of DDPM's index k in 0..T-1."""
        return (index + 1) / self.num_steps

    def network_time(self, t: jax.Array) -> jax.Array:
        """What the network is fed at t: DDPM's index k, f32."""
        return (self.level(t) - 1).astype(jnp.float32)

    def alpha(self, t: jax.Array) -> jax.Array:
        """The signal's factor at t, f32."""
        return _gather(np.sqrt(self.alpha_bar), self.level(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """The noise's standard deviation at t, f32."""
        return _gather(np.sqrt(1 - self.alpha_bar), self.level(t))

    def draw_t(self, key: jax.Array, batch_size: int) -> jax.Array:
        """[batch_size] times, uniform over the T indices."""
        return self.time_of_index(jax.random.randint(key, (batch_size,), 0, self.num_steps))

    def grid(self, num_steps: int) -> np.ndarray:
        """[num_steps + 1] f64 decreasing times of a sampler, 1 first and 0 (data) last.

        The retained indices are i * (T - 1) / (num_steps - 1), rounded half to even.

        Raises: ValueError unless 2 <= num_steps <= T.
        """
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(
                f"cannot take {num_steps} sampling steps: the process has {self.num_steps}, so "
                f"choose 2 to {self.num_steps}."
            )
        index = np.rint(np.arange(num_steps) * ((self.num_steps - 1) / (num_steps - 1)))
        return np.append(self.time_of_index(index[::-1]), 0.0)

    def posterior(self, t: np.ndarray, s: np.ndarray) -> "Posterior":
        """q(x_s | x_t, x_0) for times t, s [n] f64 with s < t, noisiest first.

        Source: Ho et al. 2020, eq. 6 and 7, for any two levels of the chain.
        """
        ab_t, ab_s = self.alpha_bar[self.level(t)], self.alpha_bar[self.level(s)]
        beta = 1 - ab_t / ab_s
        variance = beta * (1 - ab_s) / (1 - ab_t)
        # q(x_0 | x_1, x_0) has no variance; its logarithm is taken from the level above.
        clipped = np.where(variance > 0, variance, np.append(beta[:1], variance[:-1]))
        return Posterior(
            x_0_coef=np.sqrt(ab_s) * beta / (1 - ab_t),
            x_t_coef=np.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t),
            log_beta=np.log(beta),
            log_variance=np.log(clipped),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """q(x_s | x_t, x_0) = N(x_0_coef x_0 + x_t_coef x_t, exp(log_variance)); arrays [n] f64."""

    x_0_coef: np.ndarray
    x_t_coef: np.ndarray
    log_beta: np.ndarray  # the upper bound of a learned variance
    log_variance: np.ndarray  # the lower bound, with the 0 at s = 0 replaced by its neighbour


def build(config) -> DiscreteProcess:
    """The process of `config.diffusion`: betas linear from beta_start to beta_end.

    Raises: ValueError if the betas do not increase within (0, 1).
    """
    start, end, num_steps = config.beta_start, config.beta_end, config.num_steps
    if not (0 < start <= end < 1 and num_steps >= 2):
        raise ValueError(
            f"beta_start={start}, beta_end={end}, num_steps={num_steps}: a DDPM needs "
            "0 < beta_start <= beta_end < 1 and at least 2 steps; the paper's are 1e-4, 0.02, 1000."
        )
    betas = np.linspace(start, end, num_steps, dtype=np.float64)
    return DiscreteProcess(alpha_bar=np.append(1.0, np.cumprod(1 - betas)))


def q_sample(process: DiscreteProcess, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Noises clean latents: x_t = alpha(t) x_0 + sigma(t) eps.

    Args:
      x_0: [B, ...] f32, unit variance.   t: [B] in [0, 1].   eps: like x_0, N(0, I).
    Raises: ValueError if t is not [B].   Source: Ho et al. 2020, eq. 4.
    """
    if t.shape != x_0.shape[:1]:
        raise ValueError(f"t has shape {t.shape}, but x_0 {x_0.shape} needs one time per example.")
    return expand(process.alpha(t), x_0) * x_0 + expand(process.sigma(t), x_0) * eps


def x_0_from_eps(
    process: DiscreteProcess, x_t: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """The x_0 that noise eps implies: (x_t - sigma(t) eps) / alpha(t)."""
    return (x_t - expand(process.sigma(t), x_t) * eps) / expand(process.alpha(t), x_t)


def expand(a: jax.Array, x: jax.Array) -> jax.Array:
    """[B] or scalar, with trailing axes so that it multiplies x [B, ...]."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _gather(table, index):
    return jnp.asarray(table, jnp.float32)[index]
