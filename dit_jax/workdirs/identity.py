"""Identity of a dataset: a record of the data behind a run, moments or a reference.

The identity is saved and compared when the data are opened again. It has the number of examples,
the class names in order, digests of the names and sizes of the files in order, of the times of
their last change, and of their contents. The times are ctimes, which programs cannot set. Equal
times prove that nothing has changed; otherwise the contents are compared. For large datasets only
a sample of the contents is read. A run records its identities in data.json and in every checkpoint.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping

import jax
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


def _is_classes(value):
    """Returns whether a value is None or a list of distinct strings, at least one."""
    is_texts = schemas.list_of(schemas.is_string)
    return value is None or (is_texts(value) and len(set(value)) == len(value) > 0)


# The fields of an identity. Digests are None for what the dataset does not have.
IDENTITY: Mapping[str, schemas.Check] = {
    "num_examples": schemas.is_count,
    "version": schemas.optional(schemas.is_string),
    "classes": _is_classes,
    "labels": schemas.optional(schemas.is_string),
    "captions": schemas.optional(schemas.is_string),
    "files": schemas.optional(schemas.is_string),
    "times": schemas.optional(schemas.is_string),
    "contents": schemas.optional(schemas.is_string),
    "bytes_read": schemas.is_count,
}
# The fields that describe the images themselves, for `digest`.
IMAGE_FIELDS = ("num_examples", "version", "labels", "captions", "files", "contents")


def identify(source: sources.Source, recorded: dict | None = None) -> dict:
    """Returns the identity of a split as a JSON value.

    Args:
      recorded: an earlier identity. If nothing else has changed, its contents digest is reused.
    Raises: OSError if a file cannot be read.
    """
    names, sizes, times = source.files.names, source.files.sizes, source.files.times
    if (ranges := source.files.ranges) is not None:
        names = [[name, *records] for name, records in zip(names, ranges, strict=True)]
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
    # ctimes are among the compared values, so if all are equal the contents are too.
    if recorded and all(recorded.get(key) == value for key, value in identity.items()):
        return identity | {key: recorded[key] for key in ("contents", "bytes_read")}
    contents, bytes_read = _read_contents(source.files)
    return identity | {"contents": contents, "bytes_read": bytes_read}


def _read_contents(split_files):
    """Returns (digest of the contents or of a sample of them, number of bytes read)."""
    # Deterministic, so that two identities of the same data sample the same blocks.
    whole = split_files.sizes.sum() <= READ_WHOLE_BYTES
    digest, bytes_read = hashlib.sha256(), 0
    num_files = len(split_files.names)
    count = num_files if whole else min(num_files, MAX_FILES)
    for i in np.linspace(0, num_files - 1, count).astype(int):
        size = int(split_files.sizes[i])
        with split_files.path(i).open("rb") as file:
            if whole or size <= 3 * BLOCK_BYTES:
                starts, length = [0], size
            else:
                starts, length = [0, (size - BLOCK_BYTES) // 2, size - BLOCK_BYTES], BLOCK_BYTES
            for start in starts:
                file.seek(start)
                block = file.read(length)
                # With its length, so that bytes moved from one block to the next change the digest.
                digest.update(len(block).to_bytes(8, "little") + block)
                bytes_read += len(block)
    return digest.hexdigest()[:16], bytes_read


def identify_contents(source: sources.Source) -> dict:
    """Returns the identity of a split so that copies of small datasets have equal identities.

    If all contents were read, the times are left out; otherwise the result is that of `identify`.
    Raises: OSError if a file cannot be read.
    """
    identity = identify(source)
    if source.files.sizes.sum() <= READ_WHOLE_BYTES:
        del identity["times"]
    return identity


def digest(identity: dict) -> str:
    """Returns a digest of an identity, 16 hexadecimal digits, from its IMAGE_FIELDS.

    The times of the files and the class names are not part of it.
    """
    return digests.digest_json({key: identity[key] for key in IMAGE_FIELDS})


def describe_changes(recorded: dict, now: dict) -> list[str]:
    """Returns the differences between two identities in words; [] if the data are the same.

    Values that are missing in one of them are not compared, such as labels or class names.
    """

    def differs(key):
        values = recorded.get(key), now.get(key)
        return None not in values and values[0] != values[1]

    changes = [
        f"{key.replace('_', ' ')}: then {recorded[key]}, now {now[key]}"
        for key in ("num_examples", "version")
        if differs(key)
    ]
    if differs("classes"):
        changes.append(_compare_classes(recorded["classes"], now["classes"]))
    # With other names or sizes, a difference of the contents says nothing new.
    if differs("files"):
        changes.append("names or sizes of files differ")
    elif differs("contents"):
        changes.append("contents of files differ, of the same names and sizes")
    return changes + [f"{key} of images differ" for key in ("labels", "captions") if differs(key)]


def _compare_classes(recorded, now):
    """Returns the first difference between two different lists of class names, in words."""
    if len(recorded) != len(now):
        return f"number of classes: then {len(recorded)}, now {len(now)}"
    i = next(i for i, pair in enumerate(zip(recorded, now, strict=True)) if pair[0] != pair[1])
    then, today = (files.printable(names[i]) for names in (recorded, now))
    return f"name of class {i}: then '{then}', now '{today}'"


def check(source: sources.Source, recorded: dict | None, owner: str) -> dict:
    """Returns the identity of a split, or raises if it differs from the recorded identity.

    Args:
      recorded: the recorded identity, or None if there is none.
      owner: what was made from the data, such as 'the run in DIR', for messages.
    Raises: ValueError with the differences.
    """
    now, size = identify(source, recorded), int(source.files.sizes.sum())
    if not recorded:
        return now
    if changes := describe_changes(recorded, now):
        raise UserError(
            f"{source.origin} is not what {owner} was begun with:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "Restore it as it was, or begin anew in another directory."
        )
    # A sample of the contents proves less than equal times, so the user is told.
    if now["bytes_read"] < size and recorded.get("times", now["times"]) != now["times"]:
        logger.warning(
            "files of %s were copied or changed since %s was begun: of their %s bytes %s were "
            "compared, and are as then.",
            source.origin,
            owner,
            f"{size:,}",
            f"{now['bytes_read']:,}",
        )
    # Recorded names are kept even if the dataset has no names now.
    return now | {"classes": _keep_names(source, recorded.get("classes"), now["classes"])}


def _keep_names(source, recorded, now):
    """Returns the recorded class names, or the current ones if none are recorded.

    Warns if only one of the two has names.
    """
    if recorded and not now:
        logger.warning(
            "%s has no names of classes now; those of then are kept: %s",
            source.origin,
            files.list_some(recorded),
        )
    if now and not recorded:
        logger.warning(
            "the classes of %s have had no names; now: %s", source.origin, files.list_some(now)
        )
    return recorded or now


def check_splits(splits: Mapping[str, sources.Source], workdir: pathlib.Path) -> dict:
    """Returns the identities of a run's data, or raises if the data differ from the recorded ones.

    All processes must call this; the first one reads the files.

    Args:
      splits: {'train': source, 'eval': source}, or one of them.
    Returns: {split: identity}; for moments also 'images', the identities of the encoded images.
    Raises: ValueError with the differences, in all processes.
    """

    def check_all():
        # Only the first process reads the files; the others get its result below.
        if jax.process_index() != 0:
            return None
        saved = checkpoint_files.saved_steps(
            workdir
        )  # before the first checkpoint the data may change
        recorded = load_data(workdir) if saved else {}
        if saved and not recorded:
            logger.warning(
                "%s has no record of its data but their number: see that they are as then.", workdir
            )
        now = {
            name: check(source, recorded.get(name), f"the run in {workdir}")
            for name, source in splits.items()
        }
        metadata = next(iter(splits.values())).metadata
        images = {"images": metadata["dataset"]} if "dataset" in metadata else {}
        return {**recorded, **now, **images}

    # As text, because that is what broadcast_text can send to the other processes.
    text = json.dumps(sharding.in_every_process(check_all))
    return json.loads(sharding.broadcast_text(text))


def get_training_images(data: dict) -> dict | None:
    """Returns the identity of a run's training images, or None if it is not recorded.

    For a run on moments, it is the identity of the images that were encoded. `load_data` returns
    the data.
    """
    return data.get("images", data).get("train")


def write_data(workdir: pathlib.Path, data: dict) -> None:
    """Writes data.json: {split: identity} of the data that the run is trained on.

    All processes must call this; the first one writes.
    Raises: OSError, in all processes.
    """
    path, text = workdir / "data.json", json.dumps(digests.with_digest(data), indent=1) + "\n"
    sharding.in_first_process(
        lambda: files.replace_text(path, text), f"cannot write to the workdir {workdir}"
    )


def load_data(workdir: pathlib.Path) -> dict:
    """Returns the data that `write_data` wrote, from data.json or else from a checkpoint.

    If data.json is missing or damaged, the newest checkpoint with a readable copy is used.
    Returns: {split: identity}; {} if the workdir was converted, or written by an older version.
    Raises: files.LostError if the workdir does not exist, because it was moved.
    """
    # Otherwise a workdir that was moved would look like one without records.
    files.Directory(workdir)
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

    A run on moments also has 'images', which holds {split: identity} of the encoded images. The
    metadata of moments have identities without times.
    Raises: ValueError with the name of the file and the wrong keys.
    """
    if not isinstance(value, dict):
        raise UserError(f"{files.printable(name)} holds no identities of datasets.")
    for split, identity in value.items():
        if split == "images":
            check_identities(identity, f"{name}: {split}")
            continue
        wrong = ["no object"]
        if isinstance(identity, dict):
            wrong = schemas.list_invalid_keys(identity, IDENTITY, {"times"})
        if wrong:
            shown = files.printable(f"{name}: {split}")
            raise UserError(f"{shown} holds no identity of a dataset: {', '.join(wrong)}.")
