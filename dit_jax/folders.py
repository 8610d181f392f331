"""Image folders as records: encoded bytes, with a class each or with captions."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclasses.dataclass(frozen=True)
class Folder:
    """One class per sub-folder, classes in the order of their sorted names; or with captions."""

    files: Sequence[pathlib.Path]
    labels: Sequence[int]
    captions: Sequence[dict] | None = None  # of each image {feature: caption or captions}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        told = self.captions[index] if self.captions else {}
        return {**told, "image": self.files[index].read_bytes(), "label": self.labels[index]}


def open_folder(root: pathlib.Path, caption_feature: str = "") -> Folder:
    """The images of one split: in folders by class or, with captions, as metadata.jsonl lists them.

    Raises: FileNotFoundError; ValueError with the line of metadata.jsonl that is none.
    """
    if caption_feature:
        return _open_captioned(root, caption_feature)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no image folder {root}: data.name is the root, with one folder per split (data."
            "train_split, data.eval_split) that holds one folder of images per class."
        )
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        files += found
        labels += [label] * len(found)
    return Folder(files, labels)


def _open_captioned(root, feature):
    """The images that metadata.jsonl lists, in its order, each with its caption or captions."""
    path = root / "metadata.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: with data.caption_feature={feature!r} a folder needs one line of JSON for "
            f'each image there, such as {{"file_name": "a.png", "{feature}": "a red cat"}}.'
        )
    files, captions = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            name, told = _parse(line, feature)
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} must be {error}, not {line[:100]!r}."
            ) from error
        files.append(root / name)
        captions.append({feature: told})
    return Folder(files, [0] * len(files), captions)


def _parse(line, feature):
    """(file name, caption or captions) of a line.   Raises: ValueError that says what it lacks."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    row = row if isinstance(row, dict) else {}
    name, told = row.get("file_name"), row.get(feature)
    if not (name and isinstance(name, str)):
        raise ValueError("JSON with file_name, a text")
    captions = told if isinstance(told, list) else [told]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"JSON with {feature}, a caption or a list of captions, at least one")
    return name, told


def _read_text(path):
    """A file's text, in UTF-8 with or without a byte order mark."""
    contents = path.read_bytes()
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before, found = error.object[: error.start], error.object[error.start : error.start + 1]
        raise ValueError(
            f"line {1 + before.count(10)} of {path} is not in UTF-8: {error.reason}, {found!r}. "
            "Save it as UTF-8."
        ) from None
