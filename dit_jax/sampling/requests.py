"""Requests with drawn conditions, for measures and for pictures while training."""

import pathlib

from ml_collections import ConfigDict

from dit_jax import conditions, latents
from dit_jax.errors import check_choice
from dit_jax.workdirs import identity

KINDS = ("random", "balanced")


def draw(
    config: ConfigDict, kind: str, num: int, seed: int = 0, workdir: pathlib.Path | None = None
) -> conditions.Request:
    """Returns a request with `num` drawn conditions, as `Condition.draw`.

    If the condition reads images, they are held-out images where the config has any.
    Args: workdir, of the run; the data must be the ones that the run began with.
    Raises: ValueError for another kind; as `latents.open_split` and `identity.check_splits`.
    """
    check_choice("labels", kind, KINDS)
    return conditions.build(config).draw(kind, num, seed, lambda: _open_split(config, workdir))


def draw_for_picture(config: ConfigDict, num: int) -> conditions.Request:
    """Returns the request for the picture that is drawn while training."""
    return conditions.build(config).draw_for_picture(num, lambda: _open_split(config))


def _open_split(config, workdir=None):
    # The model has not seen the conditions of held-out images, so these are preferred.
    split = "eval" if config.data.eval_split else "train"
    source = latents.open_split(config, split)
    if workdir:
        identity.check_splits({split: source}, workdir)
    return source
