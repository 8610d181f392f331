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

import dataclasses
import os
import pathlib
import unicodedata

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import captions, listing, pixels, sources
from dit_jax.data.annotations import Annotations
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

SHOWN = 10  # the most names in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(sources.Files):
    """Random access to the N images of a split: `folder[i]` is a record."""

    classes: tuple[str, ...] | None = None  # class names; a label is an index into them

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Returns {'image': encoded bytes, 'label': int}, plus the caption feature if there is one.

        Raises: OSError; ValueError for a file that is too large.
        """
        record = {"image": pixels.read_file(self.path(index))}
        # Without classes the label is 0, and the model ignores it.
        record["label"] = self.labels[index] if self.labels is not None else 0
        return record | (self.captions[index] if self.captions is not None else {})


def open_split(data_config, split: str, annotations: Annotations) -> sources.Source:
    """Opens a split of an image folder, with what the annotations need: captions, classes or none.

    Raises: FileNotFoundError if the split has no folder; ValueError for links that break the
      rules, for folders that cannot be read, for invalid lines of metadata.jsonl, and unless the
      folders match the model's classes.
    """
    root = files.to_path(data_config.name, "data.name")
    feature, num_classes = annotations.caption_feature, annotations.num_classes
    if feature and num_classes:
        raise UserError(
            f"data.caption_feature={feature!r}: an image folder with captions has "
            f"no classes, which model.num_classes={num_classes} needs. Leave it "
            "empty for classes by folder; for captions set model.condition, or model."
            "num_classes=0 with model.null_condition=False."
        )
    # metadata.jsonl is no image, but read.
    listed = _scan(root, split, [".jsonl"] * bool(feature))
    if feature:
        folder = _add_captions(listed, feature)
    elif num_classes:
        folder = _add_classes(listed, root, split, data_config.train_split, num_classes)
    else:
        folder = _to_folder(listed)
    return sources.Source(
        folder,
        "image",
        sizes.image_shape(data_config),
        annotations,
        listed.origin,
        class_names=folder.classes,
        files=folder,
    )


def open_set(path: pathlib.Path) -> Folder:
    """Opens a single folder of images, such as samples; its direct subfolders are the classes.

    Raises: FileNotFoundError if there are no images; ValueError as `open_split`.
    """
    listed = _scan(path, ".")
    if not listed.names:
        raise MissingFileError(
            f"no images in {files.printable(path)}: {', '.join(sorted(pixels.SUFFIXES))}."
        )
    # Images outside all subfolders have no class, so then no image gets one.
    if not (beside := _list_beside(listed)):
        classes = _normalize(listed.folders, listed.origin).values()
        labels = _label(listed, {name: i for i, name in enumerate(classes)})
        return _to_folder(listed, classes=tuple(classes), labels=labels)
    if rest := len(listed.names) - len(beside):
        sources.log_once(
            f"{listed.origin}: {listing.count(len(beside), 'image')} beside folders with {rest:,}: "
            "all are taken, without classes."
        )
    return _to_folder(listed)


def check_outside(config, directory: pathlib.Path) -> None:
    """Raises if an output directory is inside a split of the config's image folder.

    The next command would read the files there as images and classes.
    Raises: ValueError.
    """
    data = config.get("data") or {}
    if data.get("source") != "folder":
        return
    root, directory = files.to_path(data.name, "data.name"), directory.resolve()
    for split in filter(None, (data.train_split, data.eval_split)):
        within = (root / split).resolve()
        if within in (directory, *directory.parents):
            raise UserError(
                f"{files.printable(directory)} lies in the image folder {files.printable(within)}, "
                "where it would be a class: choose a directory outside of it."
            )


def normalize_class_name(name: str) -> str:
    """Returns a class name in Unicode's NFC form, in which class names are compared."""
    return unicodedata.normalize("NFC", name)


def _scan(root, split, expected=()):
    """Lists a split and logs what was skipped; `expected` is that of `listing.report`."""
    listed = listing.scan(_split_folder(root, split), root)
    listing.report(listed, expected)
    return listed


def _split_folder(root, split):
    """Returns the folder of a split."""
    if os.path.isabs(split) or ".." in pathlib.PurePath(split).parts:
        raise UserError(
            f"the split {split!r} leads out of data.name={files.printable(root)}: it must be the "
            "name of a folder there."
        )
    folder = root / split
    if not folder.is_dir():
        raise MissingFileError(
            f"no {listing.describe(folder)}: data.name is the root, with one folder per split "
            "(data.train_split, data.eval_split) that holds one folder of images per class."
        )
    return folder


