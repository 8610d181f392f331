"""What is kept on disk about a dataset, in JSON: its form is checked when it is read again.

Disks damage such files, and strangers write them.
"""

import hashlib
import json
from collections.abc import Mapping

from dit_jax.errors import UserError
from dit_jax.system import files, forms


def digest(values: object) -> str:
    """Returns 16 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def with_digest(values: dict) -> dict:
    """Returns the values with a digest of them."""
    return values | {"digest": digest(values)}


def without_digest(values: object, name: object) -> dict:
    """Returns the values without their digest; older versions wrote none.

    Raises: ValueError if the digest is of other values.
    """
    if isinstance(values, dict):
        others = {key: value for key, value in values.items() if key != "digest"}
        if values.get("digest", digest(others)) == digest(others):
            return others
    raise UserError(f"{files.printable(name)} is not as it was written")


_is_text = forms.optional(forms.is_text)


def _is_classes(value):
    texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or (texts and len(set(value)) == len(value) > 0)


def _are_numbers(value):
    return isinstance(value, list) and len(value) > 0 and all(map(forms.is_number, value))


IDENTITY: Mapping[str, forms.Holds] = {
    "num_examples": forms.is_count,
    "version": _is_text,
    "classes": _is_classes,
    "labels": _is_text,
    "captions": _is_text,
    "files": _is_text,
    "times": _is_text,
    "contents": _is_text,
    "bytes_read": forms.is_count,
}


def check_identity(value: object, name: object) -> None:
    """Demands the form of `identity.identify`'s result.   Raises: ValueError with the name."""
    _check(value, IDENTITY, {"times"}, f"{files.printable(name)} holds no identity of a dataset")


def check_identities(value: object, name: object) -> None:
    """Demands identities by split; in 'images' of a run on moments again.   Raises: ValueError."""
    if not isinstance(value, dict):
        raise UserError(f"{files.printable(name)} holds no identities of datasets")
    for split, one in value.items():
        (check_identities if split == "images" else check_identity)(one, f"{name}: {split}")


MOMENTS: Mapping[str, forms.Holds] = {
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "mean_absolute": forms.is_positive,
    "vae_digest": forms.is_text,
    "mirrored": forms.is_flag,
}


def check_moments(metadata: dict, channels: int, name: object) -> None:
    """Demands the form of what `dit_jax.encode` records beside moments of so many channels.

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
    if not isinstance(value, dict):
        raise UserError(f"{problem}.")
    if wrong := forms.wrong_keys(value, form, optional):
        raise UserError(f"{problem}: {', '.join(wrong)}.")
