"""Converter for CLIP's text transformer as transformers writes it: weights, sizes and tokenizer."""

import pathlib
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import arrays, fields, weights
from dit_jax.data import text
from dit_jax.errors import MissingFileError, UserError
from dit_jax.models import clip
from dit_jax.system import files

# Class in transformers -> its arrays outside of the text transformer. A name that ends in a dot is
# a module.
CLASSES = {
    "CLIPTextModel": (),
    "CLIPTextModelWithProjection": ("text_projection.weight",),
    "CLIPModel": (
        "vision_model.",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ),
}
# The prefix of all names, except in files of the CLIPTextModel of transformers 5.
PREFIX = "text_model."
POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ... in files of transformers before 4.31
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Key of `config.model` -> (key in transformers' config, its default, its largest value). Some
# configs leave out keys with default values.
SIZES = dict(
    vocab_size=("vocab_size", 49408, fields.MOST),
    length=("max_position_embeddings", 77, text.MAX_LENGTH),
    hidden_size=("hidden_size", 512, fields.MOST),
    depth=("num_hidden_layers", 12, fields.MOST_LAYERS),
    num_heads=("num_attention_heads", 8, fields.MOST),
    mlp_size=("intermediate_size", 2048, fields.MOST),
)


def read_config(source: pathlib.Path, skip_layers: int = 0) -> ConfigDict:
    """Returns `config.model`, read from config.json, without the last `skip_layers` layers.

    Args:
      source: the directory, or a weights file in it.
    Raises: FileNotFoundError; ValueError for a model of another kind or a wrong number of layers;
      as `fields.read`.
    """
    path, _, config = _read_config_json(source)
    sizes = {key: config.get(name, default) for key, (name, default, _) in SIZES.items()}
    # All wrong fields are reported together, under the names that the file has for them.
    wrong = {SIZES[k][0]: v for k, v in sizes.items() if not fields.is_count(v, SIZES[k][2])}
    activation = config.get("hidden_act", "quick_gelu")
    if not isinstance(activation, str) or activation not in clip.ACTIVATIONS:
        wrong["hidden_act"] = activation
    if (epsilon := config.get("layer_norm_eps", clip.NORM_EPSILON)) != clip.NORM_EPSILON:
        wrong["layer_norm_eps"] = epsilon
    if wrong:
        raise UserError(
            f"{files.printable(path)} describes a text model of another kind: "
            f"{fields.show(wrong)}. Needed are sizes above 0, hidden_act "
            f"{' or '.join(clip.ACTIVATIONS)}, layer_norm_eps {clip.NORM_EPSILON}."
        )
    depth = sizes["depth"]
    if not 0 <= skip_layers < depth:
        shown = files.printable(path)
        raise UserError(f"{skip_layers=} must be in 0..{depth - 1}: {shown} has {depth} layers.")
    sizes["depth"] = depth - skip_layers
    return ConfigDict(dict(name="clip", **sizes, activation=activation, dtype="float32"))


def read(source: pathlib.Path, skip_layers: int = 0) -> dict[str, np.ndarray]:
    """Returns the arrays of the text transformer at `source`, except in the last layers.

    Arrays that CLASSES lists for the model's class are left out too. Any other array stays, and
    `to_params` reports it.
    Args:
      source: the directory that transformers wrote, or a weights file in it.
      skip_layers: how many of the last layers to leave out.
    Raises: FileNotFoundError; ValueError as `read_config` or `weights.read`.
    """
    depth = read_config(source, skip_layers).depth
    skipped = tuple(f"encoder.layers.{depth + i}." for i in range(skip_layers))
    _, kind, _ = _read_config_json(source)
    modules = tuple(name for name in CLASSES[kind] if name.endswith("."))
    return {
        name: array
        for name, array in weights.read(source, "clip").items()
        if name not in CLASSES[kind] and not name.startswith(modules)
        if not name.removeprefix(PREFIX).startswith(skipped)
    }


def read_tokenizer(source: pathlib.Path, model_config) -> text.ClipTokenizer:
    """Returns the text model's tokenizer, whose files are beside the weights or in ../tokenizer.

    The padding token is the one in special_tokens_map.json or tokenizer_config.json beside them, or
    else END.
    Raises: FileNotFoundError; ValueError if the tokenizer has tokens that the model lacks; as
      `text.ClipTokenizer.from_files` and `load`.
    """
    source = weights.directory(source)
    directories = source, source.resolve().parent / "tokenizer"
    for directory in directories:
        length, pad = model_config.length, _read_padding(directory)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        if vocab.is_file() and merges.is_file():
            tokenizer = text.ClipTokenizer.from_files(vocab, merges, length, pad)
        elif (directory / text.FILE).is_file():
            tokenizer = text.ClipTokenizer.load(directory / text.FILE, length, pad)
        else:
            continue
        # A larger id would have no row in the embedding table.
        if tokenizer.vocab_size > model_config.vocab_size:
            raise UserError(
                f"the tokenizer in {files.printable(directory)} has ids up to "
                f"{tokenizer.vocab_size - 1}, but the text model {model_config.vocab_size} tokens: "
                "it is another model's."
            )
        return tokenizer
    raise MissingFileError(
        f"no vocab.json with merges.txt, and no {text.FILE}, in "
        f"{' or '.join(map(files.printable, directories))}. {text.SOURCE}"
    )


def to_params(found: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from CLIPTextModel's names, with or without `PREFIX`.

    See `convert.load`.
    """
    prefixed = sum(name.startswith(PREFIX) for name in found)
    stripped = {name.removeprefix(PREFIX): array for name, array in found.items()}
    # The prefix is removed only if most names have it. A message about wrong names then lists the
    # few exceptions instead of all names.
    if 2 * prefixed > len(found) == len(stripped):
        found = stripped
    found = {name: array for name, array in found.items() if name != POSITION_IDS}
    shapes = arrays.parameter_shapes(model_config)
    published = {path: _published(path, shape) for path, shape in shapes.items()}
    return arrays.to_params(found, shapes, published, _to_parameter)


def _read_config_json(source):
    """Returns (path of config.json, class of the model, its fields for the text model)."""
    path = weights.directory(source) / "config.json"
    config = fields.read(
        path,
        "the config.json that transformers writes beside the weights; of a Stable Diffusion that "
        "in text_encoder/",
    )
    shown, kind = files.printable(path), config.get("architectures")
    kind = kind[0] if isinstance(kind, list) and kind else None
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(
            f"{shown} describes transformers' {fields.show(kind)}, but only {', '.join(CLASSES)} "
            "can be converted; of a Stable Diffusion give the folder text_encoder/."
        )
    if kind == "CLIPModel":  # old files also have text_config_dict, which overrides text_config
        parts = [config.get(name) or {} for name in ("text_config", "text_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{shown} has a text_config that is none: download it again.")
        config = parts[0] | parts[1]
    return path, kind, config


def _read_padding(directory):
    """Returns the padding token, with the precedence that transformers gives the files.

    The "!" of Stable Diffusion 2 is only in the older file, special_tokens_map.json.
    """
    paths = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config, older = (
        fields.read(path, "the tokenizer's settings, as transformers writes them")
        if path.is_file()
        else {}
        for path in paths
    )
    if "added_tokens_decoder" in config:  # written by versions that do not read the older file
        older = {}
    pad = older.get("pad_token") or config.get("pad_token") or text.END
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        shown = files.printable(directory)
        raise UserError(
            f"the tokenizer in {shown} has a pad_token that is no text: {fields.show(pad)}."
        )
    return pad


def _published(path, shape):
    """Returns {published name: shape} of one parameter, with one name per layer if stacked."""
    module, _, leaf = path.replace("embeddings_", "embeddings/").rpartition("/")
    name, depth = f"{module}/{LEAVES[leaf]}".replace("/", "."), 1
    # The parameters of all layers are stacked on the first axis.
    if name.startswith("encoder_layers."):
        name, depth = re.sub("^encoder_layers", "encoder.layers.{}", name), shape[0]
        shape = shape[1:]
    shape = shape[::-1] if leaf == "kernel" else shape
    return {name.format(i): shape for i in range(depth)}


def _to_parameter(path, array):
    """Returns one published array with its axes in the parameter's order."""
    return array.T if path.endswith("kernel") else array
