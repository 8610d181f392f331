"""Converter for CLIP's text transformer as transformers writes it: weights, sizes and tokenizer."""

import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import fields, parameters, weights
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
# Key of `config.model` -> (key in transformers' config, its default, its largest value). Some
# configs leave out keys with default values.
SIZES = dict(
    vocab_size=("vocab_size", 49408, fields.MAX_SIZE),
    length=("max_position_embeddings", 77, text.MAX_LENGTH),
    hidden_size=("hidden_size", 512, fields.MAX_SIZE),
    depth=("num_hidden_layers", 12, fields.MAX_LAYERS),
    num_heads=("num_attention_heads", 8, fields.MAX_SIZE),
    mlp_size=("intermediate_size", 2048, fields.MAX_SIZE),
)
COUNTS = {name: most for name, _, most in SIZES.values()}
# Key in transformers' config -> the supported values; the first is the default.
CHOICES = dict(
    hidden_act=tuple(clip.ACTIVATIONS),
    layer_norm_eps=(clip.NORM_EPSILON,),
)


def read_config(source: pathlib.Path, skip_layers: int = 0) -> ConfigDict:
    """Returns `config.model`, read from config.json, without the last `skip_layers` layers.

    Args:
      source: the directory, or a weights file in it.
    Raises: FileNotFoundError; ValueError for a model of another kind or a wrong number of layers;
      as `fields.read`.
    """
    path, _, config = _read_fields(source)
    defaults = {name: default for name, default, _ in SIZES.values()}
    config = fields.complete(config, defaults, CHOICES)
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    fields.check_supported(path, "a text model", config, unsupported)
    sizes = {key: config[name] for key, (name, _, _) in SIZES.items()}
    depth = sizes["depth"]
    if not 0 <= skip_layers < depth:
        shown = files.printable(path)
        raise UserError(f"{skip_layers=} must be in 0..{depth - 1}: {shown} has {depth} layers.")
    sizes["depth"] = depth - skip_layers
    return ConfigDict(dict(name="clip", **sizes, activation=config["hidden_act"], dtype="float32"))


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
    _, kind, _ = _read_fields(source)
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
    source = source if source.is_dir() else source.parent
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


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from CLIPTextModel's names, with or without `PREFIX`.

    See `convert.load`.
    """
    prefixed = sum(name.startswith(PREFIX) for name in tensors)
    stripped = {name.removeprefix(PREFIX): array for name, array in tensors.items()}
    # The prefix is removed only if most names have it. A message about wrong names then lists the
    # few exceptions instead of all names.
    if 2 * prefixed > len(tensors) == len(stripped):
        tensors = stripped
    tensors = {name: array for name, array in tensors.items() if name != POSITION_IDS}
    return parameters.to_params(tensors, parameters.make_table(model_config, _published_name))


def _published_name(path):
    """Returns the published name of a parameter; {} is the layer's number."""
    path = path.replace("embeddings_", "embeddings/")
    return parameters.to_torch_name(path.replace("encoder_layers/", "encoder/layers/{}/"))


def _read_fields(source):
    """Returns (path of config.json, class of the model, its fields for the text model)."""
    path = weights.find_config(source, "clip")
    what = (
        f"{fields.CONFIG_DESCRIPTION.format('transformers')}; of a Stable Diffusion text_encoder/'s"
    )
    config = fields.read(path, what)
    kind = config.get("architectures")
    kind = kind[0] if isinstance(kind, list) and kind else None
    fields.check_class(path, kind, CLASSES)
    if kind == "CLIPModel":  # old files also have text_config_dict, which overrides text_config
        parts = [config.get(name) or {} for name in ("text_config", "text_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            shown = files.printable(path)
            raise UserError(f"{shown} has a text_config that is none: download it again.")
        config = parts[0] | parts[1]
    return path, kind, config


def _read_padding(directory):
    """Returns the padding token, with the precedence that transformers gives the files.

    The "!" of Stable Diffusion 2 is only in the older file, special_tokens_map.json.
    """
    paths = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    what = "the tokenizer's settings, as transformers writes them"
    config, older = (fields.read(path, what) if path.is_file() else {} for path in paths)
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
