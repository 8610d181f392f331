"""Image folders as records: encoded bytes, with a class each or with captions.

The rules, wherever a folder of images is read (docs/data.md explains them):

- `data.name` is the root, with a folder for each split. Images are in any depth below it, in the
  order of their names' parts. They end in .png, .jpg, .jpeg, .webp or .bmp, in any case; images of
  other kinds, and other files, are left out and counted in the log.
- Hidden names, which begin with a dot, and those that systems leave (`__MACOSX`, `Thumbs.db`) are
  left out at every depth, files and folders, and counted.
- Links are followed as long as they stay inside the root. A link that leaves it, leads nowhere, or
  leads a second time to a folder of the same class is an error.
- Classes are the folders right in the training split, in sorted order. The other splits have the
  same ones, by name. It is an error if a class has no images there, if a split has another class,
  or if an image lies beside the class folders; that another split lacks a class is reported.
- A model without classes takes all images below the split, in class folders or not.
- With captions, the images are those that `metadata.jsonl` lists, in its order.

All this is checked when the folder is opened, and all that is wrong is reported at once.
"""

import collections
import dataclasses
import logging
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from dit_jax.data import captions, listing, pixels
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

SHOWN = 10  # names in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """Random access to the N images of a split: `folder[i]` is a record."""

    root: pathlib.Path  # the folder of the split, without links
    files: Sequence[str]  # of N images relative to it, with "/"
    sizes: np.ndarray  # [N] int64, bytes
    times: np.ndarray  # [N] int64, of the last change (ctime), ns
    classes: tuple[str, ...] | None = None  # names, in the order of their labels
    labels: Sequence[int] | None = None  # [N], of classes
    captions: Sequence[dict] | None = None  # of each image {feature: caption or captions}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """{'image': encoded bytes, 'label', the captions' feature}.   Raises: OSError; ValueError
        for a file that is too large."""
        record = {"image": pixels.read_file(self.path(index))}
        record["label"] = self.labels[index] if self.labels is not None else 0
        return record | (self.captions[index] if self.captions is not None else {})

    def path(self, index: int) -> pathlib.Path:
        """The file of an image."""
        return self.root / self.files[index]


def open_images(root: pathlib.Path, split: str) -> Folder:
    """Opens all images of a split, without labels.

    Raises: FileNotFoundError; ValueError for links and folders that cannot be read.
    """
    listed, origin = _list(root, split)
    listing.report(listed, origin)
    return _folder(listed)


def open_classes(root: pathlib.Path, split: str, train_split: str, num_classes: int) -> Folder:
    """Opens the images of a split with the labels of their class folders.

    Args: train_split, whose folders are the classes.   num_classes, of the model.
    Raises: as `open_images`; ValueError unless the folders are the model's classes.
    """
    listed, origin = _list(root, split)
    listing.report(listed, origin)
    if not listed.folders:
        if listed.names:
            raise UserError(
                f"{origin} has {listing.count(len(listed.names), 'image')} and no folders of "
                f"classes, which model.num_classes={num_classes} needs. Move the images of each "
                "class into a folder of its own, or train without labels: model.num_classes=0, "
                "model.null_condition=False, sample.cfg_scale=1."
            )
        return _folder(listed)
    training, training_origin = listed.folders, origin
    if os.path.normpath(split) != os.path.normpath(train_split):
        folder, training_origin = _find(root, train_split)
        training = listing.list_folders(folder, root)
    classes, folders = _by_name(training, training_origin), _by_name(listed.folders, origin)
    if others := [name for key, name in folders.items() if key not in classes]:
        raise UserError(
            f"{origin} has folders that are no classes of {training_origin}: "
            f"{files.list_some(others, SHOWN)}. Rename or remove them; the classes are those of "
            f"data.train_split={train_split!r}."
        )
    numbers = {folders[key]: i for i, key in enumerate(classes) if key in folders}
    labels = _label(listed, origin, numbers)
    if len(classes) != num_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but {training_origin} has {len(classes)} classes: "
            f"{files.list_some(classes.values(), SHOWN)}. Set model.num_classes={len(classes)}, or "
            "correct the folders: a label without images would be drawn untrained."
        )
    if missing := [name for key, name in classes.items() if key not in folders]:
        message = f"{origin} has no images of {len(missing)} of the {len(classes)} classes: "
        listing.say(message + files.list_some(missing, SHOWN), logging.WARNING)
    return _folder(listed, classes=tuple(classes.values()), labels=labels)


def open_captions(root: pathlib.Path, split: str, feature: str) -> Folder:
    """Opens the images of a split that metadata.jsonl lists, with their captions.

    Args: feature, the key of the captions.
    Raises: as `open_images`; ValueError that lists the lines of metadata.jsonl which are wrong.
    """
    listed, origin = _list(root, split)
    numbers = {name: i for i, name in enumerate(listed.names)}
    names, texts = captions.read(listed.folder / captions.NAME, feature, numbers)
    # After the lines are read: metadata.jsonl is no file that is left out.
    others = listed.others - collections.Counter({".jsonl": 1})
    listing.report(dataclasses.replace(listed, others=others), origin)
    if unlisted := len(listed.names) - len(names):
        message = f"{origin}: {listing.count(unlisted, 'image')} left out, not in {captions.NAME}."
        listing.say(message, logging.WARNING)
    order = np.array([numbers[name] for name in names], int)
    return Folder(
        listed.folder,
        names,
        listed.sizes[order],
        listed.times[order],
        captions=[{feature: text} for text in texts],
    )


def open_set(path: pathlib.Path) -> Folder:
    """Opens a folder of images on its own, such as samples; folders right in it are classes.

    Raises: FileNotFoundError without images; ValueError as `open_classes`, for folders of which
      some have no images.
    """
    listed, origin = _list(path, ".")
    listing.report(listed, origin)
    if not listed.names:
        raise MissingFileError(
            f"no images in {files.printable(path)}: {', '.join(sorted(pixels.SUFFIXES))}."
        )
    beside = [name for name in listed.names if "/" not in name]
    if not beside:
        numbers = {name: i for i, name in enumerate(_by_name(listed.folders, origin).values())}
        return _folder(listed, classes=tuple(numbers), labels=_label(listed, origin, numbers))
    if rest := len(listed.names) - len(beside):
        listing.say(
            f"{origin}: {listing.count(len(beside), 'image')} beside folders with {rest:,}: all "
            "are taken, without classes.",
            logging.WARNING,
        )
    return _folder(listed)


def same_name(name: str) -> str:
    """The name in the spelling in which names of classes are compared, Unicode's NFC."""
    return unicodedata.normalize("NFC", name)


