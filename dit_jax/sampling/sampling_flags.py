"""Flags of the commands that sample: the model, the sampler and the conditions."""

from absl import flags

from dit_jax import cli
from dit_jax.config import parsers
from dit_jax.diffusion import grids, sampler_settings, samplers

FLAGS = flags.FLAGS
# Parsers of flags by the type of a setting; a tuple is two floats.
PARSERS = {
    str: flags.ArgumentParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    tuple: parsers.ListParser(float, 2),
}


def define_sampling(required: bool = True) -> None:
    """Defines --workdir and the flags for the checkpoint, the seed and the sampler."""
    cli.define_path("workdir", None, "Directory of a training run.", required)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", 0)
    cli.define_path("vae", None, "Workdir of the VAE that decodes; the run's by default.")
    cli.define_path(
        "text_encoder", None, "Workdir of the frozen encoder of captions; the run's by default."
    )
    flags.DEFINE_bool("raw", False, "The trained parameters instead of their EMA.")
    cli.define_path("guide", None, "Workdir of a worse model that guides: autoguidance.")
    flags.DEFINE_integer(
        "guide_step", None, "Checkpoint of --guide, or an earlier one of --workdir to guide it.", 0
    )
    cli.define_seed("Image i is a function of the model, the seed, i and its label.")
    # One flag for each key of config.sample; None leaves the run's own value.
    for name, setting in sampler_settings.SETTINGS.items():
        text = f"{describe(name)} By default the run's."
        # With --NAME and --noNAME.
        if setting.type is bool:
            flags.DEFINE_bool(name, None, text)
        else:
            flags.DEFINE(PARSERS[setting.type], name, None, text)


def describe(key: str) -> str:
    """Returns the help of a key of `config.sample`, with the samplers or grids that use it."""
    if key == "sampler":
        return ", ".join(f"{name} ({row.help})" for name, row in samplers.SAMPLERS.items()) + "."
    if key == "grid":
        names = ", ".join(grids.GRIDS)
        return f"{names}; of process ddpm also {', '.join(grids.CHAIN_GRIDS)}, or counts."
    owners = samplers.get_owners(key)
    text = sampler_settings.SETTINGS[key].help
    # A key that only some samplers or grids use names them first.
    for chosen, names in owners.items():
        text = f"Of {chosen} {', '.join(names)}: {text[0].lower()}{text[1:]}"
    return text


def define_conditions() -> None:
    """Defines the flags for the images' conditions, and for what guidance leads away from."""
    flags.DEFINE_string(
        "labels", "", "Comma-separated classes in equal shares; empty is all; or random."
    )
    flags.DEFINE_multi_string("prompt", [], "Caption, of a model of captions; may be repeated.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")


def get_load_arguments() -> dict:
    """Returns the arguments of `runs.load` from the flags."""
    # A flag that was not given leaves the run's own value.
    names = sampler_settings.SETTINGS
    settings = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    return dict(
        workdir=FLAGS.workdir,
        step=FLAGS.step,
        raw=FLAGS.raw,
        vae_workdir=FLAGS.vae,
        encoder_workdir=FLAGS.text_encoder,
        settings=settings,
        guide_workdir=FLAGS.guide,
        guide_step=FLAGS.guide_step,
    )
