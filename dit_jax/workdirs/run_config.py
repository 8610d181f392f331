"""config.json of a workdir: written, read, and compared with the config of a run."""

import json
import logging
import pathlib

from ml_collections import ConfigDict

from configs import default
from dit_jax import models, sharding
from dit_jax.config import overrides, ranges, sizes
from dit_jax.errors import MissingFileError, UserError, UserFileError
from dit_jax.system import files, forms, json_files
from dit_jax.workdirs import older_versions, records

logger = logging.getLogger("dit_jax")

# A run may go on with other values of these: they do not change what is trained on what, up to
# rounding; total_steps also stretches a cosine schedule. A key that ends with a dot stands for all
# below it.
MAY_CHANGE = (
    "total_steps",
    "log_every_steps",
    "eval_every_steps",
    "sample_every_steps",
    "sample_num_images",
    "checkpoint_every_steps",
    "checkpoint_keep",
    "checkpoint_keep_every_steps",
    "checkpoint_best_metric",
    "profile_start_step",
    "profile_num_steps",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.data_dir",
    "data.name",
    "latents.vae",
    "latents.moments",
    "text.encoder",
    "autoencoder.lpips",
    "data.cache",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch_batches",
    "mesh.",
    "sample.",
    "fid.",
)

TRAINED = ("dit", "unet", "vae")  # the models of runs


def check_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Demands that what was trained in the workdir, if anything, was by this config.

    A digest that the config leaves empty is filled in by the run, so it differs from none.
    Raises: ValueError that lists the keys that differ and may not.
    """
    if records.saved_steps(workdir):  # before the first checkpoint nothing can be mixed up
        as_saved = ConfigDict(json.loads(json.dumps(config.to_dict())))  # tuples are lists there
        as_found = load_config(workdir)
        for either in (as_found, as_saved):
            overrides.expand_paths(either)
        saved, wanted = flatten(as_found), flatten(as_saved)
        # Where the data are recorded, they are recognised wherever they lie.
        name = () if records.load_data(workdir) else ("data.name",)
        if differing := _differing(saved, wanted, name):
            lines = [f"  {key}: workdir {before!r}, now {now!r}" for key, before, now in differing]
            raise UserError(
                f"{workdir} belongs to a run with another config:\n"
                + "\n".join(lines)
                + "\nChoose another --workdir, or restore these values."
            )


def check_step(workdir: pathlib.Path, step: int) -> None:
    """Demands that a checkpoint is of the config that is in config.json, where both can be read.

    Raises: OSError with the keys that differ and may not.
    """
    path = workdir / "checkpoints" / str(step) / "config" / "metadata"
    try:
        of_step = read_config(json_files.read_bytes(path), str(path))
        of_run = read_config(json_files.read_bytes(workdir / "config.json"), "config.json")
    except (OSError, ValueError):
        return  # `load_config` says so
    differing = _differing(flatten(of_step), flatten(of_run))
    # An empty digest is of what was not known then.
    differing = [one for one in differing if not (one[0].endswith("_digest") and "" in one[1:])]
    if differing:
        keys = [f"{key} {before!r}, now {now!r}" for key, before, now in differing]
        raise UserFileError(f"it is of another config than config.json: {'; '.join(keys[:5])}")


def _differing(saved, wanted, fixed=()):
    """[(key, value saved, value wanted)] of the keys that differ and may not, or are fixed."""
    pairs = [
        (key, saved.get(key, "none"), wanted.get(key, "none"))
        for key in sorted(saved.keys() | wanted.keys())
    ]
    return [
        (key, a, b)
        for key, a, b in pairs
        if a != b and (key in fixed or not _may_change(key, wanted))
    ]


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json, when all of the config has been found good.

    Raises: OSError.
    """

    def write():
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        files.replace_text(workdir / "config.json", text)

    sharding.in_first_process(write, f"cannot write to the workdir {workdir}")


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a workdir, locked; where config.json is lost, that of the newest checkpoint.

    A file with values of wrong types is as good as lost; numbers out of their range are an error.
    Raises: FileNotFoundError if nothing was trained there; ValueError if no config can be read, or
      for numbers out of their range.
    """
    files.check_utf8(workdir)
    path = workdir / "config.json"
    saved = records.newest_first(workdir, "config")
    if not path.is_file() and not saved:
        raise MissingFileError(
            f"no {path}: {workdir} must be a directory that dit_jax.train has written, or "
            "dit_jax.convert."
        )
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


def check_draws(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Demands the config of a run that trains a noise predictor.   Raises: ValueError."""
    name = config.model.name
    if name == "vae":
        raise UserError(f"{workdir} holds a 'vae', which decodes latents but draws none.")
    if set(config) == {"model"}:
        raise UserError(f"{workdir} holds a converted {name!r} alone, which draws no images.")


def read_config(text: bytes | str, name: str) -> ConfigDict:
    """Reads a config from its JSON, which an older version may have written; locked.

    Args: name, of the text's source in messages.
    Raises: ValueError for a text that is no config, or for a value of a wrong type, with its key.
    """
    config = json_files.parse_json(text, name, "the config of a run")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise UserError(f"{files.printable(name)} is no config: it has no model with a name.")
    config = older_versions.complete(config)
    check_types(config)
    try:
        return ConfigDict(config).lock()
    except (AttributeError, KeyError, TypeError) as error:  # an unknown key that is a method's name
        raise UserError(f"{files.printable(name)} is no config: {error.args[0]}") from None


def _check_ranges(config, path):
    """Demands numbers in their ranges.   Raises: ValueError that names the file."""
    try:
        ranges.check(config)
    except ValueError as error:
        raise UserError(
            f"{path}: {str(error).rstrip('.')}. Mend it; if config.json is damaged, remove it: a "
            "checkpoint that was trained here holds a copy."
        ) from None


def check_types(config: dict) -> None:
    """Demands of a complete config values of the types that a run, or a converted network, has.

    Raises: ValueError with the key.
    """
    name = config["model"]["name"]
    models.check_keys(config["model"])
    if config.keys() == {"model"}:  # a converted network's
        return
    if name not in TRAINED:
        raise UserError(f"a run trains {', '.join(TRAINED)}, no {name!r}.")
    _check_types(config, default.get_config(name).to_dict())


def _check_types(config, example, prefix=""):
    """Demands the keys of the default config, but in `model`, with values of their types.

    Raises: ValueError with the key.
    """
    if unknown := [f"{prefix}{name}" for name in config if name not in example]:
        raise UserError(
            f"it has {files.list_some(unknown)}, which this version does not know: take the one "
            "that wrote it."
        )
    for name, value in example.items():
        key = f"{prefix}{name}"
        if name not in config:
            raise UserError(f"it has no {key}.")
        elif isinstance(value, dict):
            older_versions.check_section(key, config[name])
            if key != "model":
                _check_types(config[name], value, f"{key}.")
        elif key in sizes.KEYS:
            sizes.check_type(key, config[name])
        elif isinstance(value, tuple):
            forms.check_type(key, config[name], float, many=True)
        elif value is not None:
            forms.check_type(key, config[name], type(value))
        elif config[name] is not None:  # a placeholder of a number
            forms.check_type(key, config[name], float)


def flatten(config: ConfigDict, prefix: str = "") -> dict:
    """'model.depth' -> value for every key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _may_change(key, wanted):
    if key.endswith("_digest") and wanted.get(key) == "":
        return True
    return key in MAY_CHANGE or key.partition(".")[0] + "." in MAY_CHANGE
