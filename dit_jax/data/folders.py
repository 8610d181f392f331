"""Image folders as random-access records: encoded image bytes with their annotations.

The same rules hold wherever a folder of images is read; docs/data.md explains them:

- `data.name` is the root. It has one folder per split, with images at any depth below it.
- Images are sorted by the parts of their paths. Their names end in .png, .jpg, .jpeg, .webp or
  .bmp, in upper or lower case. Other files, also images of other formats, are skipped and counted
  in the log.
- Files and folders are also skipped and counted if they are hidden (their names begin with a dot)
  or made by an operating system (`__MACOSX`, `Thumbs.db`), at every depth.
- Links are followed if their target is inside the root. It is an error if a link leaves the root,
  if it has no target, or if it leads to a folder that the same class already contains.
- The classes are the direct subfolders of the training split, sorted by name. Other splits use
  the same class names. It is an error if a class folder has no images, if a split has an unknown
  class, or if an image is outside the class folders. A split that lacks a class is only reported.
- A model without classes reads all images below the split, in subfolders or not.
- A model with captions or further images reads the images that `metadata.jsonl` lists, in that
  order. A further image of a record is a file of the split too; a line names it under its feature.

Opening a folder checks all rules. One error lists all links that break a rule and all entries that
cannot be read. Any other violation has an error of its own.
"""

import dataclasses
import os
import pathlib
import unicodedata

import numpy as np

from dit_jax.config import sizes
from dit_jax.data import listing, metadata, pixels, sources
from dit_jax.data.annotations import Annotations
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(sources.Files):
    """Random access to the N records of a split: `folder[i]` is a record.

    `names` are N files for the first of image_features, then N files for the next, and so on.
    """

    class_names: tuple[str, ...] | None = None  # a label is an index into them
    image_features: tuple[str, ...] = ("image",)

    def __len__(self) -> int:
        return len(self.names) // len(self.image_features)

    def __getitem__(self, index: int) -> dict:
        """Returns {'image': encoded bytes, 'label': int}, plus further images and the captions.

        Raises: OSError if a file cannot be read; ValueError if it is too large.
        """
        record = {
            feature: pixels.read_file(self.path(i * len(self) + index))
            for i, feature in enumerate(self.image_features)
        }
        # Without classes the label is 0, and the model ignores it.
        record["label"] = self.labels[index] if self.labels is not None else 0
        return record | (self.captions[index] if self.captions is not None else {})


def open_split(data_config, split: str, annotations: Annotations) -> sources.Source:
    """Opens a split of an image folder with these annotations.

    Raises: FileNotFoundError if the split has no folder; ValueError if a link breaks the rules, if
      a folder cannot be read, if metadata.jsonl has invalid lines, or if the folders do not match
      the model's classes.
    """
    root = files.to_path(data_config.name, "data.name")
    feature, num_classes = annotations.caption_feature, annotations.num_classes
    if feature and num_classes:
        raise UserError(
            f"data.caption_feature={feature!r} reads captions, but model.num_classes={num_classes} "
            "needs classes, which an image folder with captions does not have. For classes by "
            "folder, leave data.caption_feature empty. For captions, set model.condition. For "
            "neither, set model.num_classes=0 and model.null_condition=False."
        )
    if annotations.images and num_classes:
        raise UserError(
            f"an image folder with further images, {', '.join(annotations.images)}, has no classes "
            f"for model.num_classes={num_classes}. Set model.num_classes=0, or take a TFDS dataset."
        )
    reads_metadata = bool(feature or annotations.images)
    # metadata.jsonl is read, so the log does not count it as skipped.
    listed = _scan(root, split, [".jsonl"] if reads_metadata else [])
    if reads_metadata:
        folder = _make_folder_from_metadata(listed, annotations)
    elif num_classes:
        folder = _make_labelled_folder(listed, root, split, data_config.train_split, num_classes)
    else:
        folder = _make_folder(listed)
    return sources.Source(
        folder,
        "image",
        sizes.image_shape(data_config),
        annotations,
        listed.origin,
        class_names=folder.class_names,
        files=folder,
    )


