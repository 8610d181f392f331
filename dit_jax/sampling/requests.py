"""Requests with drawn labels or captions, for measures and for pictures while training."""

import pathlib

from ml_collections import ConfigDict

from dit_jax import conditions, latents
from dit_jax.errors import check_choice
from dit_jax.workdirs import identity

KINDS = ("random", "balanced")


def draw(
    config: ConfigDict, kind: str, num: int, seed: int = 0, workdir: pathlib.Path | None = None
) -> conditions.Request:
    """Draws a request of `num` labels, or of the captions of `num` images.

    Captions repeat only after all were used; 'balanced' takes the first captions in order.
    Args:
      kind: 'random' or 'balanced'.
      workdir: of the run, whose data are compared with the captions' data.
    Raises: ValueError for another kind; as `latents.open_split` and `identity.check_splits`.
    """
    check_choice("labels", kind, KINDS)
    return conditions.build(config).draw(kind, num, seed, lambda: _open_split(config, workdir))


def draw_for_picture(config: ConfigDict, num: int) -> conditions.Request:
    """Draws a request of labels in equal blocks, or of the first captions of the data."""
    return conditions.build(config).draw_for_picture(num, lambda: _open_split(config))


def _open_split(config, workdir=None):
    # The model has not seen the captions of held-out images, so these are preferred.
    split = "eval" if config.data.eval_split else "train"
    source = latents.open_split(config, split)
    if workdir:
        identity.check_splits({split: source}, workdir)
    return source
