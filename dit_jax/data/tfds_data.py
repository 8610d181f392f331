"""Prepared TFDS datasets: checked before TFDS opens them, then read with random access.

A dataset's files name the classes that decode its features, and TFDS imports these classes. In
this way a downloaded dataset could run any code. So TFDS may open a directory only if its files
name no other classes than TFDS's own.
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
# The files that describe a dataset and its features. Only features.json may be missing.
DESCRIPTIONS = ("features.json", "dataset_info.json")
FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+", re.ASCII)
CLASS_KEYS = ("pythonClassName", "python_class_name")
# NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION. TFDS's other kinds of names are refused:
# they use the network or pass arguments to a builder.
NAME = re.compile(r"([A-Za-z]\w*)(/[\w.+-]+)?(:[\d.*]+)?", re.ASCII)


def make_build_command(name: str, data_dir: str) -> str:
    """Returns the shell command that prepares a dataset, for messages."""
    dataset, _, size = name.partition("/")
    if dataset in DATASETS:
        size_flag = f" --size {size}" if size else ""
        data_dir_flag = f" --data_dir {data_dir}" if data_dir else ""
        return f"python -m dit_jax.datasets.{dataset}{size_flag}{data_dir_flag}"
    data_dir_flag = f" --data_dir={data_dir}" if data_dir else ""
    return f"tfds build {name} --file_format=array_record{data_dir_flag}"


def open_split(data_config, split: str, annotations: Annotations) -> sources.Source:
    """Opens a split of a TFDS dataset.

    Raises: FileNotFoundError or ValueError for the same reasons as `open_builder` and `read_split`;
      ValueError if the dataset lacks the features that the annotations need.
    """
    build_command = make_build_command(data_config.name, data_config.data_dir)
    builder = open_builder(data_config.name, data_config.data_dir, "image", build_command)
    annotations.check_features(builder.info.features, data_config.name)
    class_names = read_class_names(builder, annotations.num_classes)
    records, origin, shards = read_split(builder, split, build_command)
    return sources.Source(
        records,
        "image",
        sizes.image_shape(data_config),
        annotations,
        origin,
        class_names=class_names,
        files=shards,
        version=f"{builder.info.full_name} {split}",
    )


def open_builder(name: str, data_dir: str, feature: str, build_command: str):
    """Returns the TFDS builder of a prepared dataset.

    Args:
      name: the dataset's name or its directory.
      data_dir: the data directory of TFDS; '' for the standard one.
      feature: a feature that the dataset must have, 'image' or 'moments'.
      build_command: the command that prepares the dataset, for messages.
    Raises: FileNotFoundError if the dataset does not exist, with build_command if TFDS or this
      project can build it; ValueError if the dataset is damaged, if it names classes that are not
      TFDS's, or if it lacks the feature; OSError if it contains pipes or devices.
    """
    # Imported here because it takes most of a second and image folders do not need it.
    import tensorflow_datasets as tfds

    is_moments = feature == "moments"
    directory = files.to_path(name, "latents.moments" if is_moments else "data.name")
    data_dir = data_dir and str(files.to_path(data_dir, "data.data_dir"))
    for path in filter(None, (name, data_dir)):
        files.check_utf8(pathlib.Path(path))
    if (directory / "dataset_info.json").is_file():
        _check_directory(directory)
        try:
            builder = tfds.builder_from_directory(directory)
        # Protocol Buffers and TFDS raise all kinds of exceptions for damaged descriptions.
        except Exception as error:
            raise _make_damaged_error(directory, error, build_command) from error
    else:
        builder = _find_builder(tfds, name, data_dir)
    # TFDS also has builders for datasets that are not prepared, so the directory is checked too.
    if builder is None or not pathlib.Path(builder.data_dir).is_dir():
        can_build = builder is not None or name.partition("/")[0] in DATASETS or is_moments
        build_hint = f" Build it with `{build_command}`." if can_build else ""
        raise MissingFileError(
            f"no prepared TFDS dataset {files.printable(name)!r} in "
            f"{data_dir or tfds.core.constants.DATA_DIR}.{build_hint} If the dataset is elsewhere, "
            "set data.data_dir, or set the name to the directory of the prepared dataset."
        )
    if feature not in builder.info.features:
        known = ", ".join(map(files.printable, builder.info.features))
        raise UserError(
            f"dataset {files.printable(name)!r} has no feature {feature!r}, only {known}. Set "
            "latents.source to what the dataset holds."
        )
    return builder


def _find_builder(tfds, name, data_dir):
    """Returns TFDS's builder of the dataset with this name; None if TFDS has none."""
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
    # Protocol Buffers and TFDS raise all kinds of exceptions for unknown or damaged datasets.
    except Exception:
        return None


def _check_directory(directory):
    """Checks for pipes and devices (OSError) and for foreign classes (ValueError)."""
    files.check_tree(directory)
    check_descriptions(directory)


def _make_damaged_error(directory, error, build_command):
    """Returns the error for a directory that TFDS cannot read."""
    prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(
        f"{files.printable(directory)} is no TFDS dataset that can be read: "
        f"{prefix}{_first_line(error)}. Build it again with `{build_command}`."
    )


def _first_line(error):
    """Returns the first line of an error's message."""
    return files.printable((str(error).splitlines() or [""])[0][:200])


