"""What a network is conditioned on: labels, hashed words of captions, a frozen encoder's context.

`build` makes the condition of a config once. It knows what of a record is read, what a request of
images is made of, and what a network takes.
"""

from dit_jax.conditions.captions import Captions
from dit_jax.conditions.condition import Condition, drop
from dit_jax.conditions.kinds import KINDS, build, encode, open_images
from dit_jax.conditions.labels import Labels, draw_labels, from_labels, parse_label, parse_labels
from dit_jax.conditions.request import Request
from dit_jax.conditions.text_encoder import TextEncoder

__all__ = [
    "KINDS",
    "Captions",
    "Condition",
    "Labels",
    "Request",
    "TextEncoder",
    "build",
    "draw_labels",
    "drop",
    "encode",
    "from_labels",
    "open_images",
    "parse_label",
    "parse_labels",
]