def open_single_folder(path: pathlib.Path) -> Folder:
    """Opens a folder of images that has no splits, such as samples.

    Its direct subfolders are the classes, unless there are images outside them.
    Raises: FileNotFoundError if there are no images; ValueError for the same reasons as
      `open_split`.
    """
    listed = _scan(path, ".")
    if not listed.names:
        raise MissingFileError(
            f"no images in {files.printable(path)}: names of images end in "
            f"{', '.join(sorted(pixels.SUFFIXES))}."
        )
    # An image outside all subfolders has no class. If there is one, no image gets a class.
    if not (unclassed := _list_unclassed(listed)):
        class_names = tuple(_normalize(listed.folders, listed.origin).values())
        labels = _label(listed, {name: i for i, name in enumerate(class_names)})
        return _make_folder(listed, class_names=class_names, labels=labels)
    if num_in_subfolders := len(listed.names) - len(unclassed):
        sources.log_once(
            f"{listed.origin}: {listing.count(len(unclassed), 'image')} outside the subfolders, "
            f"{num_in_subfolders:,} in them: all are taken, without classes."
        )
    return _make_folder(listed)


def check_output_outside_data(config, directory: pathlib.Path) -> None:
    """Raises ValueError if an output directory is inside a split of the config's image folder.

    The next command would read the output as images and classes.
    """
    data = config.get("data") or {}
    if data.get("source") != "folder":
        return
    root, directory = files.to_path(data.name, "data.name"), directory.resolve()
    for split in filter(None, (data.train_split, data.eval_split)):
        split_folder = (root / split).resolve()
        if split_folder in (directory, *directory.parents):
            raise UserError(
                f"{files.printable(directory)} lies in the image folder "
                f"{files.printable(split_folder)}, where it would be read as a class. Choose a "
                "directory outside of the image folder."
            )


def normalize_class_name(name: str) -> str:
    """Returns a class name in Unicode's form NFC, in which class names are compared."""
    return unicodedata.normalize("NFC", name)


def _scan(root, split, expected=()):
    """Lists a split, and logs the skipped files except those with a suffix in `expected`."""
    listed = listing.scan(_find_split_folder(root, split), root)
    listing.report(listed, expected)
    return listed


def _find_split_folder(root, split):
    """Returns the path of a split's folder, after a check that it exists in the root."""
    if os.path.isabs(split) or ".." in pathlib.PurePath(split).parts:
        raise UserError(
            f"the split {split!r} leads out of data.name={files.printable(root)}: it must be the "
            "name of a folder inside."
        )
    folder = root / split
    if not folder.is_dir():
        raise MissingFileError(
            f"no {listing.describe(folder)}: data.name is the root, with one folder per split "
            "(data.train_split, data.eval_split) that holds one folder of images per class."
        )
    return folder


def _make_folder(listed, **fields):
    """Returns the Folder with a listing's images and further fields."""
    return Folder(listed.folder, listed.names, listed.sizes, listed.times, **fields)


