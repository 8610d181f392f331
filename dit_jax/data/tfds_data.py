"""Prepared TFDS datasets: checked before TFDS opens them, then read with random access.

The files of a dataset name the classes that decode its features, and TFDS imports these classes.
A downloaded dataset could run any code this way. So TFDS opens a directory only if all classes
that it names are TFDS's own.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


def open_builder(name: str, data_dir: str, feature: str, build: str):
    """Returns the TFDS builder of a prepared dataset.

    Args:
      name: the name of the dataset, or its directory.
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
    is_directory = (directory / "dataset_info.json").is_file()
    # `known`: whether the error can name a command that builds the dataset.
    known = name.partition("/")[0] in DATASETS or feature == "moments"
    prepared = False
    # Every directory that TFDS may read is checked first. By name TFDS may pick any version, so
    # all of them are checked.
    if is_directory:
        files.check_tree(directory)
        check_descriptions(directory)
    elif match := NAME.fullmatch(name):
        for root in _data_dirs(tfds, data_dir):
            for path in sorted(root.glob(f"{match[1]}/**/dataset_info.json")):
                files.check_tree(path.parent)
                check_descriptions(path.parent)
    # Only now TFDS reads the descriptions.
    if is_directory or NAME.fullmatch(name):
        try:
            if is_directory:
                builder = tfds.builder_from_directory(directory)
            else:
                builder = tfds.builder(name, data_dir=data_dir or None)
            prepared = known = True
            prepared = pathlib.Path(builder.data_dir).is_dir()
        except (tfds.core.DatasetNotFoundError, ModuleNotFoundError):
            pass
        # Protocol Buffers and TFDS raise all kinds of exceptions for damaged descriptions.
        except Exception as error:
            if is_directory:
                raise _damaged(directory, error, build) from error
    # TFDS also has builders for datasets that are not prepared, so a builder is no proof.
    if not prepared:
        way_out = f"Build it with `{build}`, or set" if known else "Set"
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


def _data_dirs(tfds, data_dir) -> Iterator[pathlib.Path]:
    """Yields the directories in which TFDS looks for datasets."""
    for path in tfds.core.utils.file_utils.list_data_dirs(data_dir or None):
        yield pathlib.Path(path).expanduser()


def _damaged(directory, error, build):
    """Returns the error for a directory that TFDS cannot read, with the first line of its error."""
    reason = (str(error).splitlines() or [""])[0][:200]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(
        f"{files.printable(directory)} is no TFDS dataset that can be read: "
        f"{kind}{files.printable(reason)}. Build it again, with `{build}`."
    )


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


class Shard(NamedTuple):
    """A file of a dataset, and the range of its records that belongs to a split or a slice."""

    path: pathlib.Path
    first: int  # index of the first record
    count: int  # number of records


def read_split(builder, split: str, feature: str, build: str) -> tuple[Sequence, str, list[Shard]]:
    """Returns (records, name in messages, shards) of a split or slice; without records, empty ones.

    Args:
      split: a split, or a slice of one such as 'train[:90%]'.
      feature: 'image', whose bytes stay encoded, or 'moments'.
      build: the command that prepares the dataset, for messages.
    Raises: ValueError for an unknown split, files outside the dataset's directory, or a format
      without random access; FileNotFoundError for a missing shard.
    """
    import tensorflow_datasets as tfds

    name = builder.info.name
    try:
        info = builder.info.splits[split]
        num_examples = info.num_examples
    except (KeyError, ValueError):  # unknown split, or malformed slice
        splits = ", ".join(map(files.printable, builder.info.splits))
        raise UserError(
            f"dataset {name!r} has no split {split!r}; it has {splits}, and slices of them such as "
            "'train[:90%]'."
        ) from None
    origin = f"split {split!r} of {files.printable(builder.data_dir)}"
    if num_examples < 1:  # negative if a slice ends before it begins
        return (), origin, []
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{files.printable(builder.data_dir)} is in the format {builder.info.file_format.value}"
            f", which cannot be read at random; build the dataset again, with `{build}`."
        )
    shards = [Shard(pathlib.Path(f.filename), f.skip, f.take) for f in info.file_instructions]
    _check_shards(builder, shards, num_examples, build)
    _check_counts(builder, info.file_instructions, build)
    # `pixels` decodes the bytes, because TFDS would hide the mode of the image.
    decoders = {"image": tfds.decode.SkipDecoding()} if feature == "image" else None
    try:
        return builder.as_data_source(split=split, decoders=decoders), origin, shards
    # array_record raises all kinds of exceptions for a damaged shard.
    except Exception as error:
        raise _damaged(builder.data_dir, error, build) from error


def _check_counts(builder, instructions, build):
    """Raises a ValueError unless every file has as many records as dataset_info.json says."""
    # Imported here because it takes long and image folders do not need it.
    from array_record.python.array_record_module import ArrayRecordReader

    for one in instructions:
        try:
            reader = ArrayRecordReader(one.filename)
            count = reader.num_records()
            reader.close()
        # array_record raises all kinds of exceptions for a damaged shard.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"cannot read {files.printable(one.filename)}: {files.printable(reason)}. If a "
                f"shard was cut, remove it and build the dataset again, with `{build}`."
            ) from error
        if count != one.examples_in_shard:
            raise UserError(
                f"{files.printable(one.filename)} holds {count:,} records, but dataset_info.json "
                f"says {one.examples_in_shard:,}: one of them is damaged. Build the dataset again, "
                f"with `{build}`."
            )


def _check_shards(builder, shards, num_examples, build):
    """Raises unless the shards exist, are in the dataset's directory, and can hold num_examples.

    Raises: ValueError; FileNotFoundError.
    """
    directory, paths = pathlib.Path(builder.data_dir), [shard.path for shard in shards]
    inside = directory.resolve()
    # A missing file resolves to its own path, so it is reported as missing, not as outside.
    outside = [p for p in paths if p.parent != directory or p.resolve().parent != inside]
    if outside:
        raise UserError(
            f"{files.printable(directory)} names, or links to, a file outside of it, "
            f"{files.printable(outside[0])}: nothing but the dataset's own files is read. To use "
            "files that lie elsewhere, copy or hard-link them; the whole directory may be a link."
        )
    if lost := [path for path in paths if not path.is_file()]:
        raise MissingFileError(
            f"{len(lost)} of {len(paths)} files of {files.printable(directory)} are not there, "
            f"such as {lost[0].name}. Restore them, or build the dataset again, with `{build}`."
        )
    # A record takes a byte or more. A huge number would make `loader` allocate huge arrays.
    if num_examples > sum(path.stat().st_size for path in paths):
        raise UserError(
            f"{files.printable(directory)} says that it holds {num_examples:,} records, more than "
            f"its files have bytes: dataset_info.json is damaged. Build it again, with `{build}`."
        )
