"""Opens moments that `dit_jax.encode` wrote as a source of examples."""

import numpy as np

from dit_jax import conditions
from dit_jax.config import sizes
from dit_jax.data import sources, tfds_data
from dit_jax.errors import UserError
from dit_jax.system import files, schemas
from dit_jax.workdirs import identity

MAX_CHECKED = 256  # records whose means are compared with the metadata


def open_split(config, split: str) -> sources.Source:
    """Opens a split of the moments, 'train' or 'eval'.

    Raises: FileNotFoundError if there is no such dataset; ValueError for an empty split, for
      moments of another shape than the model takes, or for moments that were scaled later.
    """
    name = config.latents.moments
    build = "python -m dit_jax.encode --config ... --vae ... --out ..."
    builder = tfds_data.open_builder(name, config.data.data_dir, "moments", build)
    records, origin, shards = tfds_data.read_split(builder, split, build)
    if not len(records):
        raise UserError(f"{origin} is empty.")
    features, model = builder.info.features, config.model
    _check_shape(features, model, origin)
    metadata = dict(builder.info.metadata or {})
    # Moments of other programs have no metadata, and fewer checks.
    if metadata:
        check_metadata(metadata, model.in_channels, builder.data_dir)
    condition = conditions.build(config)
    annotations = condition.stored_annotations(features, metadata, builder.data_dir)
    class_names = _read_class_names(builder, metadata, annotations.num_classes, origin)
    source = sources.Source(
        records,
        "moments",
        sizes.image_shape(config.data),
        annotations,
        origin,
        views=2 if metadata.get("mirrored") else 1,
        metadata=metadata,
        class_names=class_names,
        files=shards,
        version=f"{builder.info.full_name} {split}",
    )
    # The check reads records, so it needs the opened source.
    if metadata:
        _check_scale(source, model.in_channels)
    return source


def _check_shape(features, model, origin):
    shape = tuple(features["moments"].shape)
    *size, channels = sizes.input_shape(model)
    expected = (*size, 2 * channels)
    if shape != expected:
        raise UserError(
            f"{origin} holds moments {sizes.show(shape)}, but the model takes "
            f"{sizes.show(expected)}. Set model.input_size and model.in_channels."
        )


def _read_class_names(builder, metadata, num_classes, origin):
    """Returns the class names in the metadata or else in the dataset; None without names."""
    names = metadata.get("dataset", {}).get("train", {}).get("classes")
    if not names:
        return tfds_data.read_class_names(builder, num_classes)
    features = builder.info.features
    count = getattr(features["label"], "num_classes", None) if "label" in features else None
    if count and len(names) != count:
        raise UserError(f"{origin} has {count} classes, but {len(names)} class names.")
    return tuple(names)


def _check_scale(source, channels):
    """Raises ValueError unless the means are about as large as the metadata say."""
    indices = np.linspace(0, len(source) - 1, min(len(source), MAX_CHECKED)).astype(int)
    means = np.stack([source[i]["moments"] for i in indices])[..., :channels]
    mean_absolute = float(np.abs(means).mean(dtype=np.float64))
    recorded = source.metadata["mean_absolute"]
    # A sample of the records differs a little from all records; a scale of 0.18 differs far more.
    if not recorded / 1.25 < mean_absolute < recorded * 1.25:
        raise UserError(
            f"the means in {source.origin} have size {mean_absolute:.3g} on average, but had "
            f"{recorded:.3g} when they were written: they may have been scaled already. Encode the "
            "images again."
        )


def _are_numbers(value):
    """Returns whether a value is a list of one or more finite numbers."""
    return schemas.list_of(schemas.is_number)(value) and len(value) > 0


# The checks of the metadata's values. A dataset may also have other keys.
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
      channels: of the latents.
      name: of the dataset, for messages.
    Raises: ValueError with the name and the key.
    """
    problems = schemas.list_invalid_keys(metadata, METADATA, OPTIONAL_METADATA)
    problems = problems or [
        f"{key} has {len(metadata[key])} numbers, not {channels}"
        for key in ("mean", "std")
        if len(metadata[key]) != channels
    ]
    if problems:
        raise UserError(
            f"{files.printable(name)} has other metadata than dit_jax.encode writes: "
            f"{', '.join(problems)}. Encode the images again."
        )
    identity.check_identities(metadata.get("dataset", {}), name)
