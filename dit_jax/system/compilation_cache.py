"""Persistent cache of compiled programs, in the user's cache directory."""

import hashlib
import logging
import os
import pathlib
import platform
import stat
import warnings

import jax

from dit_jax.errors import UserFileError

logger = logging.getLogger("dit_jax")

MAX_BYTES = 8 * 2**30  # of the cache; JAX removes the least recently used programs


def enable() -> None:
    """Enables JAX's persistent compilation cache, unless the user has configured one already.

    Cache entries are machine code that runs without a check. So if other users can write into the
    directory, it is not used, and a warning is logged.
    """
    # If storing a program fails, as on a full disk, the next command compiles the program again.
    ignored = "Error (reading|writing) persistent compilation cache entry"
    warnings.filterwarnings("ignore", message=ignored)
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        directory = make_directory()
    except OSError as error:
        logger.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def make_directory() -> pathlib.Path:
    """Creates the cache directory of this user and this type of processor, and returns it.

    Raises: OSError if the directory cannot be created or is a link, or if other users own it or may
      write into it.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = root / "dit_jax" / f"compiled-{_compute_processor_digest()}"
    root.mkdir(parents=True, exist_ok=True)
    # The parent is checked too, because whoever can write there can replace the directory.
    for path in (directory.parent, directory):
        if not os.path.lexists(path):
            path.mkdir(mode=0o700)
        status = path.lstat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or shared:
            raise UserFileError(
                f"{path} is a link, belongs to another user, or others may write there. Remove it, "
                "or set JAX_COMPILATION_CACHE_DIR to another directory."
            )
    return directory


def _compute_processor_digest():
    """Returns a digest that is the same for processors which run the same machine code."""
    # Machines that share a home directory may have different processors.
    description = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        description += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    except OSError:
        pass  # only Linux has this file
    return hashlib.sha256(repr(description).encode()).hexdigest()[:12]
