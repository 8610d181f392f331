"""Converter for the text transformer of CLIP, as transformers writes it, and its tokenizer."""

import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.convert import fields, parameters, weights
from dit_jax.data import text
from dit_jax.errors import MissingFileError, UserError
from dit_jax.models import clip
from dit_jax.system import files

# The prefix of all names, except in files of the CLIPTextModel of transformers 5.
PREFIX = "text_model."
POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ... in files of transformers before 4.31
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
# Values of the other fields that a config.json may leave out.
DEFAULTS = dict(
    vocab_size=49408,
    max_position_embeddings=77,
    hidden_size=512,
    num_hidden_layers=12,
    num_attention_heads=8,
    intermediate_size=2048,
)
# Field with a whole number above 0 -> its largest value.
COUNTS = dict.fromkeys(DEFAULTS, fields.MAX_SIZE) | dict(
    max_position_embeddings=text.MAX_LENGTH, num_hidden_layers=fields.MAX_LAYERS
)
# Field -> the values that this project's model supports; the first is the default.
CHOICES = dict(hidden_act=tuple(clip.ACTIVATIONS), layer_norm_eps=(clip.NORM_EPSILON,))


def to_params(tensors: Mapping[str, np.ndarray], model_config) -> dict:
    """Returns the model's parameters from the published names; see `convert.load`.

    The names may begin with PREFIX or not.
    """
    num_prefixed = sum(name.startswith(PREFIX) for name in tensors)
    stripped = {name.removeprefix(PREFIX): array for name, array in tensors.items()}
    # The prefix is removed only if most names have it. A message about wrong names then lists the
    # few exceptions instead of all names.
    if 2 * num_prefixed > len(tensors) == len(stripped):
        tensors = stripped
    tensors = {name: array for name, array in tensors.items() if name != POSITION_IDS}
    return parameters.to_params(tensors, make_table(model_config))


def make_table(model_config) -> dict[str, parameters.Entry]:
    """Returns parameter path -> published arrays, without PREFIX."""
    return parameters.make_table(model_config, _published_name)


def _published_name(path):
    """Returns the published name of a parameter; {} is the layer's number."""
    path = path.replace("embeddings_", "embeddings/")
    return parameters.to_torch_name(path.replace("encoder_layers/", "encoder/layers/{}/"))


def read_model_config(source: pathlib.Path, skip_layers: int = 0) -> ConfigDict:
    """Returns `config.model` from transformers' config.json, without the last `skip_layers` layers.

    Args:
      source: the directory, or a weights file in it.
    Raises: FileNotFoundError; ValueError for a model of another kind or a wrong number of layers;
      as `weights.find_config` and `fields.read`.
    """
    path = weights.find_config(source, "clip")
    _, config = _read_fields(path)
    config = fields.complete(config, DEFAULTS, CHOICES)
    unsupported = fields.list_unsupported(config, COUNTS, CHOICES)
    fields.check_supported(path, "a text model", config, unsupported)
    depth = config["num_hidden_layers"]
    if not 0 <= skip_layers < depth:
        shown = files.printable(path)
        raise UserError(f"{skip_layers=} must be in 0..{depth - 1}: {shown} has {depth} layers.")
    model_config = dict(
        name="clip",
        vocab_size=config["vocab_size"],
        length=config["max_position_embeddings"],
        hidden_size=config["hidden_size"],
        depth=depth - skip_layers,
        num_heads=config["num_attention_heads"],
        mlp_size=config["intermediate_size"],
        activation=config["hidden_act"],
        dtype="float32",
    )
    return ConfigDict(model_config)


def _read_fields(path):
    """Returns (name of the model's class, fields of its text model) from config.json."""
    writer = fields.CONFIG_DESCRIPTION.format("transformers")
    config = fields.read(path, f"{writer}; in a Stable Diffusion, it is in text_encoder/")
    names = config.get("architectures")
    class_name = names[0] if isinstance(names, list) and names else None
    fields.check_class(path, class_name, CLASSES)
    if class_name != "CLIPModel":
        return class_name, config
    # Old files also have text_config_dict, which overrides text_config.
    sections = [config.get(name) or {} for name in ("text_config", "text_config_dict")]
    if not all(isinstance(section, dict) for section in sections):
        shown = files.printable(path)
        raise UserError(f"{shown} has a text_config without fields: download it again.")
    return class_name, sections[0] | sections[1]


def read(source: pathlib.Path, skip_layers: int = 0) -> dict[str, np.ndarray]:
    """Returns published name -> array of the text transformer without its last layers.

    Raises: as `read_model_config` and `weights.read`.
    """
    depth = read_model_config(source, skip_layers).depth
    skipped = tuple(f"encoder.layers.{depth + i}." for i in range(skip_layers))
    class_name, _ = _read_fields(weights.find_config(source, "clip"))
    modules = tuple(name for name in CLASSES[class_name] if name.endswith("."))
    return {
        name: array
        for name, array in weights.read(source, "clip").items()
        if name not in CLASSES[class_name] and not name.startswith(modules)
        if not name.removeprefix(PREFIX).startswith(skipped)
    }


def read_tokenizer(source: pathlib.Path, model_config) -> text.ClipTokenizer:
    """Returns the text model's tokenizer, whose files are beside the weights or in ../tokenizer.

    The padding token is read from special_tokens_map.json or tokenizer_config.json beside them. It
    is text.END if neither file has one.
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
                f"{tokenizer.vocab_size - 1}, but the text model has {model_config.vocab_size} "
                "tokens. Give the tokenizer of this model."
            )
        return tokenizer
    raise MissingFileError(
        f"no vocab.json with merges.txt, and no {text.FILE}, in "
        f"{' or '.join(map(files.printable, directories))}. {text.SOURCE}"
    )


def _read_padding(directory):
    """Returns the padding token; of two files, the one that transformers prefers decides."""
    # Only the older file, special_tokens_map.json, has the "!" of Stable Diffusion 2.
    paths = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    description = "the tokenizer's settings, as transformers writes them"
    config, older = (fields.read(path, description) if path.is_file() else {} for path in paths)
    if "added_tokens_decoder" in config:  # written by versions that do not read the older file
        older = {}
    pad = older.get("pad_token") or config.get("pad_token") or text.END
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        shown = files.printable(directory)
        raise UserError(
            f"the tokenizer in {shown} has a pad_token that is no text: {fields.show(pad)}. "
            "Download it again."
        )
    return pad