def _to_folder(listed, **fields):
    """Returns the Folder of a listing."""
    return Folder(listed.folder, listed.names, listed.sizes, listed.times, **fields)


def _add_classes(listed, root, split, train_split, num_classes):
    """Returns the Folder of a listing, labelled by the subfolders of the training split."""
    origin = listed.origin
    if not listed.folders:
        if listed.names:
            raise UserError(
                f"{origin} has {listing.count(len(listed.names), 'image')} and no folders of "
                f"classes, which model.num_classes={num_classes} needs. Move the images of each "
                "class into a folder of its own, or train without labels: model.num_classes=0, "
                "model.null_condition=False, sample.cfg_scale=1."
            )
        return _to_folder(listed)
    # The training split defines the classes, so its subfolders are listed for any other split too.
    training, training_origin = listed.folders, origin
    if os.path.normpath(split) != os.path.normpath(train_split):
        folder = _split_folder(root, train_split)
        training, training_origin = listing.list_folders(folder, root), listing.describe(folder)
    classes, folders = _normalize(training, training_origin), _normalize(listed.folders, origin)
    if others := [name for key, name in folders.items() if key not in classes]:
        raise UserError(
            f"{origin} has folders that are no classes of {training_origin}: "
            f"{files.list_some(others, SHOWN)}. Rename or remove them; the classes are those of "
            f"data.train_split={train_split!r}."
        )
    # Labels follow the training split; the keys are folder names as this split spells them.
    labels = _label(listed, {folders[key]: i for i, key in enumerate(classes) if key in folders})
    if len(classes) != num_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but {training_origin} has {len(classes)} classes: "
            f"{files.list_some(classes.values(), SHOWN)}. Set model.num_classes={len(classes)}, or "
            "correct the folders: a label without images would be drawn untrained."
        )
    if missing := [name for key, name in classes.items() if key not in folders]:
        sources.log_once(
            f"{origin} has no images of {len(missing)} of the {len(classes)} classes: "
            f"{files.list_some(missing, SHOWN)}"
        )
    return _to_folder(listed, classes=tuple(classes.values()), labels=labels)


def _normalize(names, origin):
    """Returns {NFC name: name as spelled on disk} for folder names."""
    spelled = {}
    for name in names:
        if (first := spelled.setdefault(normalize_class_name(name), name)) != name:
            raise UserError(
                f"{origin} has two folders of one name in two spellings of Unicode, "
                f"{first!a} and {name!a}: rename one."
            )
    return spelled


def _list_beside(listed):
    """Returns the images beside the class folders."""
    return [name for name in listed.names if "/" not in name]


def _label(listed, numbers):
    """Returns labels [N] int32 from the class folder of each image; `numbers` has their labels."""
    if beside := _list_beside(listed):
        raise UserError(
            f"{listed.origin} has {listing.count(len(beside), 'image')} in no class, beside the "
            f"folders of classes: {files.list_some(beside, SHOWN)}. Move or remove them."
        )
    folders = [name.partition("/")[0] for name in listed.names]
    if empty := sorted(set(numbers) - set(folders)):
        counts = {name: listed.unsupported.get(name) for name in empty}
        described = [
            f"{name} (but {listing.list_counts(count)})" if count else name
            for name, count in counts.items()
        ]
        raise UserError(
            f"{listed.origin} has folders without images: {files.list_some(described, SHOWN)}. "
            f"Every folder there is a class: add images ({pixels.READ}), or remove it."
        )
    return np.array([numbers[name] for name in folders], np.int32)


def _add_captions(listed, feature):
    """Returns the Folder of the images that metadata.jsonl lists, with their captions."""
    numbers = {name: i for i, name in enumerate(listed.names)}
    names, texts = captions.read(listed.folder / captions.NAME, feature, numbers)
    if unlisted := len(listed.names) - len(names):
        images = listing.count(unlisted, "image")
        sources.log_once(f"{listed.origin}: {images} left out, not in {captions.NAME}.")
    order = np.array([numbers[name] for name in names], int)
    return Folder(
        listed.folder,
        names,
        listed.sizes[order],
        listed.times[order],
        captions=[{feature: text} for text in texts],
    )
