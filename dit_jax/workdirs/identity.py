"""Identities of datasets: records of the data behind a run, moments or a reference.

An identity is saved, and compared when the data are opened again. Its fields are in IDENTITY. Its
digests are of the names and sizes of the files in order, of the times of their last change, and of
their contents. The times are ctimes, which programs cannot set. Equal times prove that nothing has
changed; otherwise the contents are compared. Of large datasets only a sample is read.
A run records its identities in data.json and in every checkpoint.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping

import numpy as np

from dit_jax import sharding
from dit_jax.data import sources
from dit_jax.errors import UserError
from dit_jax.system import files, json_files, schemas
from dit_jax.workdirs import checkpoint_files, digests

logger = logging.getLogger("dit_jax")

# Datasets of at most READ_WHOLE_BYTES are read completely. For larger ones, MAX_FILES evenly spaced
# files are sampled, each with a block at its start, its middle and its end.
READ_WHOLE_BYTES, BLOCK_BYTES, MAX_FILES = 256 * 2**20, 2**16, 1024


def _is_class_names(value):
    """Returns whether a value is a list of distinct strings, at least one."""
    return schemas.list_of(schemas.is_string)(value) and len(set(value)) == len(value) > 0


# The fields of an identity. A field is None if the dataset has no such part.
IDENTITY: Mapping[str, schemas.Check] = {
    "num_examples": schemas.is_count,
    "version": schemas.optional(schemas.is_string),
    "classes": schemas.optional(_is_class_names),
    "labels": schemas.optional(schemas.is_string),
    "captions": schemas.optional(schemas.is_string),
    "files": schemas.optional(schemas.is_string),
    "times": schemas.optional(schemas.is_string),
    "contents": schemas.optional(schemas.is_string),
    "bytes_read": schemas.is_count,
}
# The fields that `digest` covers: they do not depend on times and class names.
IMAGE_FIELDS = ("num_examples", "version", "labels", "captions", "files", "contents")


def identify(source: sources.Source, recorded: dict | None = None) -> dict:
    """Returns the identity of a split as a JSON value.

    Args: recorded, an earlier identity. If all other fields are equal, its contents digest is
      reused.
    Raises: OSError if a file cannot be read.
    """
    names, sizes, times = source.files.names, source.files.sizes, source.files.times
    if (ranges := source.files.ranges) is not None:
        names = [[name, *record_range] for name, record_range in zip(names, ranges, strict=True)]
    # Labels and captions that are in the files are covered by the contents digest.
    labels, captions = source.files.labels, source.files.captions
    identity = {
        "num_examples": len(source) // source.views,
        "version": source.version,
        "classes": None if source.class_names is None else list(source.class_names),
        "labels": None if labels is None else digests.digest_json([np.asarray(labels).tolist()]),
        "captions": None if captions is None else digests.digest_json([list(captions)]),
        "files": digests.digest_json([list(names), sizes.tolist()]),
        "times": digests.digest_json([times.tolist()]),
    }
    # The times are among the compared fields, so the contents are equal if all fields are.
    if recorded and all(recorded.get(key) == value for key, value in identity.items()):
        return identity | {key: recorded[key] for key in ("contents", "bytes_read")}
    contents, bytes_read = _read_contents(source.files)
    return identity | {"contents": contents, "bytes_read": bytes_read}


def _read_contents(split_files):
    """Returns (digest of the contents or of a sample of them, number of bytes read)."""
    # Deterministic, so that two identities of the same data sample the same blocks.
    reads_whole = split_files.sizes.sum() <= READ_WHOLE_BYTES
    digest, bytes_read = hashlib.sha256(), 0
    num_files = len(split_files.names)
    num_sampled = num_files if reads_whole else min(num_files, MAX_FILES)
    for i in np.linspace(0, num_files - 1, num_sampled).astype(int):
        size = int(split_files.sizes[i])
        starts, length = [0], size
        if not reads_whole and size > 3 * BLOCK_BYTES:
            starts, length = [0, (size - BLOCK_BYTES) // 2, size - BLOCK_BYTES], BLOCK_BYTES
        with split_files.path(i).open("rb") as file:
            for start in starts:
                file.seek(start)
                block = file.read(length)
                # The length is digested too: bytes moved to the next block change the digest.
                digest.update(len(block).to_bytes(8, "little") + block)
                bytes_read += len(block)
    return digest.hexdigest()[:16], bytes_read


def identify_contents(source: sources.Source) -> dict:
    """Returns the identity of a split, without times if all contents were read.

    So copies of a small dataset have equal identities.
    Raises: OSError if a file cannot be read.
    """
    identity = identify(source)
    if source.files.sizes.sum() <= READ_WHOLE_BYTES:
        del identity["times"]
    return identity


def digest(identity: dict) -> str:
    """Returns a digest of the IMAGE_FIELDS of an identity, 16 hexadecimal digits."""
    return digests.digest_json({key: identity[key] for key in IMAGE_FIELDS})


def describe_changes(recorded: dict, current: dict) -> list[str]:
    """Describes the differences between two identities; returns [] if the data are the same.

    Fields that are missing in either identity, such as labels or class names, are not compared.
    """

    def differs(key):
        values = recorded.get(key), current.get(key)
        return None not in values and values[0] != values[1]

    changes = [
        f"{key.replace('_', ' ')}: then {recorded[key]}, now {current[key]}"
        for key in ("num_examples", "version")
        if differs(key)
    ]
    if differs("classes"):
        changes.append(_compare_classes(recorded["classes"], current["classes"]))
    # If names or sizes differ, the contents differ too, which is no news.
    if differs("files"):
        changes.append("names or sizes of files differ")
    elif differs("contents"):
        changes.append("contents of files differ, of the same names and sizes")
    return changes + [f"{key} of images differ" for key in ("labels", "captions") if differs(key)]


def _compare_classes(recorded, current):
    """Describes the first difference between two lists of class names."""
    if len(recorded) != len(current):
        return f"number of classes: then {len(recorded)}, now {len(current)}"
    pairs = enumerate(zip(recorded, current, strict=True))
    i, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return f"name of class {i}: then '{files.printable(old)}', now '{files.printable(new)}'"


def check(source: sources.Source, recorded: dict | None, owner: str) -> dict:
    """Returns the identity of a split, which must match the recorded identity if there is one.

    Args: owner, what was made from the data, such as 'the run in DIR', for messages.
    Raises: ValueError with the differences.
    """
    current, num_bytes = identify(source, recorded), int(source.files.sizes.sum())
    if not recorded:
        return current
    if changes := describe_changes(recorded, current):
        raise UserError(
            f"{source.origin} is not what {owner} was begun with:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "Restore it as it was, or begin anew in another directory."
        )
    # A sample of the contents proves less than equal times, so the user is warned.
    times_differ = recorded.get("times", current["times"]) != current["times"]
    if current["bytes_read"] < num_bytes and times_differ:
        logger.warning(
            "files of %s were copied or changed since %s was begun. Of their %s bytes %s were "
            "compared; these have not changed.",
            source.origin,
            owner,
            f"{num_bytes:,}",
            f"{current['bytes_read']:,}",
        )
    classes = _choose_class_names(source, recorded.get("classes"), current["classes"])
    return current | {"classes": classes}


def _choose_class_names(source, recorded, current):
    """Returns the recorded class names, or the current ones if none are recorded.

    Warns if only one of the two has names.
    """
    if recorded and not current:
        message = "the classes of %s have no names now; the recorded names are kept: %s"
        logger.warning(message, source.origin, files.list_some(recorded))
    if current and not recorded:
        message = "the classes of %s had no names before; their names now: %s"
        logger.warning(message, source.origin, files.list_some(current))
    return recorded or current


def check_splits(splits: Mapping[str, sources.Source], workdir: pathlib.Path) -> dict:
    """Returns the identities of a run's data, which must match the recorded identities.

    All processes must call this function; the first one reads the files.
    Args: splits, {'train': source, 'eval': source} or one of the two.
    Returns: {split: identity}; for moments also 'images', the identities of the encoded images.
    Raises: ValueError with the differences, in all processes.
    """

    def check_all():
        # Before the first checkpoint the data may change.
        saved = checkpoint_files.saved_steps(workdir)
        recorded = load_data(workdir) if saved else {}
        if saved and not recorded:
            message = "%s has no identities of its data: make sure that the data are the same."
            logger.warning(message, workdir)
        identities = {
            split: check(source, recorded.get(split), f"the run in {workdir}")
            for split, source in splits.items()
        }
        metadata = next(iter(splits.values())).metadata
        images = {"images": metadata["dataset"]} if "dataset" in metadata else {}
        return {**recorded, **identities, **images}

    return sharding.broadcast_result(check_all)


def get_training_images(data: dict) -> dict | None:
    """Returns the identity of a run's training images, or None if it is not recorded.

    For a run on moments, these are the images that were encoded.
    Args: data, from `load_data`.
    """
    return data.get("images", data).get("train")


def write_data(workdir: pathlib.Path, data: dict) -> None:
    """Writes data.json: {split: identity} of the data that the run is trained on.

    All processes must call this function; the first one writes.
    Raises: OSError, in all processes.
    """
    path, text = workdir / "data.json", json.dumps(digests.with_digest(data), indent=1) + "\n"
    sharding.in_first_process(
        lambda: files.replace_text(path, text), f"cannot write to the workdir {workdir}"
    )


def load_data(workdir: pathlib.Path) -> dict:
    """Returns {split: identity}, which `write_data` wrote, from data.json.

    If data.json is missing or damaged, the newest checkpoint with a readable copy is used. The
    result is {} if the workdir was converted, or written by an older version.
    Raises: files.LostError if the workdir does not exist, because it was moved.
    """
    files.Directory(workdir)  # raises for a moved workdir, which would look like one without data
    path = workdir / "data.json"
    for candidate in [path, *checkpoint_files.newest_first(workdir, "data")]:
        try:
            data = json_files.read_json(candidate, "the identities of a run's data")
            # Only data.json contains a digest of its values.
            data = digests.without_digest(data, path) if candidate == path else data.get("data", {})
            check_identities(data, candidate)
            return data
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s is not used: %s", candidate.relative_to(workdir), error)
    return {}


def check_identities(value: object, name: object) -> None:
    """Raises unless a value from a file is {split: identity}.

    A run on moments also has 'images', {split: identity} of the encoded images. The identities in
    the metadata of moments have no times.
    Raises: ValueError with the name of the file and the invalid keys.
    """
    if not isinstance(value, dict):
        raise UserError(f"{files.printable(name)} holds no identities of datasets.")
    for split, identity in value.items():
        if split == "images":
            check_identities(identity, f"{name}: {split}")
            continue
        invalid = ["no object"]
        if isinstance(identity, dict):
            invalid = schemas.list_invalid_keys(identity, IDENTITY, {"times"})
        if invalid:
            shown = files.printable(f"{name}: {split}")
            raise UserError(f"{shown} holds no identity of a dataset: {', '.join(invalid)}.")
