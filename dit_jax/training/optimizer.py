"""Optimizers, learning-rate schedules, and the exponential moving average of parameters (EMA)."""

import jax
import optax

from dit_jax import sharding
from dit_jax.config import keys
from dit_jax.errors import UserError, check_choice

# The learning rate after the warm-up, by name: (peak rate, steps) -> schedule.
SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule,
}


def _make_adamw(config, rate):
    # A parameter whose gradient has always been 0 would be divided by 0.
    if not config.eps:
        raise UserError(
            "optim.eps=0 gives NaN for parameters without a gradient, which adaLN-Zero has at "
            "first. Set it to 1e-8."
        )
    return optax.adamw(
        rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )


OPTIMIZERS = {"adamw": _make_adamw}  # (config.optim, schedule) -> GradientTransformation


def schedule(config, total_steps: int) -> optax.Schedule:
    """Returns the learning rate of `config.optim` by step: linear warm-up, then constant or cosine.

    The cosine ends at 0 at total_steps.
    Raises: ValueError for an unknown schedule, or a warm-up that does not end before total_steps.
    """
    check_choice("optim.schedule", config.schedule, SCHEDULES)
    warmup = config.warmup_steps
    if not 0 <= warmup < total_steps:
        raise UserError(
            f"optim.warmup_steps={warmup} must be in 0..{total_steps - 1}: the warm-up must end "
            f"before {total_steps=}. Set it lower."
        )
    after = SCHEDULES[config.schedule](config.learning_rate, total_steps - warmup)
    if not warmup:
        return after
    # The first step's rate is above 0: step s has (s + 1) / warmup of the peak.
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config, total_steps: int, hidden_size: int | None = None
) -> optax.GradientTransformation:
    """Returns the optax chain of `config.optim`.

    Args: hidden_size, of the transformer; None for other models, which need mup_base_width=0.
    Raises: ValueError for an unknown optimizer or schedule, or values out of range.
    """
    keys.check(config, "optim")
    check_choice("optim.name", config.name, OPTIMIZERS)
    if config.learning_rate * config.weight_decay >= 1:
        raise UserError(
            f"optim.learning_rate={config.learning_rate} times optim.weight_decay="
            f"{config.weight_decay} must be below 1: a step removes this share of every "
            "parameter. Set one of them lower."
        )
    base_width = config.mup_base_width
    if base_width and hidden_size is None:
        raise UserError(
            f"optim.mup_base_width={base_width} scales learning rates by model.hidden_size, a key "
            "that this model lacks. Set mup_base_width to 0."
        )
    tx = OPTIMIZERS[config.name](config, schedule(config, total_steps))
    # Before the optimizer, whose moments then see the clipped gradients.
    if config.grad_clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
    return _scale_by_width(tx, base_width / hidden_size) if base_width else tx


def width_factors(params, factor: float):
    """Returns a tree of factors for the learning rates of the parameters.

    The factor is `factor` for `sharding.DIT_GROWING_KERNELS`, and 1 for all other parameters.
    Source: Yang et al. 2022, arXiv 2203.03466, table 3, Adam.

    The other rules of muP hold nearly without changes. Attention scores are divided by the root of
    the head size, not by the head size. This makes no difference if wider models have more heads of
    the same size. Xavier's variances go as 1 / fan-in. There are two exceptions: x_embedder's
    variance also goes as 1 / width, and t_embedder's variance is fixed.
    """

    def get_factor(key_path, _):
        return factor if sharding.find_name(key_path) in sharding.DIT_GROWING_KERNELS else 1.0

    return jax.tree_util.tree_map_with_path(get_factor, params)


def _scale_by_width(tx, factor):
    """Multiplies the updates of tx, weight decay included, by `width_factors`.

    The optimizer state stays that of tx.
    """

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda u, f: u * f, updates, width_factors(updates, factor)), state

    return optax.GradientTransformation(tx.init, update)


def update_ema(ema_params, params, decay: float):
    """Returns decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
