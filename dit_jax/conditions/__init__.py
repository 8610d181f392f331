"""Conditions of a network: class labels, hashed words of captions, outputs of a frozen encoder.

`build` returns the `Condition` of a config. A `Condition` chooses the annotations that are read
from the data, turns flags into a request for images, and encodes conditions for the network.
"""

from dit_jax.conditions.captions import Captions
from dit_jax.conditions.condition import Condition, drop
from dit_jax.conditions.kinds import (
    FLAGS,
    KINDS,
    build,
    count_requested,
    encode,
    open_images,
)
from dit_jax.conditions.labels import Labels, draw_labels, from_labels, parse_label, parse_labels
from dit_jax.conditions.request import Request
from dit_jax.conditions.text_encoder import TextEncoder

__all__ = [
    "FLAGS",
    "KINDS",
    "Captions",
    "Condition",
    "Labels",
    "Request",
    "TextEncoder",
    "build",
    "count_requested",
    "draw_labels",
    "drop",
    "encode",
    "from_labels",
    "open_images",
    "parse_label",
    "parse_labels",
]
