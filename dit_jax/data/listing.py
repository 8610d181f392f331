"""Directory scan of an image folder: which files are read, skipped or refused.

The rules are in the docstring of `folders`. A scan reads every directory once and takes the size
and time of every image.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import re
import stat
from collections.abc import Collection

import numpy as np

from dit_jax.data import pixels, sources
from dit_jax.errors import UserError
from dit_jax.system import files

THREADS = 16  # directories read at the same time, because network file systems are slow
SHOWN = 10  # the most entries of a list in a message
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
# Suffixes of unsupported image formats. The log has a warning if such files are skipped, and an
# info if other files are.
UNSUPPORTED = re.compile(
    r"\.(apng|arw|avif|cr2|cr3|dng|eps|exr|gif|hdr|heic|heif|icns|ico|jfif|jp2|jpe|jpx|jxl|mpo|nef"
    r"|orf|pbm|pcx|pgm|pnm|ppm|psd|qoi|raf|raw|rw2|svg|tga|tif|tiff|xcf)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The images below a folder, and counts of what was skipped."""

    origin: str  # the folder's name in messages
    folder: pathlib.Path  # with links resolved
    names: list[str]  # N image paths relative to folder, with "/", sorted by their parts
    sizes: np.ndarray  # [N] int64, file sizes in bytes
    times: np.ndarray  # [N] int64, times of the last change (ctime) in ns
    folders: list[str]  # the names of the direct subfolders, sorted
    # Direct subfolder ('' for the folder itself) -> suffix -> number of unsupported images.
    unsupported: dict[str, collections.Counter]
    others: collections.Counter  # suffix -> number of files that are not images
    hidden: collections.Counter  # name -> number of hidden or system files and folders


class _LinkResolver:
    """Resolver of links, with a check that a path stays inside a root folder."""

    def __init__(self, root: pathlib.Path):
        self.root = os.path.realpath(root)
        # Cached, because many links often lead into the same folder.
        self._resolve_folder = functools.lru_cache(functools.partial(os.path.realpath, strict=True))

    def is_inside(self, real_path: str) -> bool:
        """Returns whether a path, with links resolved, is the root or below it."""
        return real_path == self.root or real_path.startswith(self.root.rstrip(os.sep) + os.sep)

    def resolve(self, path: str, target: str) -> str | None:
        """Returns the real path that a link leads to; None if it leads nowhere.

        Args: path, of the link; target, from `os.readlink`.
        """
        # Fast path: if the target is no link, it is enough to resolve its folder, which is cached.
        folder, name = os.path.split(os.path.join(os.path.dirname(path), target))
        try:
            if name not in ("", os.curdir, os.pardir):
                real_path = os.path.join(self._resolve_folder(folder), name)
                if not stat.S_ISLNK(os.lstat(real_path).st_mode):
                    return real_path
            return os.path.realpath(path, strict=True)
        except OSError:
            return None


def is_hidden(name: str) -> bool:
    """Returns whether a name without folders begins with a dot or is one of SYSTEM_NAMES."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def get_suffix(name: str) -> str:
    """Returns the suffix of a name in lower case, such as '.png', or ''."""
    return os.path.splitext(name)[1].lower()


def describe(folder: pathlib.Path) -> str:
    """Returns an image folder's name for messages."""
    return f"image folder {files.printable(folder)}"


def scan(folder: pathlib.Path, root: pathlib.Path) -> Listing:
    """Lists the images below a folder, following links that stay inside `root`.

    Raises: ValueError that lists all faults, such as links that leave the root.
    """
    links, real_folder = _resolve(folder, root)
    entries = collections.defaultdict(list)  # kind -> [(name, detail)]
    for kind, name, detail in _walk(links, real_folder):
        entries[kind].append((name, detail))
    _check_faults(folder, root, entries["fault"])
    # "\0" sorts before all other characters, so this sorts by the parts of the path.
    images = sorted(entries["image"], key=lambda image: image[0].replace("/", "\0"))
    status = np.array([status for _, status in images], np.int64).reshape(-1, 2)
    unsupported = collections.defaultdict(collections.Counter)
    for name, suffix in entries["unsupported"]:
        unsupported[_get_top_folder(os.path.dirname(name))][suffix] += 1
    return Listing(
        origin=describe(folder),
        folder=pathlib.Path(real_folder),
        names=[name for name, _ in images],
        sizes=status[:, 0],
        times=status[:, 1],
        folders=sorted(name for name, _ in entries["folder"] if "/" not in name),
        unsupported=dict(unsupported),
        others=collections.Counter(suffix for _, suffix in entries["other"]),
        hidden=collections.Counter(name for _, name in entries["hidden"]),
    )


