"""TFDS datasets that need no network, written as array_record."""

import contextlib
import io
import logging

logger = logging.getLogger("dit_jax")


def write(builder) -> str:
    """Writes the dataset of a TFDS builder unless it is there already; returns its directory.

    Raises: OSError if it cannot be written.
    """
    if not builder.data_path.exists():
        logger.info("writing the dataset %s", builder.data_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own lines, of downloads
            builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # the latter is array_record's
        raise OSError(f"cannot write the dataset {builder.data_dir}: {error}") from error
    return str(builder.data_dir)
