"""What a network is conditioned on: labels, tokens of captions, or a frozen encoder's context."""

from dit_jax.conditions.batch import FEATURES, drop, encode, of_batch
from dit_jax.conditions.requests import (
    Conditions,
    asked,
    draw,
    draw_labels,
    for_picture,
    of_captions,
    of_labels,
    parse_label,
    parse_labels,
)
from dit_jax.conditions.text_encoder import TextEncoder, load_encoder, resolve

__all__ = [
    "FEATURES",
    "Conditions",
    "TextEncoder",
    "asked",
    "draw",
    "draw_labels",
    "drop",
    "encode",
    "for_picture",
    "load_encoder",
    "of_batch",
    "of_captions",
    "of_labels",
    "parse_label",
    "parse_labels",
    "resolve",
]