def list_folders(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Returns the sorted names of a folder's direct subfolders, as `scan` does.

    Raises: ValueError as `scan`, but only for faults directly in the folder.
    """
    links, real_folder = _resolve(folder, root)
    entries = _read_directory(links, ("", real_folder))
    _check_faults(folder, root, [(name, fault) for kind, name, fault in entries if kind == "fault"])
    return sorted(name for kind, name, _ in entries if kind == "folder")


def _resolve(folder, root):
    """Returns (_LinkResolver of root, real path of folder)."""
    links, real_folder = _LinkResolver(root), os.path.realpath(folder)
    if not links.is_inside(real_folder):
        raise UserError(
            f"{describe(folder)} leads to {files.printable(real_folder)}, outside of "
            f"{files.printable(root)}. Nothing outside is read."
        )
    return links, real_folder


def _check_faults(folder, root, faults):
    """Raises a ValueError that lists the faults, [(name, fault)], if there are any."""
    if faults:
        raise UserError(
            f"{describe(folder)} has {count(len(faults), 'fault')}:\n"
            f"{list_some(sorted(f'{name}: {fault}' for name, fault in faults))}\n"
            f"Nothing outside of {files.printable(root)} is read. Copy the files there, or choose "
            "a folder that holds both. Remove links that lead nowhere, and links to a folder that "
            "is read already."
        )


def _walk(links, real_folder):
    """Yields the entries of a folder and of all folders below it, level by level.

    An entry is (kind, name relative to the folder, detail). The kinds and their details:
      'image': (size in bytes, ctime in ns);   'folder': (real path, whether it is a link);
      'unsupported', 'other': suffix;   'hidden': name without its path;   'fault': a sentence.
    """
    # Folders are [(name, real path)]. The class and real path of a folder give its first name.
    level, linked, first_names = [("", real_folder)], [], {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        while level:
            folders = []
            contents = threads.map(functools.partial(_read_directory, links), level)
            for kind, name, detail in itertools.chain.from_iterable(contents):
                yield kind, name, detail
                if kind == "folder":
                    real_path, is_link = detail
                    (linked if is_link else folders).append((name, real_path))
            # Links are followed last. So if a folder is reached both directly and by a link, the
            # error names the link.
            if not folders:
                folders, linked = sorted(linked), []
            level = []
            for name, real_path in folders:
                # A folder read twice in a class would duplicate its images. This also stops cycles.
                first = first_names.setdefault((_get_top_folder(name), real_path), name)
                if first == name:
                    level.append((name, real_path))
                else:
                    yield "fault", name, f"the same folder as {first}"


def _get_top_folder(name):
    """Returns the first part of a relative path: the direct subfolder, which is the class."""
    return name.partition("/")[0]


def _read_directory(links, directory):
    """Returns the entries of a directory (name, real path), as `_walk` yields them."""
    name, real_path = directory
    prefix = f"{name}/" if name else ""
    try:
        with os.scandir(real_path) as entries:
            return [_classify(links, entry, prefix + entry.name) for entry in entries]
    except OSError as error:
        return [("fault", name or ".", error.strerror or str(error))]


def _classify(links, entry, name):
    """Returns the entry of an os.DirEntry, as `_walk` yields it."""
    if is_hidden(entry.name):
        return "hidden", name, entry.name
    try:
        real_path = entry.path
        if entry.is_symlink():
            # Checked before the link is followed, so that nothing outside the root is opened.
            target = os.readlink(entry.path)
            real_path = links.resolve(entry.path, target)
            if not real_path:
                return "fault", name, f"a link that leads nowhere, to {target}"
            if not links.is_inside(real_path):
                return "fault", name, f"a link that leads outside, to {target}"
        if entry.is_dir():
            return "folder", name, (real_path, entry.is_symlink())
        suffix = get_suffix(entry.name)
        if suffix not in pixels.SUFFIXES:
            kind = "unsupported" if UNSUPPORTED.fullmatch(suffix) else "other"
            return kind, name, suffix or "no suffix"
        if not entry.is_file():
            return "fault", name, "neither a file nor a folder"
        status = entry.stat()
        return "image", name, (status.st_size, status.st_ctime_ns)
    except OSError as error:
        return "fault", name, error.strerror or str(error)


def report(listing: Listing, expected: Collection[str] = ()) -> None:
    """Logs the skipped files, once per process, except files with the suffixes in `expected`."""
    if listing.hidden:
        names = [name for name, _ in listing.hidden.most_common(3)]
        hidden = count(listing.hidden.total(), "hidden or system name")
        message = f"{listing.origin}: {hidden} left out, such as {files.list_some(names)}."
        sources.log_once(message, logging.INFO)
    if unsupported := sum(listing.unsupported.values(), collections.Counter()):
        sources.log_once(
            f"{listing.origin}: {count(unsupported.total(), 'image')} of other kinds left out: "
            f"{list_counts(unsupported)}. Convert them; {pixels.READ} are read."
        )
    if others := listing.others - collections.Counter(expected):
        message = f"{count(others.total(), 'other file')} left out: {list_counts(others)}."
        sources.log_once(f"{listing.origin}: {message}", logging.INFO)


def list_some(lines: list[str], total: int | None = None) -> str:
    """Returns the first SHOWN lines, indented, and the number of the others.

    Args: total, the number of all lines, if `lines` are not all.
    """
    total = len(lines) if total is None else total
    shown = [f"  {files.printable(line)}" for line in lines[:SHOWN]]
    if total > SHOWN:
        shown.append(f"  and {total - SHOWN:,} more")
    return "\n".join(shown)


def list_counts(counter: collections.Counter) -> str:
    """Returns the most common suffixes with their counts: '3 .gif, 1 .tiff'."""
    return ", ".join(f"{number:,} {suffix}" for suffix, number in counter.most_common(SHOWN))


def count(number: int, noun: str) -> str:
    """Returns a number with its noun: '1 image' or '2 images'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