def _list(root, split):
    """(the listing of a split, what messages call it)."""
    folder, origin = _find(root, split)
    return listing.scan(folder, root), origin


def _find(root, split):
    """(the folder of a split, what messages call it)."""
    if os.path.isabs(split) or ".." in pathlib.PurePath(split).parts:
        raise UserError(
            f"the split {split!r} leads out of data.name={files.printable(root)}: it must be the "
            "name of a folder there."
        )
    folder = root / split
    origin = f"image folder {files.printable(folder)}"
    if not folder.is_dir():
        raise MissingFileError(
            f"no {origin}: data.name is the root, with one folder per split (data.train_split, "
            "data.eval_split) that holds one folder of images per class."
        )
    return folder, origin


def _by_name(names, origin):
    """{compared name: name} of folders.   Raises: ValueError for two that are compared as one."""
    compared = {}
    for name in names:
        if (first := compared.setdefault(same_name(name), name)) != name:
            raise UserError(
                f"{origin} has two folders of one name in two spellings of Unicode, "
                f"{first!a} and {name!a}: rename one."
            )
    return compared


def _label(listed, origin, numbers):
    """[N] int32, by the folder of each image.   Raises: ValueError for images beside the folders,
    and for folders without images."""
    if beside := [name for name in listed.names if "/" not in name]:
        raise UserError(
            f"{origin} has {listing.count(len(beside), 'image')} beside its folders of classes, so "
            f"of no class: {files.list_some(beside, SHOWN)}. Move or remove them."
        )
    folders = [name.partition("/")[0] for name in listed.names]
    if empty := sorted(set(numbers) - set(folders)):
        described = [f"{n}{_unread(listed.unread.get(n))}" for n in empty]
        raise UserError(
            f"{origin} has folders without images: {files.list_some(described, SHOWN)}. Every "
            f"folder there is a class: add images ({pixels.READ}), or remove it."
        )
    return np.array([numbers[name] for name in folders], np.int32)


def _unread(counter):
    return (
        f" (but {', '.join(f'{n:,} {suffix}' for suffix, n in counter.items())})" if counter else ""
    )


def _folder(listed, **fields):
    return Folder(listed.folder, listed.names, listed.sizes, listed.times, **fields)
