"""Flags of the commands that sample: the model, the sampler and the conditions."""

from absl import flags

from dit_jax import cli, conditions
from dit_jax.config import parsers
from dit_jax.diffusion import samplers

FLAGS = flags.FLAGS
# Type of a setting -> the parser of its flag. A tuple is two floats.
PARSERS = {
    str: flags.ArgumentParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    tuple: parsers.ListParser(float, 2),
}


def define_sampling(required: bool = True) -> None:
    """Defines --workdir and the flags for the checkpoint, the seed and the sampler."""
    cli.define_path("workdir", None, "Directory of a training run.", required)
    flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.", 0)
    cli.define_path("vae", None, "Workdir of the VAE that decodes; the run's by default.")
    cli.define_path(
        "text_encoder", None, "Workdir of the frozen encoder of captions; the run's by default."
    )
    flags.DEFINE_bool("raw", False, "Use the trained parameters instead of their EMA.")
    cli.define_path("guide", None, "Workdir of a worse model for autoguidance.")
    guide_help = "Step of the guide. Without --guide, an earlier step of --workdir is the guide."
    flags.DEFINE_integer("guide_step", None, guide_help, 0)
    cli.define_seed("Image i depends on the model, the seed, i and its condition alone.")
    # One flag for each key of config.sample; None leaves the run's own value.
    for name, setting in samplers.SETTINGS.items():
        users = samplers.find_users(name).items()
        only = "".join(f" With {chooser} {', '.join(names)} only." for chooser, names in users)
        help_text = f"{setting.help}{only} By default the run's."
        if setting.type is bool:  # defines --noNAME too
            flags.DEFINE_bool(name, None, help_text)
            continue
        parser = flags.EnumParser(setting.choices) if setting.choices else PARSERS[setting.type]
        flags.DEFINE(parser, name, None, help_text)


def define_conditions() -> None:
    """Defines the flags of all kinds of conditions."""
    for name, flag in conditions.FLAGS.items():
        if flag.repeated:
            flags.DEFINE_multi(flag.parser, None, name, [], flag.help)
        else:
            flags.DEFINE(flag.parser, name, None, flag.help)


def get_conditions() -> dict:
    """Returns {name: value} of the flags for conditions, for `runs.Trained.make_request`."""
    return {name: FLAGS[name].value or "" for name in conditions.FLAGS}


def get_load_arguments() -> dict:
    """Returns the arguments for `runs.load` from the flags."""
    # A flag that is not set leaves the run's own value.
    names = samplers.SETTINGS
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
