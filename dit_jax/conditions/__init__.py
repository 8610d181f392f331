"""What a network is conditioned on: labels, tokens of captions, or a frozen encoder's context."""

from dit_jax.conditions.batch import FEATURES, drop, encode, get_condition
from dit_jax.conditions.requests import (
    Conditions,
    draw,
    draw_for_picture,
    draw_labels,
    from_captions,
    from_flags,
    from_labels,
    parse_label,
    parse_labels,
)
from dit_jax.conditions.text_encoder import TextEncoder, load_encoder, resolve

__all__ = [
    "FEATURES",
    "Conditions",
    "TextEncoder",
    "draw",
    "draw_for_picture",
    "draw_labels",
    "drop",
    "encode",
    "from_captions",
    "from_flags",
    "from_labels",
    "get_condition",
    "load_encoder",
    "parse_label",
    "parse_labels",
    "resolve",
]
