"""config.json of a workdir: writes it, reads it, and compares it with the config of a run."""

import json
import logging
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import default
from dit_jax import models, sharding
from dit_jax.config import keys, overrides
from dit_jax.errors import MissingFileError, UserError, UserFileError
from dit_jax.system import files, json_files
from dit_jax.workdirs import checkpoint_files, identity, older_versions

logger = logging.getLogger("dit_jax")

TRAINED = ("dit", "unet", "vae")  # the models that a run can train


def check_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises unless a workdir has no checkpoints, or was trained with a compatible config.

    Keys that may change may differ; data.name also, if the identities of the data are recorded. An
    empty digest in `config` matches any value, because the run fills it in.
    Raises: ValueError that lists the keys that must not differ.
    """
    if not checkpoint_files.saved_steps(workdir):
        return  # before the first checkpoint, any config may be used
    saved, current = load_config(workdir), config.copy_and_resolve_references()
    overrides.expand_paths(saved)
    overrides.expand_paths(current)
    differing = _compare(saved, current)
    # Recorded data are recognised by their contents, so their path may change.
    if identity.load_data(workdir):
        differing.pop("data.name", None)
    if differing:
        lines = [f"  {key}: workdir {a!r}, now {b!r}\n" for key, (a, b) in differing.items()]
        raise UserError(
            f"{workdir} belongs to a run with another config:\n{''.join(lines)}"
            "Restore these values, or choose another --workdir."
        )


def check_step(workdir: pathlib.Path, step: int) -> None:
    """Raises unless the config in a checkpoint is compatible with config.json.

    If one of the two cannot be read, they are not compared.
    Raises: OSError with the keys that must not differ.
    """
    path = workdir / "checkpoints" / str(step) / "config" / "metadata"
    try:
        step_config = read_config(json_files.read_bytes(path), str(path))
        workdir_config = read_config(json_files.read_bytes(workdir / "config.json"), "config.json")
    except (OSError, ValueError):
        return  # `load_config` reports the error
    # An empty digest was not known when the config was written, so it matches any value.
    differing = [
        f"{key} {a!r}, now {b!r}"
        for key, (a, b) in _compare(step_config, workdir_config).items()
        if key != "data.name" and not (key.endswith("_digest") and "" in (a, b))
    ]
    if differing:
        raise UserFileError(f"its config is not config.json: {'; '.join(differing[:5])}")


def _compare(saved, current):
    """Returns {key: (saved value, current value)} of the keys that must not differ, but do."""
    saved, current = flatten(saved), flatten(current)
    differing = {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key, "none"), current.get(key, "none")
        will_be_filled_in = key.endswith("_digest") and new == ""
        if old != new and not will_be_filled_in and not keys.may_change(key):
            differing[key] = (old, new)
    return differing


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json. Callers must have checked the config.

    All processes must call this function; the first one writes.
    Raises: OSError, in all processes.
    """
    path, text = workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n"
    sharding.in_first_process(
        lambda: files.replace_text(path, text), f"cannot write to the workdir {workdir}"
    )


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Returns the config of a workdir, locked.

    If config.json is missing, damaged, or has values of wrong types, the copy in the newest
    checkpoint is used.
    Raises: FileNotFoundError if the workdir has no config at all; ValueError if no config can be
      read, or for a number out of its range.
    """
    files.check_utf8(workdir)
    path = workdir / "config.json"
    saved = checkpoint_files.newest_first(workdir, "config")
    if not path.is_file() and not saved:
        raise MissingFileError(
            f"no {path}: {workdir} must be a directory that dit_jax.train has written or "
            "dit_jax.convert has written."
        )
    # config.json comes first, then the newest copy; each one that cannot be read is logged.
    problems = []
    for candidate in [path, *saved]:
        try:
            config = read_config(json_files.read_bytes(candidate), str(candidate))
        except (OSError, ValueError) as error:
            problems.append(f"{candidate.relative_to(workdir)} is not used: {error}")
            logger.warning(problems[-1])
            continue
        _check_ranges(config, candidate)
        return config
    raise UserError(
        f"no config in {workdir} can be read; restore config.json from a copy. {problems[0]}"
    )


def check_draws_images(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises ValueError unless the workdir belongs to a noise predictor, which draws images."""
    name = config.model.name
    if name == "vae":
        raise UserError(f"{workdir} holds a 'vae', which decodes latents but does not sample.")
    if set(config) == {"model"}:
        raise UserError(f"{workdir} holds a converted {name!r} alone, which draws no images.")


def read_config(text: bytes | str, name: str) -> ConfigDict:
    """Returns the config in a JSON text, locked; older versions may have written the text.

    Args: name, of the text's file, for messages.
    Raises: ValueError for a text that is no config, or for a value of a wrong type.
    """
    config = json_files.parse_json(text, name, "the config of a run")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise UserError(f"{files.printable(name)} is no config: it has no model with a name.")
    reference = default.get_config(model["name"]) if model["name"] in TRAINED else {}
    config = older_versions.complete(config, reference)
    check_types(config)
    try:
        return ConfigDict(config).lock()
    # An unknown key may have the name of a method of ConfigDict.
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{files.printable(name)} is no config: {error.args[0]}") from None


def _check_ranges(config, path):
    """Raises ValueError, with the file, unless all numbers are in their ranges."""
    try:
        keys.check(config)
    except ValueError as error:
        raise UserError(
            f"{path}: {str(error).rstrip('.')}. Correct the value. If config.json is damaged, "
            "remove it: checkpoints of training hold a copy."
        ) from None


def check_types(config: dict) -> None:
    """Raises unless a config has exactly the keys of its model's default, of the right types.

    A converted network has only the section 'model'.   Raises: ValueError with the key.
    """
    name = config["model"]["name"]
    models.check_keys(config["model"])
    if config.keys() == {"model"}:  # a converted network
        return
    if name not in TRAINED:
        raise UserError(f"a run cannot train the model {name!r}, only {', '.join(TRAINED)}.")
    _check_types(config, default.get_config(name).to_dict())


def _check_types(config, example, prefix=""):
    """Raises unless a config has the keys and types of the default config `example`.

    `models.check_keys` checks the section `model`. In messages, `prefix` begins the keys.
    """
    if unknown := [f"{prefix}{name}" for name in config if name not in example]:
        raise UserError(
            f"it has {files.list_some(unknown)}, which this version does not know. Use the version "
            "that wrote the config."
        )
    for name, value in example.items():
        key = f"{prefix}{name}"
        if name not in config:
            raise UserError(f"it has no {key}.")
        elif isinstance(value, dict):
            older_versions.check_section(key, config[name])
            if key != "model":
                _check_types(config[name], value, f"{key}.")
        elif isinstance(value, tuple):
            keys.check_type(key, config[name], float, many=True)
        elif value is not None:
            keys.check_type(key, config[name], type(value))
        # The default is None only for placeholders of numbers.
        elif config[name] is not None:
            keys.check_type(key, config[name], float)


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> dict:
    """Returns {'model.depth': value} of all keys, with lists for tuples, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
