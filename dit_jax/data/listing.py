"""One pass over a folder of images: the files that are read, and what is left out or refused.

`folders` has the rules. A pass reads every directory once and asks for the size of every image.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
import pathlib
import stat

import numpy as np

from dit_jax.data import pixels
from dit_jax.errors import UserError
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

THREADS = 16  # directories that are read at a time: a network's file system answers slowly
SHOWN = 10  # faults, names or kinds that a message lists
# Beside names that begin with a dot: what systems leave in folders, in lower case.
SYSTEM_NAMES = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "#snapshot",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "network trash folder",
        "system volume information",
        "temporary items",
        "thumbs.db",
        "~snapshot",
    }
)
# Suffixes of images that are not read; a user should know that these are left out.
UNREAD = frozenset(
    [
        ".apng",
        ".arw",
        ".avif",
        ".cr2",
        ".cr3",
        ".dng",
        ".eps",
        ".exr",
        ".gif",
        ".hdr",
        ".heic",
        ".heif",
        ".icns",
        ".ico",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpx",
        ".jxl",
        ".mpo",
        ".nef",
        ".orf",
        ".pbm",
        ".pcx",
        ".pgm",
        ".pnm",
        ".ppm",
        ".psd",
        ".qoi",
        ".raf",
        ".raw",
        ".rw2",
        ".svg",
        ".tga",
        ".tif",
        ".tiff",
        ".xcf",
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The images below a folder."""

    folder: pathlib.Path  # without links
    names: list[str]  # of N images relative to the folder, with "/", sorted by their parts
    sizes: np.ndarray  # [N] int64, bytes
    times: np.ndarray  # [N] int64, of the last change (ctime), ns
    folders: list[str]  # the names of the folders right in it, sorted
    unread: dict[str, collections.Counter]  # of each of these, '' for none: suffix -> images
    others: collections.Counter  # suffix -> files that are no images
    hidden: collections.Counter  # name -> files and folders that are hidden or a system's


@dataclasses.dataclass
class _Directory:
    """What one directory holds; names are relative to the folder of the pass."""

    images: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    # name, real path, whether it is a link
    folders: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)  # suffixes
    others: list[str] = dataclasses.field(default_factory=list)  # suffixes
    hidden: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


class _Links:
    """Resolves links, of a root that they must stay inside of."""

    def __init__(self, root: pathlib.Path):
        self.root = os.path.realpath(root)
        # Of many links into one folder, that one is resolved once.
        self._resolve_folder = functools.lru_cache(functools.partial(os.path.realpath, strict=True))

    def is_inside(self, real: str) -> bool:
        """Whether a path without links is the root or below it."""
        return real == self.root or real.startswith(self.root.rstrip(os.sep) + os.sep)

    def resolve(self, path: str, target: str) -> str:
        """The path without links to the target of the link `path`.   Raises: OSError for none."""
        head, tail = os.path.split(os.path.join(os.path.dirname(path), target))
        if tail not in ("", os.curdir, os.pardir):
            real = os.path.join(self._resolve_folder(head), tail)
            if not stat.S_ISLNK(os.lstat(real).st_mode):
                return real
        return os.path.realpath(path, strict=True)


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name, without a path, begins with a dot or is a system's."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def get_suffix(name: str) -> str:
    """The suffix in lower case, such as '.png'; '' without one."""
    return os.path.splitext(name)[1].lower()


def scan(folder: pathlib.Path, root: pathlib.Path) -> Listing:
    """Lists the images below a folder, following links that stay inside `root`.

    Raises: ValueError that lists links which leave the root or lead nowhere, folders that are
      reached twice, and what cannot be read.
    """
    links, start = _resolve(folder, root)
    images, top, faults = [], [], []
    unread = collections.defaultdict(collections.Counter)
    others, hidden = collections.Counter(), collections.Counter()
    for name, part in _walk(links, start):
        images += part.images
        unread[_first(name)].update(part.unread)
        others.update(part.others)
        hidden.update(part.hidden)
        faults += part.faults
        top += [] if name else [child for child, _, _ in part.folders]
    _check_faults(folder, root, faults)
    # A null byte sorts before all others, so that names are sorted by their parts.
    images.sort(key=lambda image: image[0].replace("/", "\0"))
    names, sizes, times = zip(*images, strict=True) if images else ((), (), ())
    return Listing(
        folder=pathlib.Path(start),
        names=list(names),
        sizes=np.array(sizes, np.int64),
        times=np.array(times, np.int64),
        folders=sorted(top),
        unread=dict(unread),
        others=others,
        hidden=hidden,
    )


