"""The state that a run begins with: fresh parameters, or the weights of another run."""

import functools
import logging

import jax

from dit_jax import conditions, models, workdirs
from dit_jax.errors import UserError
from dit_jax.system import files
from dit_jax.training import programs
from dit_jax.workdirs import checkpoint

logger = logging.getLogger("dit_jax")

# Keys of config.model that may differ from the model whose weights a run begins with.
MAY_DIFFER = ("dtype", "attention", "remat", "scan_unroll", "dropout", "input_size")


def new_state(program: programs.Program, key: jax.Array) -> programs.TrainState:
    """Returns the initial state, sharded from the start: no device ever holds more than its share.

    Raises: as `checkpoint.restore_params`, for the weights of config.init_from; ValueError if
      they belong to another model, process or prediction.
    """
    trained = {}
    if program.config.init_from:
        workdir = files.to_path(program.config.init_from, "init_from")
        _check_weights(program.config, workdir)
        # All of the model's parameters are taken, and nothing else: step, EMA, optimizer state and
        # parameters that only training uses begin anew.
        groups = models.param_shapes(program.model)
        shapes = {group: program.state.params[group] for group in groups}
        trained, step = checkpoint.restore_params(workdir, shapes)
        taken = ", ".join(trained)
        logger.info("beginning with the EMA weights of %s, step %d: %s", workdir, step, taken)
    init = functools.partial(programs.init_state, program.task, program.tx)
    state = jax.jit(init, out_shardings=program.shardings)(key, trained)
    # Raises here if memory cannot hold the state; on CPUs int(state.step) would never return.
    return jax.block_until_ready(state)


def _check_weights(config, workdir):
    """Raises unless init_from has this config's model, process and prediction.

    Another VAE or text encoder gives only a warning: training may make up for it.
    """
    saved_config = workdirs.load_config(workdir)
    for part, key in (("latents", "vae_digest"), ("text", "encoder_digest")):
        saved, current = (c.get(part, {}).get(key) for c in (saved_config, config))
        if saved and current and saved != current:
            logger.warning(
                "init_from=%s was trained on %s.%s=%s, not %s", workdir, part, key, saved, current
            )
    actual, expected = (_compatibility_keys(c) for c in (saved_config, config))
    if differing := [key for key in expected if actual.get(key) != expected[key]]:
        lines = [f"  {key}: there {actual.get(key)!r}, here {expected[key]!r}" for key in differing]
        raise UserError(
            f"init_from={workdir} holds weights of another model, process or prediction; these "
            "differ:\n" + "\n".join(lines) + "\nSet them as there, or init_from to another workdir."
        )


def _compatibility_keys(config):
    """Returns {key: value} of all that decides which parameters exist and what they compute."""
    keys = {
        key: value
        for key, value in workdirs.flatten(config).items()
        if key.startswith(("model.", "diffusion.")) or key == "objective.prediction"
    }
    for name in MAY_DIFFER:
        keys.pop(f"model.{name}", None)
    for name in conditions.build(config).unused_keys:
        keys.pop(f"model.{name}", None)
    return keys
