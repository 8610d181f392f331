"""The kinds of conditions by name, and the condition of a config."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from dit_jax.conditions.captions import Context, Tokens
from dit_jax.conditions.condition import Condition, Flag
from dit_jax.conditions.labels import Labels
from dit_jax.conditions.text_encoder import TextEncoder
from dit_jax.data import formats, sources
from dit_jax.errors import check_choice

KINDS: dict[str, type[Condition]] = {"label": Labels, "tokens": Tokens, "context": Context}
# The flags of all kinds. Each command defines all of them, because it loads the workdir later.
FLAGS: dict[str, Flag] = {
    name: flag for kind in KINDS.values() for name, flag in kind.flags.items()
}


def count_requested(flags: Mapping[str, str | list]) -> int:
    """Returns how many images the repeated flags list one by one; 0 if they list none."""
    return max(len(flags[name]) for name, flag in FLAGS.items() if flag.repeated)


def build(config: ConfigDict) -> Condition:
    """Returns the condition of a config's model; `Labels` for a VAE, which has no condition.

    Raises: ValueError for an unknown `config.model.condition`.
    """
    name = config.model.get("condition", "label")
    check_choice("condition", name, KINDS)
    return KINDS[name](config)


def encode(
    model: nn.Module,
    params: dict,
    encoder: TextEncoder | None,
    cond: jax.Array,
    mesh: jax.sharding.Mesh,
) -> jax.Array:
    """Returns conditions [B, ...] encoded for the model, once for all its calls."""
    # Callers may have a model without its config, so the model's field decides.
    return KINDS[model.condition].encode(model, params, encoder, cond, mesh)


def open_images(config: ConfigDict, split: str, labels: bool = True) -> sources.Source:
    """Opens the images of one split of `config.data`, with the annotations that the model needs.

    Args: labels, False to ignore classes, whatever the config's model takes.
    Raises: as `formats.open_images` and `Condition.annotations`.
    """
    annotations = build(config).annotations()
    if not labels:
        annotations = dataclasses.replace(annotations, num_classes=None)  # accepts any label
    return formats.open_images(config, split, annotations)
