"""Labels and captions that are asked for: drawn, parsed from flags, or taken from the data."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dit_jax.data import sources
from dit_jax.system import files
from dit_jax.workdirs import identity

KINDS = ("random", "balanced")  # of `draw`


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """What N images are drawn from: labels [N] or token ids [N, M], and what guides away from."""

    cond: np.ndarray  # int32
    null: np.ndarray  # like cond: the null class, the empty caption, or another to be avoided

    def __len__(self) -> int:
        return len(self.cond)

    def digest(self) -> str:
        """16 hexadecimal digits of all that they are drawn from."""
        return hashlib.sha256(self.cond.tobytes() + self.null.tobytes()).hexdigest()[:16]

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the images of these numbers, by name."""
        return {"cond": self.cond[index], "null": self.null[index]}


def from_labels(labels: Sequence[int], num_classes: int) -> Conditions:
    """The classes [N], guided away from the null class."""
    labels = np.asarray(labels, np.int32)
    return Conditions(labels, np.full_like(labels, num_classes))


def from_captions(config: ConfigDict, captions: Sequence[str], negative: str = "") -> Conditions:
    """The captions, guided away from `negative`, by default the empty one.

    Raises: ValueError for a model of labels; FileNotFoundError without the tokeniser's file.
    """
    tokenize = sources.tokenizer(config)
    if tokenize is None:
        raise ValueError(
            f"model.condition={config.model.condition!r}: this model takes labels, not captions."
        )
    cond = tokenize(captions)
    return Conditions(cond, np.broadcast_to(tokenize([negative]), cond.shape))


def draw(
    config: ConfigDict, kind: str, num: int, seed: int = 0, workdir: pathlib.Path | None = None
) -> Conditions:
    """`num` labels, as `draw_labels`; or of so many images of the data, held out if there are.

    Captions are drawn without repetition as long as there are enough; 'balanced' ones are the
    first, in order.
    Args: workdir, of the run, whose data must be those that it began with.
    Raises: ValueError for another kind; as `sources.open_split` and `identity.check_splits`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown labels {kind!r}; choose {' or '.join(KINDS)}.")
    if config.model.condition == "label":
        labels = draw_labels(kind, num, config.model.num_classes, seed)
        return from_labels(labels, config.model.num_classes)
    split = "eval" if config.data.eval_split else "train"
    source = sources.open_split(config, split)
    if workdir:
        identity.check_splits({split: source}, workdir)
    count = len(source) // source.views
    index = np.arange(num) % count
    if kind == "random":
        rng = np.random.default_rng(seed)
        index = np.concatenate([rng.permutation(count) for _ in range(-(-num // count))])[:num]
    return from_captions(config, [source.captions(source.views * i)[0] for i in index])


def draw_labels(kind: str, num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """[num] int32: 'random' ones by the seed, as published numbers have them, or 'balanced'.

    Balanced labels take turns, so that every part of the samples has all classes alike. Without
    classes all are 0.
    """
    if kind == "balanced":
        return (np.arange(num) % (num_classes or 1)).astype(np.int32)
    return np.random.default_rng(seed).integers(num_classes or 1, size=num, dtype=np.int32)


def from_flags(
    config: ConfigDict,
    num: int,
    labels: str = "",
    prompts: Sequence[str] = (),
    negative: str = "",
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Conditions:
    """What a command's flags ask for, of `num` images: labels, or prompts in blocks of equal size.

    Args: names, of the classes, where they are known.
    Raises: ValueError for labels of a model of captions and the reverse, or as `parse_labels`.
    """
    if config.model.condition == "label":
        if prompts or negative:
            flag = "--prompt" if prompts else "--negative_prompt"
            raise ValueError(f"{flag} is of a model of captions; this one takes --labels.")
        num_classes = config.model.num_classes
        return from_labels(parse_labels(labels, num, num_classes, seed, names), num_classes)
    if labels:
        raise ValueError(f"--labels={labels}: this model takes captions, as --prompt.")
    prompts = list(prompts) or [""]
    if num < len(prompts):
        raise ValueError(f"--num={num} must be at least {len(prompts)}, one of each --prompt.")
    return from_captions(config, [prompts[i * len(prompts) // num] for i in range(num)], negative)


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
        raise ValueError(
            f"--labels: random is the name of class {names.index(text)}: write name:random. Labels "
            "drawn at random have no other name."
        )
    if text == "random":
        return draw_labels("random", num, num_classes, seed)
    parts = [text] if {text, text.removeprefix("name:")} & {*names} else text.split(",")
    labels = [parse_label(part, count, names) for part in parts] if text else range(count)
    if num < 1 or (text and num < len(labels)):
        shown = text or f"all {count}"
        raise ValueError(f"--num={num} must be at least {len(labels) if text else 1}: {shown}.")
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
        raise ValueError(
            f"--labels: {shown} is the name of class {found['name']}, and the number of the class "
            f"'{files.printable(names[number])}': write name:{shown} or number:{shown}."
        )
    known = f", named {files.list_some(names)}" if names else ""
    raise ValueError(
        f"--labels: '{shown}' is no class; the model's are 0 to {num_classes - 1}{known}. Give "
        "them with commas, or random."
    )


def draw_for_picture(config: ConfigDict, num: int) -> Conditions:
    """Of a picture while training: labels in equal blocks, or the first captions of the data."""
    if config.model.condition == "label":
        num_classes = config.model.num_classes
        return from_labels(np.arange(num) * num_classes // num, num_classes)
    return draw(config, "balanced", num)
