"""The condition on class labels: read from the data, parsed from flags, or drawn."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dit_jax.conditions.condition import Condition, Flag
from dit_jax.conditions.request import Request
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError
from dit_jax.system import files


class Labels(Condition):
    """A condition on the class of each image; without classes every label is 0."""

    flag = "labels"
    flags: ClassVar = {
        "labels": Flag("Classes with commas, in equal shares; by default all; or random.")
    }
    description = "labels"
    feature = "label"

    @property
    def num_classes(self) -> int:
        return self.config.model.num_classes

    @property
    def has_classes(self) -> bool:
        return bool(self.num_classes)

    def annotations(self):
        # A VAE's config has no num_classes. dit_jax.encode reads captions here too, and stores them
        # for another model.
        num_classes = self.config.model.get("num_classes") or None
        feature = self.config.data.caption_feature
        if not feature:
            return Annotations(num_classes)
        return Annotations(num_classes, feature, count_captions(self.config))

    def stored_annotations(self, features, metadata, directory):
        if self.num_classes and "label" not in features:
            raise UserError(
                f"{directory} holds no labels, which model.num_classes={self.num_classes} needs. "
                "Encode the images with a config of as many classes."
            )
        return Annotations(self.num_classes or None)

    def null(self, stored):
        return self.num_classes  # the class after the last one

    @staticmethod
    def encode(model, params, encoder, cond, mesh):
        return cond  # the network embeds labels itself

    def _from_own_flags(self, num, seed, class_names, labels=""):
        parsed = parse_labels(labels, num, self.num_classes, seed, class_names)
        return from_labels(parsed, self.num_classes)

    def split_flags(self, flags):
        # Without classes all labels are 0, so no flag is needed.
        labels = flags.get("labels") or ("" if self.num_classes else "0")
        return [{**flags, "labels": label} for label in labels.split(",")]

    def draw(self, kind, num, seed, open_source):
        return from_labels(draw_labels(kind, num, self.num_classes, seed), self.num_classes)

    def draw_for_picture(self, num, open_source):
        # Equal blocks, so that images of one class are neighbours in the picture.
        return from_labels(np.arange(num) * self.num_classes // num, self.num_classes)

    def make_example(self, num):
        return from_labels(np.arange(num) % (self.num_classes or 1), self.num_classes)

    def make_batch(self, rows, rng):
        num_classes = self.config.model.get("num_classes") or 1  # a VAE has none
        return {"label": rng.integers(0, num_classes, rows, np.int32)}


def count_captions(config) -> int:
    """Returns `data.captions_per_image`.

    Raises: ValueError if it is below 1.
    """
    count = config.data.captions_per_image
    if count < 1:
        raise UserError(f"data.captions_per_image={count} must be at least 1.")
    return count


def from_labels(labels: Sequence[int], num_classes: int) -> Request:
    """Returns the request for images of classes [N]; guidance leads away from the null class."""
    labels = np.asarray(labels, np.int32)
    return Request(labels, np.full_like(labels, num_classes))


def draw_labels(kind: str, num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Returns labels [num] int32: 'random' by the seed, or 'balanced'.

    Published measures use random labels. Balanced labels cycle through the classes, so that every
    part of the samples has all classes equally often. Without classes all labels are 0.
    """
    if kind == "balanced":
        return (np.arange(num) % (num_classes or 1)).astype(np.int32)
    return np.random.default_rng(seed).integers(num_classes or 1, size=num, dtype=np.int32)


def parse_labels(
    text: str, num: int, num_classes: int, seed: int = 0, class_names: Sequence[str] | None = None
) -> np.ndarray:
    """Returns labels [num] int32 from comma-separated classes, each repeated in an equal block.

    An empty text means all classes. 'random' draws each label uniformly by the seed.
    Args: class_names, which are accepted like numbers.
    Raises: ValueError for a label that is no class, or that could be two.
    """
    class_names, count = list(class_names or ()), num_classes or 1
    if text == "random" and text in class_names:
        raise UserError(
            f"--labels: random is the name of class {class_names.index(text)}. For this class, "
            "write name:random. Labels drawn at random have no other name."
        )
    if text == "random":
        return draw_labels("random", num, num_classes, seed)
    # Of "all classes" some may be left out.
    labels, fewest = range(count), 1
    if text:
        # A name may have commas, so a text that is a name is not split.
        is_name = text in class_names or text.removeprefix("name:") in class_names
        parts = [text] if is_name else text.split(",")
        labels = [parse_label(part, count, class_names) for part in parts]
        fewest = len(labels)
    if num < fewest:
        raise UserError(f"--num={num} must be at least {fewest} with --labels={text!r}.")
    return np.array(labels, np.int32)[np.arange(num) * len(labels) // num]


def parse_label(text: str, num_classes: int, class_names: Sequence[str] | None = None) -> int:
    """Returns the class that has this number or, where classes have names, this name.

    A text may be the name of one class and the number of another. Then 'name:2' or 'number:2'
    chooses the class.
    Raises: ValueError for a text that is no class, or that could be two.
    """
    class_names, kind = list(class_names or ()), ""
    prefix, _, value = text.partition(":")
    # A class may be named 'name:x' itself; then the text is that name.
    if prefix in ("name", "number") and text not in class_names:
        kind, text = prefix, value
    # A number of ten digits or more is no class.
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    matches = {}  # the class by name, and by number
    if kind != "number" and text in class_names:
        matches["name"] = class_names.index(text)
    if kind != "name" and is_number and int(text) < num_classes:
        matches["number"] = int(text)
    # Name and number may agree, where classes are named by their numbers.
    if len({*matches.values()}) == 1:
        return next(iter(matches.values()))
    shown = files.printable(text)
    if matches:
        other = files.printable(class_names[matches["number"]])
        raise UserError(
            f"--labels: {shown} is the name of class {matches['name']}, and the number of the "
            f"class '{other}'. Write name:{shown} or number:{shown}."
        )
    known = f", named {files.list_some(class_names)}" if class_names else ""
    raise UserError(
        f"--labels: '{shown}' is no class; the model's are 0 to {num_classes - 1}{known}. Give "
        "classes with commas, or random."
    )
