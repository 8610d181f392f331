"""Writer of this package's TFDS datasets, with a check of a dataset that already exists."""

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
LOCK = "write.lock"  # in the directory that holds the versions of a dataset


def split(num: int) -> dict[str, np.ndarray]:
    """Returns {split: indices} of a fixed permutation; the first tenth is the test split."""
    # RandomState's numbers are the same in all versions of NumPy, so the splits are too.
    order = np.random.RandomState(0).permutation(num)
    num_test = round(TEST_FRACTION * num)
    return {"train": order[num_test:], "test": order[:num_test]}


def to_png(image: Image.Image) -> io.BytesIO:
    """Returns a PNG file of an image, as TFDS takes it."""
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
      data_dir: the data directory of TFDS; None for the standard one.
      config: the name of the builder's config; '' for none.
    Raises: ValueError if the existing dataset is incomplete or damaged (it is not changed); OSError
      if the dataset cannot be written.
    """
    name = f"{builder_class.name}/{config}".rstrip("/")
    files.check_utf8(pathlib.Path(data_dir or ""))

    def open_whole():
        # Checked before TFDS is asked, because TFDS takes any existing directory for the dataset.
        for root in tfds.core.utils.file_utils.list_data_dirs(data_dir):
            directory = pathlib.Path(root).expanduser() / name / str(builder_class.VERSION)
            if os.path.lexists(directory):
                check(directory, tfds_data.make_build_command(name, str(data_dir or "")))
        options = dict(config=config) if config else {}
        return builder_class(data_dir=data_dir, file_format="array_record", **options)

    builder = open_whole()
    if builder.data_path.exists():
        return str(builder.data_dir)
    try:
        with locks.hold(pathlib.Path(builder.data_dir).parent / LOCK, wait=True):
            builder = open_whole()  # another command may have written it before the lock was free
            if not builder.data_path.exists():
                logger.info("writing the dataset %s", builder.data_dir)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints lines about downloads
                builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise UserFileError(f"cannot write the dataset {builder.data_dir}: {error}") from error
    return str(builder.data_dir)


def check(directory: pathlib.Path, build: str) -> None:
    """Raises unless a directory holds a complete dataset whose records can all be read.

    Args:
      build: the command that writes the dataset.
    Raises: ValueError with the fault and the command that writes the dataset again.
    """
    shown = files.printable(directory)
    anew = f"rm -r {shlex.quote(shown)}; {build}"
    try:
        _read(directory, anew)
    # TFDS, Protocol Buffers and array_record raise all kinds of exceptions for damaged files.
    except Exception as error:
        reason = files.printable((str(error).splitlines() or [type(error).__name__])[0])
        message = f"the dataset {shown} is there and is not whole: {reason.rstrip('.')}."
        if anew not in message:  # the reason may already name the command
            message += (
                f" Remove that directory, if nothing in it is yours, and run again: `{anew}`."
            )
        raise UserError(message) from error


def _read(directory, anew):
    """Reads all records of both splits.   Raises: any exception for a damaged dataset."""
    if lost := [name for name in tfds_data.DESCRIPTIONS if not (directory / name).is_file()]:
        raise UserError(f"it has no {' and no '.join(lost)}")
    tfds_data.check_descriptions(directory)
    builder = tfds.builder_from_directory(directory)
    for split in SPLITS:
        records, origin, _ = tfds_data.read_split(builder, split, anew)
        if not len(records):
            raise UserError(f"{origin} is empty")
        for i in range(len(records)):
            try:
                records[i]
            except Exception as error:
                raise UserError(f"record {i} of {origin} cannot be read: {error}") from error
