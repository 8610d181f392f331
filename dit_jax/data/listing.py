"""Directory scan of an image folder: which files are read, skipped or refused.

The rules are in the docstring of `folders`. A scan reads every directory once and takes the size
and time of every image.
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

THREADS = 16  # directories read at the same time, because network file systems are slow
SHOWN = 10  # the most faults, names or suffixes in a message
# Names that operating systems create in folders, in lower case. Names with a leading dot are
# skipped too.
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
# Suffixes of unsupported image formats. Skipping them causes a warning, other files only an info.
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
    """The images below a folder, and counts of what was skipped."""

    folder: pathlib.Path  # with links resolved
    names: list[str]  # N image paths relative to folder, with "/", sorted by their parts
    sizes: np.ndarray  # [N] int64, file sizes in bytes
    times: np.ndarray  # [N] int64, times of the last change (ctime) in ns
    folders: list[str]  # the names of the direct subfolders, sorted
    # Direct subfolder ('' for the folder itself) -> suffix -> number of unsupported images.
    unread: dict[str, collections.Counter]
    others: collections.Counter  # suffix -> number of files that are not images
    hidden: collections.Counter  # name -> number of hidden or system files and folders


@dataclasses.dataclass
class _Directory:
    """Contents of one directory; names are relative to the folder that is scanned."""

    # (name, size in bytes, ctime in ns)
    images: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    # (name, real path, whether it is a link)
    folders: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)  # suffixes
    others: list[str] = dataclasses.field(default_factory=list)  # suffixes
    hidden: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


class _Links:
    """Resolver of links, which must stay inside a root folder."""

    def __init__(self, root: pathlib.Path):
        self.root = os.path.realpath(root)
        # Cached, because many links often lead into the same folder.
        self._resolve_folder = functools.lru_cache(functools.partial(os.path.realpath, strict=True))

    def is_inside(self, real: str) -> bool:
        """Returns whether a path, with links resolved, is the root or below it."""
        return real == self.root or real.startswith(self.root.rstrip(os.sep) + os.sep)

    def resolve(self, path: str, target: str) -> str:
        """Returns the real path of a link's target.

        Args:
          path: the link.
          target: the text of the link, as `os.readlink` returns it.
        Raises: OSError if the target does not exist.
        """
        # Fast path: if the target is no link itself, only its folder needs resolving, which is
        # cached.
        head, tail = os.path.split(os.path.join(os.path.dirname(path), target))
        if tail not in ("", os.curdir, os.pardir):
            real = os.path.join(self._resolve_folder(head), tail)
            if not stat.S_ISLNK(os.lstat(real).st_mode):
                return real
        return os.path.realpath(path, strict=True)


def is_hidden(name: str) -> bool:
    """Returns whether a name, without a path, begins with a dot or is one of SYSTEM_NAMES."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def get_suffix(name: str) -> str:
    """Returns the suffix of a name in lower case, such as '.png', or ''."""
    return os.path.splitext(name)[1].lower()


def scan(folder: pathlib.Path, root: pathlib.Path) -> Listing:
    """Lists the images below a folder, following links that stay inside `root`.

    Raises: ValueError that lists all faults: links that leave the root or have no target, folders
      that are reached twice, and entries that cannot be read.
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
    # "\0" sorts before all other characters, so this sorts by the parts of the path.
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
    """Yields (name, _Directory) of a folder and of all folders below it, level by level.

    The name is relative to the folder, '' for the folder itself.
    """
    level, linked, seen = [("", start)], [], {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        while level:
            parts = threads.map(functools.partial(_read_directory, links), level)
            folders, twice = [], []
            for (name, _), part in zip(level, parts, strict=True):
                yield name, part
                folders += [(child, real) for child, real, is_link in part.folders if not is_link]
                linked += [(child, real) for child, real, is_link in part.folders if is_link]
            # Links are followed last: if a folder is reached directly and by a link, the error
            # then names the link.
            if not folders:
                folders, linked = sorted(linked), []
            level = []
            for child, real in folders:
                # A folder read twice in a class would duplicate its images. This also stops cycles.
                first = seen.setdefault((_first(child), real), child)
                if first == child:
                    level.append((child, real))
                else:
                    twice.append(f"{child}: the same folder as {first}")
            yield "", _Directory(faults=twice)


def list_folders(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Returns the sorted names of the direct subfolders of a folder, as `scan` does.

    Raises: ValueError as `scan`, but only for faults directly in the folder.
    """
    links, start = _resolve(folder, root)
    contents = _read_directory(links, ("", start))
    _check_faults(folder, root, contents.faults)
    return sorted(name for name, _, _ in contents.folders)


def _resolve(folder, root):
    """Returns (_Links of root, real path of folder).

    Raises: ValueError if the folder is outside root.
    """
    links, start = _Links(root), os.path.realpath(folder)
    if not links.is_inside(start):
        raise UserError(
            f"image folder {files.printable(folder)} leads to {files.printable(start)}, outside of "
            f"{files.printable(root)}: only what is inside is read."
        )
    return links, start


def _check_faults(folder, root, faults):
    """Raises a ValueError that lists the faults, if there are any."""
    if faults:
        raise UserError(
            f"image folder {files.printable(folder)} has {count(len(faults), 'fault')}:\n"
            f"{list_some(sorted(faults))}\n"
            f"Nothing outside of {files.printable(root)} is read: copy files there, or choose a "
            "folder that holds both. Remove links that lead nowhere, or to a folder that is read "
            "already."
        )


def _first(name):
    """Returns the first part of a relative path: the direct subfolder, which is the class."""
    return name.partition("/")[0]


def _read_directory(links, directory) -> _Directory:
    """Returns the contents of a directory, given as (name, real path)."""
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
    """Adds an os.DirEntry to the contents of its directory, as an image, a folder or a fault."""
    suffix, real = get_suffix(entry.name), entry.path
    if entry.is_symlink():
        # Checked before the link is followed, so that nothing outside the root is opened.
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
    """Logs what was skipped, one line per reason, once per process."""
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


@functools.cache  # logs once, although a command may open the same dataset several times
def say(message: str, level: int) -> None:
    """Logs a message about a dataset, once per process."""
    logger.log(level, "%s", files.printable(message))


def list_some(lines: list[str], total: int | None = None) -> str:
    """Returns the first SHOWN lines, indented, and the number of further lines.

    Args:
      total: the length of the full list, of which `lines` are the first; None for len(lines).
    """
    total = len(lines) if total is None else total
    shown = [f"  {files.printable(line)}" for line in lines[:SHOWN]]
    if total > SHOWN:
        shown.append(f"  and {total - SHOWN:,} more")
    return "\n".join(shown)


def count(number: int, noun: str) -> str:
    """Returns a number with its noun: '1 image' or '2 images'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _counts(counter):
    """Returns the most common suffixes with their counts: '3 .gif, 1 .tiff'."""
    common = counter.most_common(SHOWN)
    return ", ".join(f"{number:,} {suffix}" for suffix, number in common)
