"""Labels and captions: from the data, drawn, or prompted, to what the network is told.

On the way a condition is a label [B] int32, token ids [B, M] int32, or, where the frozen encoder's
outputs are stored beside the moments, a sequence [B, M, D] f16. `encode` makes of it what the model
takes, as `models.conditioning` has it.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from dit_jax.data import sources
from dit_jax.models import conditioning
from dit_jax.system import files
from dit_jax.workdirs import checkpoint, digests, identity

KINDS = ("random", "balanced")  # of `draw`
FEATURES = ("label", "tokens", "context")  # of a batch, as model.condition


@struct.dataclass
class TextEncoder:
    """A frozen encoder; a tree of its parameters, so that jitted functions take it."""

    params: dict
    model: nn.Module = struct.field(pytree_node=False)
    digest: str = struct.field(pytree_node=False)  # of the parameters

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, M] to [B, M, D] f32."""
        return self.model.apply({"params": self.params}, tokens)


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


def of_labels(labels: Sequence[int], num_classes: int) -> Conditions:
    """The classes [N], guided away from the null class."""
    labels = np.asarray(labels, np.int32)
    return Conditions(labels, np.full_like(labels, num_classes))


def of_captions(config: ConfigDict, captions: Sequence[str], negative: str = "") -> Conditions:
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
        return of_labels(labels, config.model.num_classes)
    split = "eval" if config.data.eval_split else "train"
    source = sources.open_split(config, split)
    if workdir:
        identity.check_splits({split: source}, workdir)
    count = len(source) // source.views
    index = np.arange(num) % count
    if kind == "random":
        rng = np.random.default_rng(seed)
        index = np.concatenate([rng.permutation(count) for _ in range(-(-num // count))])[:num]
    return of_captions(config, [source.captions(source.views * i)[0] for i in index])


def draw_labels(kind: str, num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """[num] int32: 'random' ones by the seed, as published numbers have them, or 'balanced'.

    Balanced labels take turns, so that every part of the samples has all classes alike. Without
    classes all are 0.
    """
    if kind == "balanced":
        return (np.arange(num) % (num_classes or 1)).astype(np.int32)
    return np.random.default_rng(seed).integers(num_classes or 1, size=num, dtype=np.int32)


def asked(
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
        return of_labels(parse_labels(labels, num, num_classes, seed, names), num_classes)
    if labels:
        raise ValueError(f"--labels={labels}: this model takes captions, as --prompt.")
    prompts = list(prompts) or [""]
    if num < len(prompts):
        raise ValueError(f"--num={num} must be at least {len(prompts)}, one of each --prompt.")
    return of_captions(config, [prompts[i * len(prompts) // num] for i in range(num)], negative)


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
    known = f", named {files.some_of(names)}" if names else ""
    raise ValueError(
        f"--labels: '{shown}' is no class; the model's are 0 to {num_classes - 1}{known}. Give "
        "them with commas, or random."
    )


def for_picture(config: ConfigDict, num: int) -> Conditions:
    """Of a picture while training: labels in equal blocks, or the first captions of the data."""
    if config.model.condition == "label":
        num_classes = config.model.num_classes
        return of_labels(np.arange(num) * num_classes // num, num_classes)
    return draw(config, "balanced", num)


def load_encoder(
    config: ConfigDict, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> TextEncoder | None:
    """The frozen encoder of `config.text`, replicated over the mesh; None if the model needs none.

    Args: dtype, of its activations; None is the model's.
    Raises: as `checkpoint.load_model`; ValueError for an encoder of another width, or another one
      than `config.text.encoder_digest`, if that says which.
    """
    if config.model.condition != "context":
        return None
    workdir = sources.encoder_workdir(config)
    model, params = checkpoint.load_model(workdir, mesh, dtype or config.model.dtype, "clip")
    if model.hidden_size != config.model.context_size:
        raise ValueError(
            f"text.encoder={workdir} is {model.hidden_size} wide, but the model was built for "
            f"model.context_size={config.model.context_size}."
        )
    digest = digests.digest(params)
    if config.text.encoder_digest not in ("", digest):
        raise ValueError(
            f"text.encoder={workdir} has digest {digest}, but text.encoder_digest="
            f"{config.text.encoder_digest} is of another text encoder, whose outputs the model is "
            "trained on: give that one."
        )
    return TextEncoder(params, model, digest)


def resolve(
    config: ConfigDict, recorded: dict, mesh: jax.sharding.Mesh
) -> tuple[ConfigDict, TextEncoder | None]:
    """The config with the frozen encoder's digest, and the encoder; None if the model needs none.

    Args: recorded, the moments' metadata, which names the encoder of stored captions.
    Raises: as `load_encoder`, if it is not that one.
    """
    if config.model.get("condition") != "context":
        return config, None
    config = config.copy_and_resolve_references()
    if config.text.stored and "text_encoder_digest" in recorded:
        config.text.encoder_digest = recorded["text_encoder_digest"]
    encoder = load_encoder(config, mesh)
    config.text.encoder_digest = encoder.digest
    return config, encoder


def of_batch(batch: dict, resident: dict) -> jax.Array:
    """The condition of a batch: its one feature that is one; by 'record' out of `resident`."""
    if "record" in batch:
        return of_batch({n: a[batch["record"]] for n, a in resident.items() if n in FEATURES}, {})
    return next(batch[name] for name in reversed(FEATURES) if name in batch)


def drop(key: jax.Array, cond: jax.Array, prob: float, null: jax.Array | np.ndarray) -> jax.Array:
    """cond [B, ...], each row replaced by null [...] with the probability."""
    dropped = jax.random.bernoulli(key, prob, cond.shape[:1])
    dropped = dropped.reshape(-1, *(1,) * (cond.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, cond.dtype)[None], cond)


def encode(
    model: nn.Module, params: dict, encoder: TextEncoder | None, cond: jax.Array
) -> jax.Array:
    """A condition [B, ...] as the model takes it, computed once for all its calls."""
    if model.condition == "label" or cond.ndim == 3:
        return cond
    if model.condition == "tokens":
        own = conditioning.encoder(model)
        return own.apply({"params": params["text_encoder"]}, cond)
    return encoder(cond)
