"""Image folders as random-access records: encoded image bytes with a label or with captions.

The same rules hold wherever a folder of images is read (docs/data.md explains them):

- `data.name` is the root. It has one folder per split, with images at any depth below it.
- Images are sorted by the parts of their paths. Their names end in .png, .jpg, .jpeg, .webp or
  .bmp, in upper or lower case. Other files and other image formats are skipped; the log counts
  them.
- Hidden names (they begin with a dot) and names that operating systems create (`__MACOSX`,
  `Thumbs.db`) are skipped at every depth, files and folders alike. The log counts them too.
- Links are followed if their target is inside the root. It is an error if a link leaves the root,
  has no target, or leads a second time to a folder of the same class.
- The classes are the direct subfolders of the training split, sorted by name. Other splits use
  the same class names. It is an error if a class folder has no images, if a split has an unknown
  class, or if an image is outside the class folders. A split that lacks a class is only reported.
- A model without classes reads all images below the split, inside class folders or not.
- With captions, the images are the ones that `metadata.jsonl` lists, in its order.

Opening the folder checks all rules and reports all violations at once.
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

SHOWN = 10  # the most names in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """Random access to the N images of a split: `folder[i]` is a record."""

    root: pathlib.Path  # the folder of the split, with links resolved
    files: Sequence[str]  # N image paths relative to root, with "/" as separator
    sizes: np.ndarray  # [N] int64, file sizes in bytes
    times: np.ndarray  # [N] int64, times of the last change (ctime) in ns
    classes: tuple[str, ...] | None = None  # class names; a label is an index into them
    labels: Sequence[int] | None = None  # [N], indices into classes
    captions: Sequence[dict] | None = None  # N times {feature: caption or list of captions}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """Returns {'image': encoded bytes, 'label': int}, plus the caption feature if there is one.

        Raises: OSError; ValueError for a file that is too large.
        """
        record = {"image": pixels.read_file(self.path(index))}
        # Without classes the label is 0, and the model ignores it.
        record["label"] = self.labels[index] if self.labels is not None else 0
        return record | (self.captions[index] if self.captions is not None else {})

    def path(self, index: int) -> pathlib.Path:
        """Returns the path of an image file."""
        return self.root / self.files[index]


def open_images(root: pathlib.Path, split: str) -> Folder:
    """Opens all images of a split, without labels.

    Raises: FileNotFoundError if the split has no folder; ValueError for links that break the
      rules and for folders that cannot be read.
    """
    listed, origin = _list(root, split)
    listing.report(listed, origin)
    return _folder(listed)


def open_classes(root: pathlib.Path, split: str, train_split: str, num_classes: int) -> Folder:
    """Opens the images of a split, labelled by their class folders.

    Args:
      train_split: the split whose subfolders define the classes.
      num_classes: the number of classes in the model.
    Raises: as `open_images`; ValueError unless the folders match the model's classes.
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
    # The training split defines the classes, so its subfolders are listed for any other split too.
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
    # Labels follow the training split; the keys are folder names as this split spells them.
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
    """Opens the images that metadata.jsonl of a split lists, with their captions.

    Args:
      feature: the key of the captions in metadata.jsonl.
    Raises: as `open_images`; ValueError that lists the invalid lines of metadata.jsonl.
    """
    listed, origin = _list(root, split)
    numbers = {name: i for i, name in enumerate(listed.names)}
    names, texts = captions.read(listed.folder / captions.NAME, feature, numbers)
    # metadata.jsonl itself was read, so the report must not count it as a skipped file.
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
    """Opens a single folder of images, such as samples; its direct subfolders are the classes.

    Raises: FileNotFoundError if there are no images; ValueError if some subfolders have no images
      (as `open_classes`).
    """
    listed, origin = _list(path, ".")
    listing.report(listed, origin)
    if not listed.names:
        raise MissingFileError(
            f"no images in {files.printable(path)}: {', '.join(sorted(pixels.SUFFIXES))}."
        )
    # Images outside all subfolders have no class, so then no image gets one.
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


def normalize_class_name(name: str) -> str:
    """Returns a class name in Unicode's NFC form, in which class names are compared."""
    return unicodedata.normalize("NFC", name)


def _list(root, split):
    """Returns (listing of a split, its name in messages)."""
    folder, origin = _find(root, split)
    return listing.scan(folder, root), origin


def _find(root, split):
    """Returns (folder of a split, its name in messages).

    Raises: ValueError if the split is outside root; FileNotFoundError if it has no folder.
    """
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
    """Returns {NFC name: name as spelled on disk} for folder names.

    Raises: ValueError if two folders have the same NFC name.
    """
    compared = {}
    for name in names:
        if (first := compared.setdefault(normalize_class_name(name), name)) != name:
            raise UserError(
                f"{origin} has two folders of one name in two spellings of Unicode, "
                f"{first!a} and {name!a}: rename one."
            )
    return compared


def _label(listed, origin, numbers):
    """Returns labels [N] int32 from the class folder of each image.

    Args:
      numbers: {class folder: label}.
    Raises: ValueError for images outside the class folders and for folders without images.
    """
    if beside := [name for name in listed.names if "/" not in name]:
        raise UserError(
            f"{origin} has {listing.count(len(beside), 'image')} in no class, beside the folders "
            f"of classes: {files.list_some(beside, SHOWN)}. Move or remove them."
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
    """Returns the number of images in unsupported formats, for a message; '' for none."""
    return (
        f" (but {', '.join(f'{n:,} {suffix}' for suffix, n in counter.items())})" if counter else ""
    )


def _folder(listed, **fields):
    """Returns the Folder of a listing."""
    return Folder(listed.folder, listed.names, listed.sizes, listed.times, **fields)
