"""Migration of configs that older versions wrote to the current keys."""

from collections.abc import Mapping

from dit_jax.config import keys, ranges
from dit_jax.errors import UserError

# The sections of a config.
SECTIONS = {key.partition(".")[0] for key in keys.KEYS if "." in key}


def check_section(key, value):
    """Raises ValueError unless the value of a section is an object with keys."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{key}={ranges.shorten(value)} must be an object with keys.")


def complete(config: dict, reference: Mapping) -> dict:
    """Adds missing keys to a config and converts old ones, in place; returns the config.

    Args: reference, a config of the same model with all current keys.
    Raises: ValueError for a section that is no object.
    """
    # The config is not validated yet, so any section may be no object.
    for section in SECTIONS & config.keys():
        check_section(section, config[section])
    if config.keys() == {"model"}:  # a converted network has no other sections
        return config
    name = config["model"].get("name")
    if name != "vae":
        _split_dropout(config)
    if "sample" in config:
        config["sample"] = upgrade_sample(config["sample"])
    latents = config.get("latents", {})
    for key in ("scale", "shift"):  # the first versions had one number instead of a list
        if isinstance(latents.get(key), int | float):
            latents[key] = [latents[key]]
    # A missing key gets the value that stands for what versions without the key did.
    for key, row in keys.KEYS.items():
        section, _, name = key.rpartition(".")
        current = reference.get(section, {}) if section else reference
        if row.old is not keys.NO_VALUE and name in current:
            values = config.setdefault(section, {}) if section else config
            values.setdefault(name, row.old)
    return config


def _split_dropout(config):
    """Replaces `model.class_dropout_prob`, in place.

    `model.null_condition` and `objective.condition_dropout` take its place. The old key was 0 for
    a model without a null class; the dropout then has no effect, and `complete` adds its default.
    """
    if "class_dropout_prob" in config["model"]:
        prob = config["model"].pop("class_dropout_prob")
        keys.check_type("model.class_dropout_prob", prob, float)
        if not 0 <= prob < 1:
            raise UserError(f"model.class_dropout_prob={prob} must be a number in [0, 1).")
        config["model"].setdefault("null_condition", prob > 0)
        if prob > 0:
            config.setdefault("objective", {}).setdefault("condition_dropout", prob)


def upgrade_sample(sample: dict) -> dict:
    """Returns sample settings with current keys instead of old ones.

    `last_step_size` became `last_step_t`, the time at which the last step begins; its default was 0
    and is now None. `num_images`, for pictures during training, is now outside `config.sample`.

    Args:
      sample: `config.sample`, or the settings in a row of evaluations.jsonl.
    """
    sample = dict(sample)
    sample.pop("num_images", None)
    if "last_step_size" in sample:
        sample["last_step_t"] = sample.pop("last_step_size") or None
    return sample
