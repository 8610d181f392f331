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

MAX_BYTES = 8 * 2**30  # beyond this, the least recently used programs are removed


def enable() -> None:
    """Enables JAX's persistent compilation cache, unless the user has configured one already.

    Cache entries are machine code that runs without a check. So a directory that other users can
    write into is not used; a warning is logged instead.
    """
    # If a program cannot be stored, on a full disk for example, the next command compiles it again.
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
    """Returns the cache directory of this user and this kind of machine; creates it if needed.

    Raises: OSError if it cannot be created, is a link, or others own it or may write there.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = root / "dit_jax" / f"compiled-{_machine()}"
    root.mkdir(parents=True, exist_ok=True)
    # The parent too: whoever can write there can replace the directory.
    for path in (directory.parent, directory):
        if not os.path.lexists(path):
            path.mkdir(mode=0o700)
        status = path.lstat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or shared:
            raise UserFileError(
                f"{path} belongs to another user, is a link, or others may write there: remove it, "
                "or set JAX_COMPILATION_CACHE_DIR."
            )
    return directory


def _machine():
    """Returns a digest of the kind of processor.

    Machines that share a home directory may have different ones, with different machine code.
    """
    kind = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    except OSError:
        pass  # only Linux has this file
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
