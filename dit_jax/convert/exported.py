"""The config that `dit-export` writes into the metadata of a .safetensors file, and reads back."""

import json
import pathlib

import safetensors
from ml_collections import ConfigDict

from dit_jax import diffusion, workdirs
from dit_jax.config import ranges
from dit_jax.convert import fields
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.system import files, json_files
from dit_jax.workdirs import older_versions

KEY = "dit_jax"  # in the file's metadata
WHAT = "what `convert dit-export` writes"
SECTIONS = ("model", "data", "diffusion", "objective", "latents", "sample")
# Sections and keys of directories and files, which are of one machine.
PLACES = (
    ("data", "data_dir"),
    ("latents", "vae"),
    ("latents", "moments"),
    ("text", "encoder"),
    ("fid", "reference"),
    ("fid", "weights"),
)
# Sizes of the model that cost time or memory before its arrays are compared, and the most of each.
SIZES = dict(
    input_size=4096,
    patch_size=1024,
    in_channels=1024,
    hidden_size=fields.MOST,
    depth=fields.MOST_LAYERS,
    num_heads=fields.MOST,
)


def to_json(config: ConfigDict) -> str:
    """JSON of a config, without the places of this machine."""
    return json.dumps(_without_places(config.copy_and_resolve_references().to_dict()))


def read(path: pathlib.Path) -> ConfigDict | None:
    """The config in a file's metadata, locked and without places; None where there is none.

    Raises: ValueError for what is no config of a DiT, and for numbers out of their range.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
    except safetensors.SafetensorError:
        return None  # reading its arrays says what is wrong
    if text is None:
        return None
    shown = f"the config in {files.printable(path)}"
    config = json_files.parse_json(text, shown, WHAT)
    if isinstance(config, dict) and "model" in config:
        try:
            config = older_versions.complete(config)
        except ValueError as error:
            raise UserError(f"{shown} cannot be read: {error}. It must be {WHAT}.") from error
    if wrong := _wrong(config):
        raise UserError(f"{shown} has {fields.show(wrong)}: it must be {WHAT}.")
    try:
        workdirs.check_types(config)
        ranges.check(config)
        diffusion.build(ConfigDict(config["diffusion"]))
    except (ValueError, AttributeError) as error:  # the latter without keys
        raise UserError(f"{shown} cannot be used: {error} It must be {WHAT}.") from error
    return ConfigDict(_without_places(config)).lock()


def _without_places(config):
    config = config | {"init_from": ""}
    for section, key in PLACES:
        if isinstance(config.get(section), dict):
            config[section] = config[section] | {key: ""}
    data = config["data"]
    if data["source"] == "folder" or not str(data["name"]).replace("_", "").isalnum():
        config["data"] = data | {"name": ""}
    return config


def _wrong(config):
    """{key: value} of what no exported config has."""
    if not isinstance(config, dict):
        return {"config": config}
    sections = {name: config.get(name) for name in SECTIONS}
    if wrong := {name: part for name, part in sections.items() if not isinstance(part, dict)}:
        return wrong
    model, data = config["model"], config["data"]
    names = {"name"} | {field for field in dit.DiT.__dataclass_fields__ if field != "parent"}
    wrong = {name: model.get(name, "missing") for name in names ^ model.keys()}
    wrong |= {
        n: model.get(n) for n, most in SIZES.items() if not fields.is_count(model.get(n), most)
    }
    return wrong | {n: data.get(n) for n in ("source", "name") if not isinstance(data.get(n), str)}
