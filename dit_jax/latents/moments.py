"""Moments that `dit_jax.encode` wrote, opened as a source of examples."""

import numpy as np

from dit_jax import conditions
from dit_jax.config import sizes
from dit_jax.data import sources, tfds_data
from dit_jax.errors import UserError
from dit_jax.system import files, schemas
from dit_jax.workdirs import identity

MAX_CHECKED = 256  # records whose size is compared with the recorded size


def open_split(config, split: str) -> sources.Source:
    """Opens the moments of one split, 'train' or 'eval'.

    Raises: FileNotFoundError if there is no such dataset; ValueError for an empty split, for
      moments whose shape the model does not take, or for moments that were scaled after encoding.
    """
    name = config.latents.moments
    build = "python -m dit_jax.encode --config ... --vae ... --out ..."
    builder = tfds_data.open_builder(name, config.data.data_dir, "moments", build)
    records, origin, shards = tfds_data.read_split(builder, split, "moments", build)
    if not len(records):
        raise UserError(f"{origin} is empty.")
    features, model = builder.info.features, config.model
    _check_shape(features, model, origin)
    metadata = dict(builder.info.metadata or {})
    # Moments that another program wrote have no metadata, so less of them can be checked.
    if metadata:
        check_metadata(metadata, model.in_channels, builder.data_dir)
    condition = conditions.build(config)
    annotations = condition.stored_annotations(features, metadata, builder.data_dir)
    # The names of the encoded images' classes, if they were recorded, else the dataset's own.
    classes = metadata.get("dataset", {}).get("train", {}).get("classes")
    count = getattr(features["label"], "num_classes", None) if "label" in features else None
    if classes and count and len(classes) != count:
        raise UserError(f"{origin} has {count} classes, but the names of {len(classes)}.")
    names = tuple(classes or ()) or tfds_data.read_class_names(builder, annotations.num_classes)
    source = sources.Source(
        records,
        "moments",
        sizes.image_shape(config.data),
        annotations,
        origin,
        views=2 if metadata.get("mirrored") else 1,
        metadata=metadata,
        class_names=names,
        files=shards,
        version=f"{builder.info.full_name} {split}",
    )
    # This check reads records, so it needs the opened source.
    if metadata:
        _check_scale(source, model.in_channels)
    return source


def _check_shape(features, model, origin):
    shape = tuple(features["moments"].shape)
    height, width, channels = sizes.input_shape(model)
    expected = (height, width, 2 * channels)
    if shape != expected:
        raise UserError(
            f"{origin} holds moments {shape}, but the model takes {expected}: [h, w, 2C] by "
            f"model.input_size={model.input_size}, model.in_channels={model.in_channels}."
        )


def _check_scale(source, channels):
    """Raises ValueError unless the means are as large as `dit_jax.encode` recorded.

    Means of another size may have been scaled since.
    """
    numbers = np.linspace(0, len(source) - 1, min(len(source), MAX_CHECKED)).astype(int)
    means = np.stack([source[i]["moments"] for i in numbers])[..., :channels]
    size, recorded = float(np.abs(means).mean(dtype=np.float64)), source.metadata["mean_absolute"]
    # A sample of the records differs a little from all of them, a scale such as 0.18 by far more.
    if not recorded / 1.25 < size < recorded * 1.25:
        raise UserError(
            f"the means in {source.origin} are {size:.3g} large on average, but were written as "
            f"{recorded:.3g}: they may have been scaled already. Encode the images again."
        )


def _are_numbers(value):
    """Returns whether a value is a list of finite numbers, at least one."""
    return schemas.list_of(schemas.is_number)(value) and len(value) > 0


METADATA = {
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "mean_absolute": schemas.is_positive,
    "vae_digest": schemas.is_string,
    "mirrored": schemas.is_bool,
    "published": lambda value: isinstance(value, list | None),
    "text_encoder_digest": schemas.optional(schemas.is_string),
}
OPTIONAL_METADATA = {"mirrored", "published", "text_encoder_digest"}


def check_metadata(metadata: dict, channels: int, name: object) -> None:
    """Raises unless the metadata of moments have the form that `dit_jax.encode` writes.

    Args:
      channels: the number of channels of the latents.
      name: the source of the metadata in messages.
    Raises: ValueError with the name and the key.
    """
    wrong = schemas.list_invalid_keys(metadata, METADATA, OPTIONAL_METADATA)
    wrong = wrong or [
        f"{key} has {len(metadata[key])} numbers, not {channels}"
        for key in ("mean", "std")
        if len(metadata[key]) != channels
    ]
    if wrong:
        raise UserError(
            f"{files.printable(name)} holds no moments as dit_jax.encode writes them: "
            f"{', '.join(wrong)}."
        )
    identity.check_identities(metadata.get("dataset", {}), name)
