"""The identity of a dataset: what a run, moments or a reference was made of, compared later.

It holds the number of examples, the classes' names in order, names and sizes of the files in
order, the times of their last change, and a digest of their contents. The times are those that no
program can set (ctime): equal ones prove that nothing has changed, else the contents decide. Of
large datasets a sample of the contents is read.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dit_jax import sharding
from dit_jax.data import folders, manifest, sources
from dit_jax.errors import UserError
from dit_jax.system import files
from dit_jax.workdirs import records

logger = logging.getLogger("dit_jax")

# Of larger datasets blocks of this many bytes are read at the start, the middle and the end of so
# many files, spread evenly.
READ_WHOLE_BYTES, BLOCK_BYTES, MAX_FILES = 256 * 2**20, 2**16, 1024
IMAGES = ("num_examples", "version", "labels", "captions", "files", "contents")


def identify(source: sources.Source, recorded: dict | None = None) -> dict:
    """Returns the identity of a split as JSON.

    Args: recorded, an earlier identity: contents are not read again where nothing has changed.
    Raises: OSError if a file cannot be read.
    """
    return _identify(source, recorded)[0]


def _identify(source, recorded=None):
    """(the identity of a split, how many bytes its files have)."""
    if isinstance(source.records, folders.Folder):
        folder = source.records
        paths = [folder.root / name for name in folder.files]
        names, sizes, times = list(folder.files), folder.sizes, folder.times
        labels, captions = folder.labels, folder.captions
    else:
        paths = [shard.path for shard in source.shards]
        names = [[shard.path.name, shard.first, shard.count] for shard in source.shards]
        stats = [path.stat() for path in paths]
        sizes = np.array([stat.st_size for stat in stats])
        times = np.array([stat.st_ctime_ns for stat in stats])
        labels = captions = None  # in the files
    size = int(sizes.sum())
    identity = {
        "num_examples": len(source) // source.views,
        "version": source.version,
        "classes": None if source.class_names is None else list(source.class_names),
        "labels": None if labels is None else _digest(np.asarray(labels).tolist()),
        "captions": None if captions is None else _digest(list(captions)),
        "files": _digest(names, sizes.tolist()),
        "times": _digest(times.tolist()),
    }
    read = ("contents", "bytes_read")
    if recorded and all(recorded.get(key) == value for key, value in identity.items()):
        return identity | {key: recorded[key] for key in read}, size
    return identity | dict(zip(read, _read_contents(paths, sizes), strict=True)), size


def identify_contents(source: sources.Source) -> dict:
    """Returns `identify`'s result without the times where all contents are read: copies are equal.

    Raises: OSError if a file cannot be read.
    """
    identity, size = _identify(source)
    if size <= READ_WHOLE_BYTES:
        del identity["times"]
    return identity


def digest(identity: dict) -> str:
    """Returns 16 hexadecimal digits of an identity, without files' times and classes' names."""
    return manifest.digest({key: identity[key] for key in IMAGES})


def describe_changes(recorded: dict, now: dict) -> list[str]:
    """Returns what differs between two identities, in words; [] if they are of the same data.

    What one of them does not have is not compared: labels, captions, names of classes.
    """
    differing = [
        key
        for key, value in recorded.items()
        if None not in (value, now.get(key)) and value != now[key]
    ]
    changes = [
        f"{key.replace('_', ' ')}: then {recorded[key]}, now {now[key]}"
        for key in ("num_examples", "version")
        if key in differing
    ]
    if "classes" in differing:
        changes.append(_compare_classes(recorded["classes"], now["classes"]))
    if "files" in differing:
        changes.append("names or sizes of files differ")
    elif "contents" in differing:
        changes.append("contents of files differ, of the same names and sizes")
    return changes + [
        f"{key} of images differ" for key in ("labels", "captions") if key in differing
    ]


def _compare_classes(recorded, now):
    if len(recorded) != len(now):
        return f"number of classes: then {len(recorded)}, now {len(now)}"
    i = next(i for i, pair in enumerate(zip(recorded, now, strict=True)) if pair[0] != pair[1])
    then, today = (files.printable(names[i]) for names in (recorded, now))
    return f"name of class {i}: then '{then}', now '{today}'"


def check(source: sources.Source, recorded: dict | None, owner: str) -> dict:
    """Demands that a split is the one that was recorded, and returns its identity.

    Args: recorded, None if it was not.   owner: what was made of it, for the message.
    Raises: ValueError with what differs.
    """
    now, size = _identify(source, recorded)
    if not recorded:
        return now
    if changes := describe_changes(recorded, now):
        raise UserError(
            f"{source.origin} is not what {owner} was begun with:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "Restore it as it was, or begin anew in another directory."
        )
    if now["bytes_read"] < size and recorded.get("times", now["times"]) != now["times"]:
        logger.warning(
            "files of %s were copied or changed since %s was begun: of their %s bytes %s were "
            "compared, and are as then.",
            source.origin,
            owner,
            f"{size:,}",
            f"{now['bytes_read']:,}",
        )
    return now | {"classes": _keep_names(source, recorded.get("classes"), now["classes"])}


def _keep_names(source, recorded, now):
    """The classes' names as recorded, or as they are where none are; a warning of what changed."""
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
    """Demands that a run goes on with the data that it began with, and returns their identities.

    Args: splits, 'train', 'eval' or both.   workdir: of the run, where they are recorded.
    Returns: {split: identity}; of moments also 'images', the identities of the encoded images.
    Raises: ValueError with what differs, in all processes alike.
    """

    def check_all():
        if jax.process_index() != 0:
            return None
        saved = records.saved_steps(workdir)  # before the first nothing can be mixed up
        recorded = records.load_data(workdir) if saved else {}
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

    text = json.dumps(sharding.in_every_process(check_all))
    return json.loads(sharding.from_first_process(text))


def get_training_images(data: dict) -> dict | None:
    """The identity of the images that a run was trained on, as they are or as moments.

    Args: data, as `workdirs.load_data`.   Returns: None if it is not recorded.
    """
    return data.get("images", data).get("train")


def _read_contents(paths: Sequence[pathlib.Path], sizes) -> tuple[str, int]:
    """(a digest of the files' contents, or of a sample of them; how many bytes were read)."""
    whole = int(sizes.sum()) <= READ_WHOLE_BYTES
    digest, bytes_read = hashlib.sha256(), 0
    count = len(paths) if whole else min(len(paths), MAX_FILES)
    for i in np.linspace(0, len(paths) - 1, count).astype(int):
        size = int(sizes[i])
        with paths[i].open("rb") as file:
            if whole or size <= 3 * BLOCK_BYTES:
                starts, length = [0], size
            else:
                starts, length = [0, (size - BLOCK_BYTES) // 2, size - BLOCK_BYTES], BLOCK_BYTES
            for start in starts:
                file.seek(start)
                block = file.read(length)
                digest.update(len(block).to_bytes(8, "little") + block)
                bytes_read += len(block)
    return digest.hexdigest()[:16], bytes_read


def _digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
