"""The state before a run's first step: fresh parameters, or the weights of another run."""

import functools
import logging

import jax

from dit_jax import conditions, models, workdirs
from dit_jax.errors import UserError
from dit_jax.system import files
from dit_jax.training import programs
from dit_jax.workdirs import checkpoint

logger = logging.getLogger("dit_jax")

# Keys of config.model in which a run may differ from the one that init_from names.
MAY_DIFFER = ("dtype", "attention", "remat", "scan_unroll", "dropout", "input_size")


def new_state(program: programs.Program, key: jax.Array) -> programs.TrainState:
    """Returns the state before the first step; no device ever holds more than its shards.

    Raises: as `checkpoint.restore_params`, for the weights of config.init_from; ValueError for
      weights of another model, process or prediction.
    """
    trained = {}
    if program.config.init_from:
        workdir = files.to_path(program.config.init_from, "init_from")
        _check_weights(program.config, workdir)
        # All parameters of the model are taken. The step, the EMA, the optimizer state, and the
        # parameters that only training uses begin anew.
        groups = models.param_shapes(program.model)
        shapes = {group: program.state.params[group] for group in groups}
        trained, step = checkpoint.restore_params(workdir, shapes)
        names = ", ".join(trained)
        logger.info("beginning with the EMA weights of %s, step %d: %s", workdir, step, names)
    init = functools.partial(programs.init_state, program.task, program.tx)
    state = jax.jit(init, out_shardings=program.shardings)(key, trained)
    # A state that does not fit in memory raises here. On CPUs int(state.step) would hang instead.
    return jax.block_until_ready(state)


def _check_weights(config, workdir):
    """Raises unless init_from has this config's model, process and prediction.

    Another VAE or text encoder is only warned of, because training may make up for it.
    """
    saved_config = workdirs.load_config(workdir)
    for section, key in (("latents", "vae_digest"), ("text", "encoder_digest")):
        saved = saved_config.get(section, {}).get(key)
        current = config.get(section, {}).get(key)
        if saved and current and saved != current:
            message = "init_from=%s was trained on %s.%s=%s, not %s"
            logger.warning(message, workdir, section, key, saved, current)
    actual, expected = _select_weight_keys(saved_config), _select_weight_keys(config)
    if differing := [key for key in expected if actual.get(key) != expected[key]]:
        lines = [f"  {key}: there {actual.get(key)!r}, here {expected[key]!r}" for key in differing]
        raise UserError(
            f"init_from={workdir} holds weights of another model, process or prediction; these "
            "differ:\n" + "\n".join(lines) + "\nSet them as there, or set another init_from."
        )


def _select_weight_keys(config):
    """Returns {key: value} of the keys that decide which parameters exist and what they compute."""
    keys = {
        key: value
        for key, value in workdirs.flatten(config).items()
        if key.startswith(("model.", "diffusion.")) or key == "objective.prediction"
    }
    for name in (*MAY_DIFFER, *conditions.build(config).unused_keys):
        keys.pop(f"model.{name}", None)
    return keys
