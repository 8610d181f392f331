"""Export of a workdir's DiT to a .safetensors file, and its config in the file's metadata."""

import json
import pathlib

import jax
import safetensors.numpy
from ml_collections import ConfigDict

from configs import default
from dit_jax import cli, diffusion, models, workdirs
from dit_jax.config import keys, sizes
from dit_jax.convert import dit, fields
from dit_jax.errors import UserError, UserFileError
from dit_jax.models.dit import DiT
from dit_jax.system import files, json_files
from dit_jax.workdirs import checkpoint, older_versions

METADATA_KEY = "dit_jax"  # of the config in the file's metadata
DESCRIPTION = "the config that `convert dit-export` writes"
# Sections that an exported config must have.
SECTIONS = ("model", "data", "diffusion", "objective", "latents", "sample")
# Key of `config.model` -> its largest value. Larger sizes could exhaust time or memory before the
# model's arrays are compared with the file's arrays.
SIZES = dict(
    input_size=4096,
    patch_size=1024,
    in_channels=1024,
    hidden_size=fields.MAX_SIZE,
    depth=fields.MAX_LAYERS,
    num_heads=fields.MAX_SIZE,
)


def write(
    workdir: pathlib.Path, out: pathlib.Path, step: int | None = None, raw: bool = False
) -> int:
    """Writes a workdir's DiT, f32, under the published names, and returns its step.

    The file's metadata hold the run's config without its paths.
    Args:
      out: a .safetensors file.
      step: the checkpoint; None selects the newest.
      raw: whether to export the trained parameters instead of their EMA.
    Raises: ValueError if the workdir has another model or `out` another suffix, or as
      `dit.check_model`; FileNotFoundError or OSError as `checkpoint.restore_params`; OSError if the
      file cannot be written.
    """
    cli.check_out(out, (".safetensors",), "DST=")
    config = workdirs.load_config(workdir)
    if config.model.name != "dit":
        raise UserError(f"{workdir} holds a {config.model.name!r}, not a 'dit'.")
    workdirs.check_draws_images(workdir, config)
    dit.check_model(config.model)  # before reading the parameters, which takes longer
    config.model.attention = "auto"  # the run's implementation may not work on this machine
    device_sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device_sharding),
        models.param_shapes(models.build(config.model)),
    )
    params, step = checkpoint.restore_params(workdir, shapes, step, raw)
    config_dict = _remove_paths(config.copy_and_resolve_references().to_dict())
    metadata = {METADATA_KEY: json.dumps(config_dict)}
    contents = safetensors.numpy.save(dit.to_published(params, config.model), metadata)
    try:
        files.replace(out, lambda file: file.write(contents))
    except OSError as error:
        raise UserFileError(f"cannot write {out}: {error}") from error
    return step


def read_config(path: pathlib.Path) -> ConfigDict | None:
    """Returns the config in a file's metadata, locked and without paths; None if there is none.

    Raises: ValueError if the config is not a DiT's, or a number in it is out of range.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            config_json = (file.metadata() or {}).get(METADATA_KEY)
    except safetensors.SafetensorError:
        return None  # the reader of the arrays reports the damage
    if config_json is None:
        return None
    shown = f"the config in {files.printable(path)}"
    config = json_files.parse_json(config_json, shown, DESCRIPTION)
    try:
        if isinstance(config, dict) and "model" in config:  # from any version of this project
            config = older_versions.complete(config, default.get_config("dit"))
        if invalid := _list_invalid(config):
            raise UserError(f"it has {fields.show(invalid)}.")
        workdirs.check_types(config)
        keys.check(config)
        diffusion.build(ConfigDict(config["diffusion"]))
    except (ValueError, AttributeError) as error:  # AttributeError: a key is missing
        raise UserError(
            f"{shown} cannot be used: {str(error).rstrip('.')}. It must be {DESCRIPTION}."
        ) from error
    return ConfigDict(_remove_paths(config)).lock()


def _remove_paths(config):
    """Returns the config, a dict, with every path empty."""
    config = dict(config)
    for key in (key for key, row in keys.KEYS.items() if row.is_path):
        section, _, name = key.rpartition(".")
        if not section:
            config[name] = ""
        elif isinstance(config.get(section), dict):
            config[section] = config[section] | {name: ""}
    data = config["data"]
    # A dataset's name is a path in all formats but TFDS, where it may be one.
    if data["source"] != "tfds" or not str(data["name"]).replace("_", "").isalnum():
        config["data"] = data | {"name": ""}
    return config


def _list_invalid(config):
    """Returns {key: value} of the keys that are missing, unknown or have an invalid value."""
    if not isinstance(config, dict):
        return {"config": config}
    sections = {name: config.get(name) for name in SECTIONS}
    if invalid := {name: value for name, value in sections.items() if not isinstance(value, dict)}:
        return invalid
    model, data = config["model"], config["data"]
    names = {"name"} | {field for field in DiT.__dataclass_fields__ if field != "parent"}
    invalid = {name: model.get(name, "missing") for name in names ^ model.keys()}
    for name, limit in SIZES.items():
        size = model.get(name)
        is_pair = f"model.{name}" in sizes.KEYS and isinstance(size, list) and sizes.is_size(size)
        if not all(fields.is_count(length, limit) for length in (size if is_pair else [size])):
            invalid[name] = size
    texts = {name: data.get(name) for name in ("source", "name")}
    return invalid | {name: value for name, value in texts.items() if not isinstance(value, str)}
