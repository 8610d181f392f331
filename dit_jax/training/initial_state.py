"""The state that a run begins with: fresh, or from the weights of another run."""

import functools
import json
import logging

import jax

from dit_jax import conditions, workdirs
from dit_jax.errors import UserError
from dit_jax.system import files
from dit_jax.training import programs
from dit_jax.workdirs import checkpoint

logger = logging.getLogger("dit_jax")

# Of a model, what may differ from the one whose weights it begins with.
MAY_DIFFER = ("dtype", "attention", "remat", "scan_unroll", "dropout", "input_size")


def new_state(program: programs.Program, key: jax.Array) -> programs.TrainState:
    """The initial state, born sharded: no device ever holds more than its share.

    Raises: as `checkpoint.restore_params`, of the weights of config.init_from; ValueError if these
      are another model's, or of another process or prediction.
    """
    if program.config.init_from:
        workdir = files.to_path(program.config.init_from, "init_from")
        _check_weights(program.config, workdir)
        params, step = checkpoint.restore_params(workdir, program.state.params)
        logger.info("beginning with the EMA weights of %s, step %d", workdir, step)
        begin = functools.partial(programs.begin, program.tx)
        state = jax.jit(begin, out_shardings=program.shardings)(params)
    else:
        init = functools.partial(programs.init_state, program.model, program.tx)
        state = jax.jit(init, out_shardings=program.shardings)(key)
    # Here a state that memory does not hold is an error; on CPUs int(state.step) never returns.
    return jax.block_until_ready(state)


def _check_weights(config, workdir):
    """Demands that the weights in a workdir mean there what they will mean here.

    That another VAE or text encoder stood beside them is a warning: training may make up for it.
    """
    their_config = workdirs.load_config(workdir)
    for part, key in (("latents", "vae_digest"), ("text", "encoder_digest")):
        there, here = (c.get(part, {}).get(key) for c in (their_config, config))
        if there and here and there != here:
            logger.warning(
                "init_from=%s was trained on %s.%s=%s, not %s", workdir, part, key, there, here
            )
    theirs, ours = (_meaning(c) for c in (their_config, config))
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        lines = [f"  {key}: there {theirs.get(key)!r}, here {ours[key]!r}" for key in differing]
        raise UserError(
            f"init_from={workdir} holds weights of another model, process or prediction; these "
            "differ:\n" + "\n".join(lines) + "\nSet them as there, or init_from to another workdir."
        )


def _meaning(config):
    """{key: value} of all that decides which arrays there are and what they compute."""
    kept = {
        key: value
        for key, value in workdirs.flatten(config).items()
        if key.startswith(("model.", "diffusion.")) or key == "objective.prediction"
    }
    for name in MAY_DIFFER:
        kept.pop(f"model.{name}", None)
    for name in conditions.build(config).unused_keys:
        kept.pop(f"model.{name}", None)
    return json.loads(json.dumps(kept))  # tuples are lists in a workdir
