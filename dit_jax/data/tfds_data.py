"""Prepared TFDS datasets: checked before TFDS opens them, then read with random access.

The files of a dataset name the classes that decode its features, and TFDS imports these classes.
A downloaded dataset could run any code this way. So TFDS opens a directory only if all classes
that it names are TFDS's own.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import sources
from dit_jax.data.annotations import Annotations
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files, json_files

DATASETS = ("digits", "openmoji")  # modules of dit_jax.datasets
# The files that describe the features of a dataset. One of them may be missing.
DESCRIPTIONS = ("features.json", "dataset_info.json")
FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+", re.ASCII)
CLASS_KEYS = ("pythonClassName", "python_class_name")
# NAME, NAME/CONFIG, NAME:VERSION, NAME/CONFIG:VERSION. TFDS has more forms, which are refused: one
# uses the network, others pass arguments to a builder.
NAME = re.compile(r"([A-Za-z]\w*)(/[\w.+-]+)?(:[\d.*]+)?", re.ASCII)


def build_command(name: str, data_dir: str) -> str:
    """Returns the shell command that prepares a dataset, for messages."""
    dataset, _, size = name.partition("/")
    if dataset in DATASETS:
        options = f" --size {size}" * bool(size) + f" --data_dir {data_dir}" * bool(data_dir)
        return f"python -m dit_jax.datasets.{dataset}{options}"
    return f"tfds build {name} --file_format=array_record" + f" --data_dir={data_dir}" * bool(
        data_dir
    )


def open_split(data_config, split: str, annotations: Annotations) -> sources.Source:
    """Opens a split of a TFDS dataset.   Raises: as `open_builder` and `read_split`."""
    build = build_command(data_config.name, data_config.data_dir)
    builder = open_builder(data_config.name, data_config.data_dir, "image", build)
    annotations.check_features(builder.info.features, data_config.name)
    names = read_class_names(builder, annotations.num_classes)
    records, origin, shards = read_split(builder, split, "image", build)
    return sources.Source(
        records,
        "image",
        sizes.image_shape(data_config),
        annotations,
        origin,
        class_names=names,
        files=shards,
        version=f"{builder.info.full_name} {split}",
    )


def open_builder(name: str, data_dir: str, feature: str, build: str):
    """Returns the TFDS builder of a prepared dataset, given by its name or its directory.

    Args:
      data_dir: the data directory of TFDS; '' for the standard one.
      feature: a feature that the dataset must have.
      build: the command that prepares the dataset, for messages.
    Raises: FileNotFoundError if the dataset does not exist, with the command to prepare it;
      ValueError if it is damaged, names classes that are not TFDS's, or lacks the feature.
    """
    # Imported here because it takes most of a second and image folders do not need it.
    import tensorflow_datasets as tfds

    directory = files.to_path(name, "data.name" if feature == "image" else "latents.moments")
    data_dir = data_dir and str(files.to_path(data_dir, "data.data_dir"))
    for path in filter(None, (name, data_dir)):
        files.check_utf8(pathlib.Path(path))
    if (directory / "dataset_info.json").is_file():
        _check_directory(directory)
        try:
            builder = tfds.builder_from_directory(directory)
        # Protocol Buffers and TFDS raise all kinds of exceptions for damaged descriptions.
        except Exception as error:
            raise _damaged(directory, error, build) from error
    else:
        builder = _find_builder(tfds, name, data_dir)
    # TFDS also has builders for datasets that are not prepared, so a builder is no proof.
    if builder is None or not pathlib.Path(builder.data_dir).is_dir():
        can_build = (
            builder is not None or name.partition("/")[0] in DATASETS or feature == "moments"
        )
        way_out = f"Build it with `{build}`, or set" if can_build else "Set"
        raise MissingFileError(
            f"no prepared TFDS dataset {files.printable(name)!r} in "
            f"{data_dir or tfds.core.constants.DATA_DIR}. {way_out} data.data_dir, or the name to "
            "the directory of a prepared dataset."
        )
    if feature not in builder.info.features:
        names = ", ".join(map(files.printable, builder.info.features))
        raise UserError(
            f"dataset {files.printable(name)!r} has no feature {feature!r}, only {names}; check "
            "latents.source."
        )
    return builder


def _find_builder(tfds, name, data_dir):
    """Returns TFDS's builder of a name; None if TFDS has none."""
    if not (match := NAME.fullmatch(name)):
        return None
    # TFDS may pick any version, so all of them are checked first.
    for root in tfds.core.utils.file_utils.list_data_dirs(data_dir or None):
        for path in sorted(
            pathlib.Path(root).expanduser().glob(f"{match[1]}/**/dataset_info.json")
        ):
            _check_directory(path.parent)
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    # Of an unknown name, or for damaged descriptions: Protocol Buffers and TFDS raise all kinds.
    except Exception:
        return None


def _check_directory(directory):
    """Raises unless TFDS may read a directory: it has files alone, and runs no code from it."""
    files.check_tree(directory)
    check_descriptions(directory)


def _damaged(directory, error, build):
    """Returns the error for a directory that TFDS cannot read."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(
        f"{files.printable(directory)} is no TFDS dataset that can be read: "
        f"{kind}{_first_line(error)}. Build it again, with `{build}`."
    )


def _first_line(error):
    """Returns the first line of an error's message, for another message."""
    return files.printable((str(error).splitlines() or [""])[0][:200])


def check_descriptions(directory: pathlib.Path) -> None:
    """Raises unless all classes named in a dataset's descriptions are feature classes of TFDS.

    Raises: ValueError that names the other class, or for a damaged description.
    """
    for name in DESCRIPTIONS:
        path = directory / name
        if not path.is_file():
            continue
        for value in _class_names(json_files.read_json(path, "the description of a TFDS dataset")):
            if not FEATURE_CLASS.fullmatch(value) or "_test." in value:
                raise UserError(
                    f"{files.printable(path)} names the class {files.printable(value)}, which is "
                    "not one of TFDS's features: TFDS would import it, and so run code that comes "
                    "with the data. If you trust it, build the dataset anew with TFDS's features."
                )


