"""Format checks for what is stored about datasets in JSON: identities and moments' metadata.

The files may be damaged on disk or come from elsewhere, so they are checked when they are read.
"""

import hashlib
import json

from dit_jax.errors import UserError
from dit_jax.system import files, schemas


def digest(values: object) -> str:
    """Returns a digest of a JSON value: the first 16 hexadecimal digits of its SHA-256."""
    # Keys are sorted, so that the digest does not depend on their order.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def with_digest(values: dict) -> dict:
    """Returns the values with their digest under the key 'digest'."""
    return values | {"digest": digest(values)}


def without_digest(values: object, name: object) -> dict:
    """Returns the values without their digest, after comparing it.

    Args:
      name: the source of the values in messages.
    Raises: ValueError if the digest does not match the values.
    """
    if isinstance(values, dict):
        # Older versions wrote no digest; such values are accepted as they are.
        others = {key: value for key, value in values.items() if key != "digest"}
        if values.get("digest", digest(others)) == digest(others):
            return others
    raise UserError(f"{files.printable(name)} is not as it was written")


_is_text = schemas.optional(schemas.is_string)


def _is_classes(value):
    """Returns whether a value is None or a list of distinct strings, at least one."""
    texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or (texts and len(set(value)) == len(value) > 0)


def _are_numbers(value):
    """Returns whether a value is a list of finite numbers, at least one."""
    return isinstance(value, list) and len(value) > 0 and all(map(schemas.is_number, value))


# The fields of an identity; `workdirs.identity` explains them.
IDENTITY: schemas.Schema = {
    "num_examples": schemas.is_count,
    "version": _is_text,
    "classes": _is_classes,
    "labels": _is_text,
    "captions": _is_text,
    "files": _is_text,
    "times": _is_text,
    "contents": _is_text,
    "bytes_read": schemas.is_count,
}


def check_identity(value: object, name: object) -> None:
    """Raises unless a value has the form of the result of `identity.identify`.

    Args:
      name: the source of the value in messages.
    Raises: ValueError with the name and the wrong keys.
    """
    # The metadata of moments has identities without times.
    _check(value, IDENTITY, {"times"}, f"{files.printable(name)} holds no identity of a dataset")


def check_identities(value: object, name: object) -> None:
    """Raises unless a value is {split: identity}.

    A run on moments also has 'images', which holds {split: identity} of the encoded images.
    Raises: ValueError with the name.
    """
    if not isinstance(value, dict):
        raise UserError(f"{files.printable(name)} holds no identities of datasets")
    for split, one in value.items():
        (check_identities if split == "images" else check_identity)(one, f"{name}: {split}")


# The fields of a metadata file of moments.
MOMENTS: schemas.Schema = {
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "mean_absolute": schemas.is_positive,
    "vae_digest": schemas.is_string,
    "mirrored": schemas.is_bool,
}


def check_moments(metadata: dict, channels: int, name: object) -> None:
    """Raises unless the metadata of moments has the form that `dit_jax.encode` writes.

    Args:
      channels: the number of channels of the latents.
      name: the source of the metadata in messages.
    Raises: ValueError with the name and the key.
    """
    problem = f"{files.printable(name)} holds no moments as dit_jax.encode writes them"
    _check(metadata, MOMENTS, {"mirrored"}, problem)
    for key in ("mean", "std"):
        if len(metadata[key]) != channels:
            raise UserError(f"{problem}: {key} has {len(metadata[key])} numbers, not {channels}.")
    if not isinstance(metadata.get("published"), list | None):
        raise UserError(f"{problem}: published.")
    if not _is_text(metadata.get("text_encoder_digest")):
        raise UserError(f"{problem}: text_encoder_digest.")
    check_identities(metadata.get("dataset", {}), name)


def _check(value, form, optional, problem):
    """Raises a ValueError with `problem` and the wrong keys, unless value is an object of a form.

    Args:
      form: {key: test of its value}.
      optional: the keys that may be missing.
    """
    if not isinstance(value, dict):
        raise UserError(f"{problem}.")
    if wrong := schemas.invalid_keys(value, form, optional):
        raise UserError(f"{problem}: {', '.join(wrong)}.")
