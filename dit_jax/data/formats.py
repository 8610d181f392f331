"""The formats of image datasets by name: `config.data.source` chooses one.

A format is a module with a function open_split(data_config, split, annotations), which returns a
`Source`. A new format needs a module, a row of FORMATS, and its name in configs/default.py.
"""

from dit_jax.data import folders, sources, tfds_data
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError, check_choice

FORMATS = {"tfds": tfds_data, "folder": folders}


def open_images(config, split: str, annotations: Annotations | None = None) -> sources.Source:
    """Opens the images of one split of `config.data`.

    `conditions.open_images` passes the annotations of the config's model.
    Raises: FileNotFoundError if the dataset does not exist, with the command to build it;
      ValueError for an empty name, an empty or unknown split, or an unknown config value; as
      the open_split of the format.
    """
    data = config.data
    if not data.name:
        raise UserError(
            "data.name is empty: this config names no images. For a new run, give "
            "--config.data.name=NAME. For a converted model, set data.source, data.name and "
            "data.caption_feature in the config.json of its workdir."
        )
    if data.image_channels not in (1, 3):
        raise UserError(f"{data.image_channels=} must be 1 (grey) or 3 (RGB).")
    check_choice("data.source", data.source, FORMATS)
    source = FORMATS[data.source].open_split(data, split, annotations or Annotations())
    if not len(source):
        raise UserError(f"{source.origin} is empty.")
    return source
