"""Writer for the TFDS datasets of this package; checks a dataset that already exists."""

import contextlib
import io
import logging
import os
import pathlib
import shlex

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dit_jax.data import tfds_data
from dit_jax.errors import UserError, UserFileError
from dit_jax.system import files, locks

logger = logging.getLogger("dit_jax")

SPLITS = ("train", "test")
TEST_FRACTION = 0.1
LOCK = "write.lock"  # in the directory that contains the versions of a dataset


def split(num_examples: int) -> dict[str, np.ndarray]:
    """Returns {split: indices} from a fixed permutation; the first tenth is the test split."""
    # RandomState gives the same numbers in all versions of NumPy.
    indices = np.random.RandomState(0).permutation(num_examples)
    num_test = round(TEST_FRACTION * num_examples)
    return {"train": indices[num_test:], "test": indices[:num_test]}


def to_png(image: Image.Image) -> io.BytesIO:
    """Encodes an image as PNG, in a file object as TFDS expects it."""
    png = io.BytesIO()
    image.save(png, "PNG")
    png.seek(0)
    return png


def write(
    builder_class: type[tfds.core.DatasetBuilder],
    data_dir: str | os.PathLike | None = None,
    config: str = "",
) -> str:
    """Writes the dataset of a TFDS builder unless it already exists; returns its directory.

    Waits if another process writes the same dataset.

    Args:
      data_dir: the data directory of TFDS; None for TFDS's default.
      config: the name of the builder's config; '' if it has no configs.
    Raises: ValueError if the existing dataset is incomplete or damaged, without a change to it;
      OSError if the dataset cannot be written.
    """
    name = f"{builder_class.name}/{config}".rstrip("/")
    files.check_utf8(pathlib.Path(data_dir or ""))

    def make_builder():
        # Checked before TFDS opens it, because TFDS treats any existing directory as the dataset.
        for root in tfds.core.utils.file_utils.list_data_dirs(data_dir):
            directory = pathlib.Path(root).expanduser() / name / str(builder_class.VERSION)
            if os.path.lexists(directory):
                check(directory, tfds_data.make_build_command(name, str(data_dir or "")))
        options = dict(config=config) if config else {}
        return builder_class(data_dir=data_dir, file_format="array_record", **options)

    builder = make_builder()
    if builder.data_path.exists():
        return str(builder.data_dir)
    try:
        with locks.hold(pathlib.Path(builder.data_dir).parent / LOCK, wait=True):
            builder = make_builder()  # another command may have written the dataset meanwhile
            if not builder.data_path.exists():
                logger.info("writing the dataset %s", builder.data_dir)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints lines about downloads
                builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise UserFileError(f"cannot write the dataset {builder.data_dir}: {error}") from error
    return str(builder.data_dir)


def check(directory: pathlib.Path, build_command: str) -> None:
    """Checks that a directory has a complete dataset, by reading all its records.

    Args:
      build_command: the command that writes the dataset.
    Raises: ValueError with the fault and the command that writes the dataset again.
    """
    shown = files.printable(directory)
    rebuild = f"rm -r {shlex.quote(shown)}; {build_command}"
    try:
        _read_all(directory, rebuild)
    # TFDS, Protocol Buffers and array_record raise all kinds of exceptions for damaged files.
    except Exception as error:
        reason = files.printable((str(error).splitlines() or [type(error).__name__])[0])
        message = f"the dataset {shown} exists but is not complete: {reason.rstrip('.')}."
        if rebuild not in message:  # the reason may already name the command
            message += f" If the directory has no files of yours, write it again: `{rebuild}`."
        raise UserError(message) from error


def _read_all(directory, rebuild):
    """Reads all records of both splits.   Raises: any exception for a damaged dataset."""
    if missing := [name for name in tfds_data.DESCRIPTIONS if not (directory / name).is_file()]:
        raise UserError(f"it has no {' and no '.join(missing)}")
    tfds_data.check_descriptions(directory)
    builder = tfds.builder_from_directory(directory)
    for split in SPLITS:
        records, origin, _ = tfds_data.read_split(builder, split, rebuild)
        if not len(records):
            raise UserError(f"{origin} is empty")
        for i in range(len(records)):
            try:
                records[i]
            except Exception as error:
                raise UserError(f"record {i} of {origin} cannot be read: {error}") from error
