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

KEY = "dit_jax"  # its key in the file's metadata
WHAT = "what `convert dit-export` writes"
# Sections that an exported config must have.
SECTIONS = ("model", "data", "diffusion", "objective", "latents", "sample")
# Key of `config.model` -> its largest value. These sizes cost time or memory before the model's
# arrays are compared with the file's.
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
      step: None selects the newest.
      raw: whether to export the trained parameters instead of their EMA.
    Raises: ValueError if the workdir has another model or block, or `out` another suffix;
      FileNotFoundError or OSError as `checkpoint.restore_params`; OSError if the file cannot be
      written.
    """
    cli.check_out(out, (".safetensors",), "DST=")
    config = workdirs.load_config(workdir)
    if config.model.name != "dit":
        raise UserError(f"{workdir} holds a {config.model.name!r}, not a 'dit'.")
    workdirs.check_draws_images(workdir, config)
    dit.check_block(config.model)  # before reading the parameters, which takes longer
    config.model.attention = "auto"  # this machine may lack the run's kind of device
    device_sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device_sharding),
        models.param_shapes(models.build(config.model)),
    )
    params, step = checkpoint.restore_params(workdir, shapes, step, raw)
    config_dict = _without_paths(config.copy_and_resolve_references().to_dict())
    metadata = {KEY: json.dumps(config_dict)}
    contents = safetensors.numpy.save(dit.to_published(params, config.model), metadata)
    try:
        files.replace(out, lambda file: file.write(contents))
    except OSError as error:
        raise UserFileError(f"cannot write {out}: {error}") from error
    return step


def read(path: pathlib.Path) -> ConfigDict | None:
    """Returns the config in a file's metadata, locked and without paths; None if it has none.

    Raises: ValueError if it is not the config of a DiT, or a number is out of range.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
    except safetensors.SafetensorError:
        return None  # reading the arrays reports what is wrong with the file
    if text is None:
        return None
    shown = f"the config in {files.printable(path)}"
    config = json_files.parse_json(text, shown, WHAT)
    # The file may come from an older version of this project.
    if isinstance(config, dict) and "model" in config:
        try:
            config = older_versions.complete(config, default.get_config("dit"))
        except ValueError as error:
            raise UserError(
                f"{shown} cannot be read: {str(error).rstrip('.')}. It must be {WHAT}."
            ) from error
    if wrong := _find_wrong(config):
        raise UserError(f"{shown} has {fields.show(wrong)}: it must be {WHAT}.")
    try:
        workdirs.check_types(config)
        keys.check(config)
        diffusion.build(ConfigDict(config["diffusion"]))
    except (ValueError, AttributeError) as error:  # AttributeError: a key is missing
        raise UserError(f"{shown} cannot be used: {error} It must be {WHAT}.") from error
    return ConfigDict(_without_paths(config)).lock()


def _without_paths(config):
    """Returns the config, a dict, with empty paths."""
    config = dict(config)
    for key in (key for key, row in keys.KEYS.items() if row.is_path):
        section, _, name = key.rpartition(".")
        if not section:
            config[name] = ""
        elif isinstance(config.get(section), dict):
            config[section] = config[section] | {name: ""}
    data = config["data"]
    # The name of a TFDS dataset is kept. It may be a path too, as all other formats' names are.
    if data["source"] != "tfds" or not str(data["name"]).replace("_", "").isalnum():
        config["data"] = data | {"name": ""}
    return config


def _find_wrong(config):
    """Returns {key: value} of the fields that are missing, unknown or invalid."""
    if not isinstance(config, dict):
        return {"config": config}
    sections = {name: config.get(name) for name in SECTIONS}
    if wrong := {name: part for name, part in sections.items() if not isinstance(part, dict)}:
        return wrong
    model, data = config["model"], config["data"]
    names = {"name"} | {field for field in DiT.__dataclass_fields__ if field != "parent"}
    wrong = {name: model.get(name, "missing") for name in names ^ model.keys()}
    for name, most in SIZES.items():
        value = model.get(name)
        is_pair = f"model.{name}" in sizes.KEYS and isinstance(value, list) and sizes.is_size(value)
        if not all(fields.is_count(number, most) for number in (value if is_pair else [value])):
            wrong[name] = value
    return wrong | {n: data.get(n) for n in ("source", "name") if not isinstance(data.get(n), str)}