def check_descriptions(directory: pathlib.Path) -> None:
    """Checks that a dataset's descriptions name no classes but TFDS's feature classes.

    Raises: ValueError that names the foreign class; ValueError if a description is damaged.
    """
    for name in DESCRIPTIONS:
        path = directory / name
        if not path.is_file():
            continue
        description = json_files.read_json(path, "the description of a TFDS dataset")
        for class_name in _find_imported_classes(description):
            if not FEATURE_CLASS.fullmatch(class_name) or "_test." in class_name:
                raise UserError(
                    f"{files.printable(path)} names the class {files.printable(class_name)}, which "
                    "is not one of TFDS's features. TFDS would import this class, and so run code "
                    "that comes with the data. If you trust the data, build the dataset again "
                    "with TFDS's features."
                )


def _find_imported_classes(description) -> Iterator[str]:
    """Yields the names of the classes that TFDS would import for a description, old or new."""
    values = [description]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            names = [value[key] for key in CLASS_KEYS if key in value]
            if isinstance(value.get("type"), str) and "content" in value:
                names.append(value["type"])
            yield from map(str, names)
            values += value.values()
        elif isinstance(value, list):
            values += value


def read_class_names(builder, num_classes: int | None) -> tuple[str, ...] | None:
    """Returns the class names of a TFDS dataset, or None if its classes have no names.

    Warns if the model has another number of classes. This is no error, because `Annotations.read`
    refuses every label that the model does not have.
    """
    if "label" not in builder.info.features:
        return None
    label = builder.info.features["label"]
    count = getattr(label, "num_classes", None)  # None for a label that is a plain integer
    if num_classes and count not in (None, num_classes):
        sources.log_once(
            f"{builder.data_dir} has {count} classes, but model.num_classes={num_classes}."
        )
    # TFDS calls unnamed classes "0", "1", ...; these count as no names.
    names = tuple(label.names) if count else ()
    return None if names == tuple(map(str, range(len(names)))) else names


def read_split(
    builder, split: str, build_command: str
) -> tuple[Sequence, str, sources.Files | None]:
    """Returns (records, name for messages, shards) of a split; ((), name, None) if it is empty.

    The images in the records are encoded bytes.
    Args:
      split: the name of a split, or a slice such as 'train[:90%]'.
      build_command: the command that prepares the dataset, for messages.
    Raises: ValueError if the split is unknown, if its files are outside the dataset's directory, if
      they are damaged, or if their format has no random access; FileNotFoundError if a shard is
      missing.
    """
    import tensorflow_datasets as tfds

    try:
        info = builder.info.splits[split]
        num_examples = info.num_examples
    except (KeyError, ValueError):  # unknown split, or malformed slice
        known = ", ".join(map(files.printable, builder.info.splits))
        raise UserError(
            f"dataset {builder.info.name!r} has no split {split!r}. Choose from {known}, or take a "
            "slice such as 'train[:90%]'."
        ) from None
    origin = f"split {split!r} of {files.printable(builder.data_dir)}"
    if num_examples < 1:  # negative if a slice ends before it begins
        return (), origin, None
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{files.printable(builder.data_dir)} is in the format {builder.info.file_format.value}"
            f", which has no random access. Build the dataset again with `{build_command}`."
        )
    shards = _read_shards(builder, info, build_command)
    # `pixels` decodes the images later, because TFDS would hide their mode.
    decoders = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        return builder.as_data_source(split=split, decoders=decoders), origin, shards
    # array_record raises all kinds of exceptions for a damaged shard.
    except Exception as error:
        raise _make_damaged_error(builder.data_dir, error, build_command) from error


def _read_shards(builder, info, build_command):
    """Returns the shards of a split as Files, after comparing them with the descriptions."""
    directory = pathlib.Path(builder.data_dir)
    paths = [pathlib.Path(shard.filename) for shard in info.file_instructions]
    real_directory, shown = directory.resolve(), files.printable(directory)
    # A missing file resolves to its own path, so it is reported below as missing.
    outside = [p for p in paths if p.parent != directory or p.resolve().parent != real_directory]
    if outside:
        raise UserError(
            f"{shown} names, or links to, a file outside of it, {files.printable(outside[0])}. "
            "Only files in the dataset's directory are read. Copy or hard-link the file into it. "
            "The directory itself may be a link."
        )
    if missing := [path for path in paths if not path.is_file()]:
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} files of {shown} are missing, such as "
            f"{missing[0].name}. Restore them, or build the dataset again with `{build_command}`."
        )
    stats = [path.stat() for path in paths]
    sizes_in_bytes = np.array([stat.st_size for stat in stats], np.int64)
    # A record takes a byte or more. A huge count would make `loader` allocate huge arrays.
    if info.num_examples > sizes_in_bytes.sum():
        raise UserError(
            f"dataset_info.json of {shown} counts {info.num_examples:,} records, more than its "
            f"files have bytes, so it is damaged. Build the dataset again with `{build_command}`."
        )
    for shard in info.file_instructions:
        _check_num_records(shard, build_command)
    return sources.Files(
        directory,
        [path.name for path in paths],
        sizes_in_bytes,
        np.array([stat.st_ctime_ns for stat in stats], np.int64),
        ranges=[(shard.skip, shard.take) for shard in info.file_instructions],
    )


def _check_num_records(shard, build_command):
    """Raises ValueError if a shard's number of records differs from dataset_info.json."""
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
            f"cannot read {shown}: {_first_line(error)}. If it was cut, remove it and build the "
            f"dataset again with `{build_command}`."
        ) from error
    if count != shard.examples_in_shard:
        raise UserError(
            f"{shown} holds {count:,} records, but dataset_info.json counts "
            f"{shard.examples_in_shard:,}, so one of the two files is damaged. Build the dataset "
            f"again with `{build_command}`."
        )
