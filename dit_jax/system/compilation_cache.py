"""Compiled programs kept between commands, in the user's own cache."""

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

MAX_BYTES = 8 * 2**30  # the programs used longest ago go first


def enable() -> None:
    """Keeps what JAX compiles in the user's cache directory, unless the user has chosen another.

    An entry is machine code that runs as it is, so nothing is read from a directory that another
    user could write into.
    """
    # A program that cannot be kept, on a full disk say, is compiled again the next time.
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
    """The directory of this user and this kind of machine, made if it is not there.

    Raises: OSError if it cannot be made, or if it belongs to another user or others may write
      there.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = root / "dit_jax" / f"compiled-{_machine()}"
    root.mkdir(parents=True, exist_ok=True)
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
    """What tells processors apart: a home directory may be on several machines."""
    kind = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    except OSError:
        pass  # not Linux
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
