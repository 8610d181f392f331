"""Class labels: read from the data, parsed from flags, drawn."""

from collections.abc import Sequence

import numpy as np

from dit_jax.conditions.condition import Condition
from dit_jax.conditions.request import Request
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError
from dit_jax.system import files


class Labels(Condition):
    """A class of each image; without classes every label is 0."""

    flag = "labels"
    description = "labels"
    feature = "label"

    @property
    def num_classes(self) -> int:
        return self.config.model.num_classes

    @property
    def has_classes(self) -> bool:
        return bool(self.num_classes)

    def annotations(self):
        # A VAE has no such key. Captions are stored by dit_jax.encode, for another model.
        num_classes = self.config.model.get("num_classes") or None
        feature = self.config.data.caption_feature
        if not feature:
            return Annotations(num_classes)
        return Annotations(num_classes, feature, count_captions(self.config))

    def stored_annotations(self, features, metadata, place):
        if self.num_classes and "label" not in features:
            raise UserError(
                f"{place} holds no labels, which model.num_classes={self.num_classes} "
                "needs: encode the images of a config with as many classes."
            )
        return Annotations(self.num_classes or None)

    def null(self, kept):
        return self.num_classes

    @staticmethod
    def encode(model, params, encoder, cond, mesh):
        return cond

    def request(self, captions, negative=""):
        raise UserError("model.condition='label': this model takes labels, not captions.")

    def from_flags(self, num, labels="", prompts=(), negative="", seed=0, names=None):
        if prompts or negative:
            flag = "--prompt" if prompts else "--negative_prompt"
            raise UserError(f"{flag} is of a model of captions; this one takes --labels.")
        parsed = parse_labels(labels, num, self.num_classes, seed, names)
        return from_labels(parsed, self.num_classes)

    def split_flags(self, labels, prompts):
        labels = labels if labels or self.num_classes else "0"
        return [(label, list(prompts)) for label in labels.split(",") if label]

    def draw(self, kind, num, seed, open_source):
        return from_labels(draw_labels(kind, num, self.num_classes, seed), self.num_classes)

    def draw_for_picture(self, num, open_source):
        return from_labels(np.arange(num) * self.num_classes // num, self.num_classes)

    def make_example(self, num):
        return from_labels(np.arange(num) % (self.num_classes or 1), self.num_classes)

    def make_batch(self, rows, rng):
        num_classes = self.config.model.get("num_classes") or 1  # a VAE has none
        return {"label": rng.integers(0, num_classes, rows, np.int32)}


def count_captions(config) -> int:
    """Returns `data.captions_per_image`.   Raises: ValueError below 1."""
    count = config.data.captions_per_image
    if count < 1:
        raise UserError(f"data.captions_per_image={count} must be at least 1.")
    return count


def from_labels(labels: Sequence[int], num_classes: int) -> Request:
    """Returns the request of the classes [N], which guidance leads away from the null class."""
    labels = np.asarray(labels, np.int32)
    return Request(labels, np.full_like(labels, num_classes))


def draw_labels(kind: str, num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """[num] int32: 'random' ones by the seed, as published numbers have them, or 'balanced'.

    Balanced labels take turns, so that every part of the samples has all classes alike. Without
    classes all are 0.
    """
    if kind == "balanced":
        return (np.arange(num) % (num_classes or 1)).astype(np.int32)
    return np.random.default_rng(seed).integers(num_classes or 1, size=num, dtype=np.int32)


def parse_labels(
    text: str, num: int, num_classes: int, seed: int = 0, names: Sequence[str] | None = None
) -> np.ndarray:
    """[num] int32 labels: the comma-separated ones, repeated in blocks of equal size.

    An empty text means all classes; 'random', each uniformly drawn by the seed.
    Args: names, of the classes, which may stand for their numbers.
    Raises: ValueError for a label that is no class, or that may be two.
    """
    names, count = list(names or ()), num_classes or 1
    if text == "random" and text in names:
        raise UserError(
            f"--labels: random is the name of class {names.index(text)}: write name:random. Labels "
            "drawn at random have no other name."
        )
    if text == "random":
        return draw_labels("random", num, num_classes, seed)
    parts = [text] if {text, text.removeprefix("name:")} & {*names} else text.split(",")
    labels = [parse_label(part, count, names) for part in parts] if text else range(count)
    if num < 1 or (text and num < len(labels)):
        shown = text or f"all {count}"
        raise UserError(f"--num={num} must be at least {len(labels) if text else 1}: {shown}.")
    return np.array(labels, np.int32)[np.arange(num) * len(labels) // num]


def parse_label(text: str, num_classes: int, names: Sequence[str] | None = None) -> int:
    """The class of a number or, where classes have names, of a name.

    Where a text could be both, of two classes, 'name:2' or 'number:2' says which it is.
    Raises: ValueError for a text that is no class, or that could be two.
    """
    names, (kind, _, rest) = list(names or ()), text.partition(":")
    kind, text = (kind, rest) if kind in ("name", "number") and text not in names else ("", text)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else num_classes
    found = {}
    if kind != "number" and text in names:
        found["name"] = names.index(text)
    if kind != "name" and number < num_classes:
        found["number"] = number
    if len({*found.values()}) == 1:
        return next(iter(found.values()))
    shown = files.printable(text)
    if found:
        raise UserError(
            f"--labels: {shown} is the name of class {found['name']}, and the number of the class "
            f"'{files.printable(names[number])}': write name:{shown} or number:{shown}."
        )
    known = f", named {files.list_some(names)}" if names else ""
    raise UserError(
        f"--labels: '{shown}' is no class; the model's are 0 to {num_classes - 1}{known}. Give "
        "them with commas, or random."
    )
