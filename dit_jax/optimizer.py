"""AdamW, its learning-rate schedule, and the exponential moving average of the parameters."""

import jax
import optax


def schedule(config, total_steps: int) -> optax.Schedule:
    """The learning rate of `config.optim` by step: linear warm-up, then constant or cosine to 0.

    Raises: ValueError for an unknown schedule, or a warm-up that does not end.
    """
    if config.schedule not in ("constant", "cosine"):
        raise ValueError(f"optim.schedule={config.schedule!r}: choose constant or cosine.")
    warmup = config.warmup_steps
    if not 0 <= warmup < total_steps:
        raise ValueError(
            f"optim.warmup_steps={warmup} must lie in 0..{total_steps - 1}: the warm-up must end "
            f"before {total_steps=}. Set --config.optim.warmup_steps lower."
        )
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, total_steps - warmup)
    if not warmup:
        return after
    # The first step moves already: (step + 1) / warmup of the peak.
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config, total_steps: int) -> optax.GradientTransformation:
    """The optax chain of `config.optim`.

    Raises: ValueError for an unknown schedule, or values out of range.
    """
    if config.learning_rate <= 0 or config.grad_clip_norm < 0 or config.weight_decay < 0:
        raise ValueError(
            f"optim.learning_rate={config.learning_rate} must be positive; optim.grad_clip_norm="
            f"{config.grad_clip_norm} (0 is off) and optim.weight_decay={config.weight_decay} must "
            "not be negative."
        )
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"optim.ema_decay={config.ema_decay} must lie in [0, 1).")
    adamw = optax.adamw(
        schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.grad_clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), adamw)
    return adamw


def update_ema(ema_params, params, decay: float):
    """ema = decay ema + (1 - decay) params, after each step, from the initial weights."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