def _walk(links, start):
    """Yields (name, contents) of a folder and of all below it."""
    level, linked, seen = [("", start)], [], {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        while level:
            parts = threads.map(functools.partial(_read_directory, links), level)
            folders, twice = [], []
            for (name, _), part in zip(level, parts, strict=True):
                yield name, part
                folders += [(child, real) for child, real, is_link in part.folders if not is_link]
                linked += [(child, real) for child, real, is_link in part.folders if is_link]
            if not folders:  # links come last, so that of a folder and a link the link is at fault
                folders, linked = sorted(linked), []
            level = []
            for child, real in folders:
                # Twice in one class would count its images twice; this also ends cycles.
                first = seen.setdefault((_first(child), real), child)
                if first == child:
                    level.append((child, real))
                else:
                    twice.append(f"{child}: the same folder as {first}")
            yield "", _Directory(faults=twice)


def list_folders(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
    """The sorted names of the folders right in a folder, as `scan` finds them.

    Raises: ValueError as `scan`, for links right in the folder.
    """
    links, start = _resolve(folder, root)
    contents = _read_directory(links, ("", start))
    _check_faults(folder, root, contents.faults)
    return sorted(name for name, _, _ in contents.folders)


def _resolve(folder, root):
    """(the root's links, folder without links).   Raises: ValueError for a folder outside."""
    links, start = _Links(root), os.path.realpath(folder)
    if not links.is_inside(start):
        raise UserError(
            f"image folder {files.printable(folder)} leads to {files.printable(start)}, outside of "
            f"{files.printable(root)}: only what is inside is read."
        )
    return links, start


def _check_faults(folder, root, faults):
    if faults:
        raise UserError(
            f"image folder {files.printable(folder)} has {count(len(faults), 'fault')}:\n"
            f"{list_some(sorted(faults))}\n"
            f"Nothing outside of {files.printable(root)} is read: copy files there, or choose a "
            "folder that holds both. Remove links that lead nowhere, or to a folder that is read "
            "already."
        )


def _first(name):
    return name.partition("/")[0]


def _read_directory(links, directory) -> _Directory:
    """What is in a directory, (its name, its real path)."""
    name, real = directory
    contents = _Directory()
    try:
        with os.scandir(real) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    contents.hidden.append(entry.name)
                    continue
                try:
                    _add(contents, entry, f"{name}/{entry.name}" if name else entry.name, links)
                except OSError as error:
                    contents.faults.append(f"{name}/{entry.name}: {error.strerror or error}")
    except OSError as error:
        contents.faults.append(f"{name or '.'}: {error.strerror or error}")
    return contents


def _add(contents, entry, name, links):
    suffix, real = get_suffix(entry.name), entry.path
    if entry.is_symlink():
        target = os.readlink(entry.path)
        try:
            real = links.resolve(entry.path, target)
        except OSError:
            real = None
        if real is None or not links.is_inside(real):
            where = "nowhere" if real is None else "outside"
            contents.faults.append(f"{name}: a link that leads {where}, to {target}")
            return
    if entry.is_dir():
        contents.folders.append((name, real, entry.is_symlink()))
    elif suffix not in pixels.SUFFIXES:
        (contents.unread if suffix in UNREAD else contents.others).append(suffix or "no suffix")
    elif entry.is_file():
        status = entry.stat()
        contents.images.append((name, status.st_size, status.st_ctime_ns))
    else:
        contents.faults.append(f"{name}: neither a file nor a folder")


def report(listing: Listing, origin: str) -> None:
    """Logs what the folder holds that is left out, a line for each reason, once in a process."""
    if listing.hidden:
        names = [name for name, _ in listing.hidden.most_common(3)]
        left_out = count(sum(listing.hidden.values()), "hidden or system name")
        say(f"{origin}: {left_out} left out, such as {files.list_some(names)}.", logging.INFO)
    if unread := sum(listing.unread.values(), collections.Counter()):
        say(
            f"{origin}: {count(unread.total(), 'image')} of other kinds left out: "
            f"{_counts(unread)}. Convert them; {pixels.READ} are read.",
            logging.WARNING,
        )
    if listing.others:
        left_out = count(listing.others.total(), "other file")
        say(f"{origin}: {left_out} left out: {_counts(listing.others)}.", logging.INFO)


@functools.cache  # once for each dataset: a command may open it several times
def say(message: str, level: int) -> None:
    """Logs a message about a dataset, once in a process."""
    logger.log(level, "%s", files.printable(message))


def list_some(lines: list[str], total: int | None = None) -> str:
    """The first lines of a longer list, indented, and how many more there are.

    Args: total, of the list whose first lines these are; None is len(lines).
    """
    total = len(lines) if total is None else total
    shown = [f"  {files.printable(line)}" for line in lines[:SHOWN]]
    if total > SHOWN:
        shown.append(f"  and {total - SHOWN:,} more")
    return "\n".join(shown)


def count(number: int, noun: str) -> str:
    """'1 image' or '2 images'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _counts(counter):
    common = counter.most_common(SHOWN)
    return ", ".join(f"{number:,} {suffix}" for suffix, number in common)