def _make_labelled_folder(listed, root, split, train_split, num_classes):
    """Returns the Folder with a listing's images, labelled by the training split's subfolders."""
    origin = listed.origin
    if not listed.folders:
        if listed.names:
            raise UserError(
                f"{origin} has {listing.count(len(listed.names), 'image')} and no class folders, "
                f"which model.num_classes={num_classes} needs. Move the images of each class into "
                "a folder of their own. To train without labels, set model.num_classes=0, "
                "model.null_condition=False and sample.cfg_scale=1."
            )
        return _make_folder(listed)
    # The training split defines the classes, so its subfolders are listed for any other split too.
    train_names, train_origin = listed.folders, origin
    if os.path.normpath(split) != os.path.normpath(train_split):
        folder = _find_split_folder(root, train_split)
        train_names, train_origin = listing.list_folders(folder, root), listing.describe(folder)
    classes, folders = _normalize(train_names, train_origin), _normalize(listed.folders, origin)
    if unknown := [name for key, name in folders.items() if key not in classes]:
        raise UserError(
            f"{origin} has folders that are no classes of {train_origin}: "
            f"{files.list_some(unknown, listing.SHOWN)}. data.train_split={train_split!r} defines "
            "the classes. Rename the folders, or remove them."
        )
    # A label is an index into the training split's classes. This split may spell their names in
    # another Unicode form, and its images are labelled by its own spelling.
    labels = _label(listed, {folders[key]: i for i, key in enumerate(classes) if key in folders})
    if len(classes) != num_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but {train_origin} has {len(classes)} classes: "
            f"{files.list_some(classes.values(), listing.SHOWN)}. Set model.num_classes="
            f"{len(classes)}, or correct the folders: a label without images is never trained, but "
            "would be sampled."
        )
    if missing := [name for key, name in classes.items() if key not in folders]:
        sources.log_once(
            f"{origin} has no images of {len(missing)} of the {len(classes)} classes: "
            f"{files.list_some(missing, listing.SHOWN)}"
        )
    return _make_folder(listed, class_names=tuple(classes.values()), labels=labels)


def _normalize(names, origin):
    """Returns {folder name in NFC: folder name as spelled on disk}."""
    spellings = {}
    for name in names:
        if (earlier := spellings.setdefault(normalize_class_name(name), name)) != name:
            raise UserError(
                f"{origin} has two folders with the same name in two Unicode spellings, "
                f"{earlier!a} and {name!a}. Rename one."
            )
    return spellings


def _list_unclassed(listed):
    """Returns the names of the images that are in no class folder."""
    return [name for name in listed.names if "/" not in name]


def _label(listed, label_by_folder):
    """Returns the labels [N] int32 of the images, from the names of their class folders."""
    if unclassed := _list_unclassed(listed):
        raise UserError(
            f"{listed.origin} has {listing.count(len(unclassed), 'image')} outside its class "
            f"folders: {files.list_some(unclassed, listing.SHOWN)}. Move or remove them."
        )
    folders = [name.partition("/")[0] for name in listed.names]
    if empty := sorted(set(label_by_folder) - set(folders)):
        counts = {name: listed.unsupported.get(name) for name in empty}
        descriptions = [
            f"{name} (but {listing.list_counts(count)})" if count else name
            for name, count in counts.items()
        ]
        raise UserError(
            f"{listed.origin} has folders without images: "
            f"{files.list_some(descriptions, listing.SHOWN)}. Every folder there is a class. Add "
            f"images ({pixels.READ}) to these folders, or remove the folders."
        )
    return np.array([label_by_folder[name] for name in folders], np.int32)


def _make_folder_from_metadata(listed, annotations):
    """Returns the Folder with the images of metadata.jsonl, their captions and further images."""
    index_by_name = {name: i for i, name in enumerate(listed.names)}
    image_names = metadata.ImageNames(index_by_name)
    feature, further = annotations.caption_feature, tuple(annotations.images)
    parsers = dict.fromkeys(further, image_names.parse)
    if feature:
        parsers[feature] = metadata.parse_captions
    rows = metadata.read(listed.folder / metadata.NAME, parsers, image_names)
    names = [*rows, *(row[key] for key in further for row in rows.values())]
    if unlisted := len(listed.names) - len(set(names)):
        images = listing.count(unlisted, "image")
        sources.log_once(f"{listed.origin}: {images} left out, not in {metadata.NAME}.")
    order = np.array([index_by_name[name] for name in names], int)
    return Folder(
        listed.folder,
        names,
        listed.sizes[order],
        listed.times[order],
        captions=[{feature: row[feature]} for row in rows.values()] if feature else None,
        image_features=("image", *further),
    )