def _class_names(description) -> Iterator[str]:
    """Yields the class names that TFDS would import, from its present and its older format."""
    waiting = [description]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            names = [value[key] for key in CLASS_KEYS if key in value]
            if isinstance(value.get("type"), str) and "content" in value:
                names.append(value["type"])
            yield from map(str, names)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def read_class_names(builder, num_classes: int | None) -> tuple[str, ...] | None:
    """Returns the class names of a TFDS dataset, or None if its classes have no names.

    Warns if the number of classes differs from the model's. That is no error here, because
    `Annotations.read` refuses each label that the model does not have.
    """
    if "label" not in builder.info.features:
        return None
    label = builder.info.features["label"]
    count = getattr(label, "num_classes", None)  # None for a label that is a plain integer
    if num_classes and count not in (None, num_classes):
        sources.log_once(
            f"{builder.data_dir} has {count} classes, but model.num_classes={num_classes}."
        )
    # TFDS names unnamed classes "0", "1", ...; these are not names.
    names = tuple(label.names) if count else ()
    return None if names == tuple(map(str, range(len(names)))) else names


def read_split(
    builder, split: str, feature: str, build: str
) -> tuple[Sequence, str, sources.Files | None]:
    """Returns (records, name in messages, shards) of a split or slice; ((), name, None) if empty.

    Args:
      split: a split, or a slice of one such as 'train[:90%]'.
      feature: 'image', whose bytes stay encoded, or 'moments'.
      build: the command that prepares the dataset, for messages.
    Raises: ValueError for an unknown split, files outside the dataset's directory, or a format
      without random access; FileNotFoundError for a missing shard.
    """
    import tensorflow_datasets as tfds

    try:
        info = builder.info.splits[split]
        num_examples = info.num_examples
    except (KeyError, ValueError):  # unknown split, or malformed slice
        splits = ", ".join(map(files.printable, builder.info.splits))
        raise UserError(
            f"dataset {builder.info.name!r} has no split {split!r}; it has {splits}, and slices of "
            "them such as 'train[:90%]'."
        ) from None
    origin = f"split {split!r} of {files.printable(builder.data_dir)}"
    if num_examples < 1:  # negative if a slice ends before it begins
        return (), origin, None
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{files.printable(builder.data_dir)} is in the format {builder.info.file_format.value}"
            f", which cannot be read at random; build the dataset again, with `{build}`."
        )
    shards = _check_shards(builder, info, build)
    # `pixels` decodes the bytes, because TFDS would hide the mode of the image.
    decoders = {"image": tfds.decode.SkipDecoding()} if feature == "image" else None
    try:
        return builder.as_data_source(split=split, decoders=decoders), origin, shards
    # array_record raises all kinds of exceptions for a damaged shard.
    except Exception as error:
        raise _damaged(builder.data_dir, error, build) from error


def _check_shards(builder, info, build):
    """Returns the shards of a split, after comparing them with the descriptions."""
    directory = pathlib.Path(builder.data_dir)
    paths = [pathlib.Path(shard.filename) for shard in info.file_instructions]
    inside, shown = directory.resolve(), files.printable(directory)
    # A missing file resolves to its own path, so it is reported as missing, not as outside.
    outside = [p for p in paths if p.parent != directory or p.resolve().parent != inside]
    if outside:
        raise UserError(
            f"{shown} names, or links to, a file outside of it, {files.printable(outside[0])}: "
            "nothing but the dataset's own files is read. To use files that lie elsewhere, copy or "
            "hard-link them; the whole directory may be a link."
        )
    if lost := [path for path in paths if not path.is_file()]:
        raise MissingFileError(
            f"{len(lost)} of {len(paths)} files of {shown} are not there, "
            f"such as {lost[0].name}. Restore them, or build the dataset again, with `{build}`."
        )
    status = [path.stat() for path in paths]
    sizes_in_bytes = np.array([one.st_size for one in status], np.int64)
    # A record takes a byte or more. A huge number would make `loader` allocate huge arrays.
    if info.num_examples > sizes_in_bytes.sum():
        raise UserError(
            f"{shown} says that it holds {info.num_examples:,} records, more than "
            f"its files have bytes: dataset_info.json is damaged. Build it again, with `{build}`."
        )
    for shard in info.file_instructions:
        _check_count(shard, build)
    return sources.Files(
        directory,
        [path.name for path in paths],
        sizes_in_bytes,
        np.array([one.st_ctime_ns for one in status], np.int64),
        ranges=[(shard.skip, shard.take) for shard in info.file_instructions],
    )


def _check_count(shard, build):
    """Raises a ValueError unless a file has as many records as dataset_info.json says."""
    # Imported here because it takes long and image folders do not need it.
    from array_record.python.array_record_module import ArrayRecordReader

    shown = files.printable(shard.filename)
    try:
        reader = ArrayRecordReader(shard.filename)
        count = reader.num_records()
        reader.close()
    # array_record raises all kinds of exceptions for a damaged shard.
    except Exception as error:
        raise UserError(
            f"cannot read {shown}: {_first_line(error)}. If a "
            f"shard was cut, remove it and build the dataset again, with `{build}`."
        ) from error
    if count != shard.examples_in_shard:
        raise UserError(
            f"{shown} holds {count:,} records, but dataset_info.json says "
            f"{shard.examples_in_shard:,}: one of them is damaged. Build the dataset again, with "
            f"`{build}`."
        )
