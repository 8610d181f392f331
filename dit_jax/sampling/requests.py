"""Requests of images whose conditions are drawn: for measures, and for pictures while training."""

import pathlib

from ml_collections import ConfigDict

from dit_jax import conditions, latents
from dit_jax.errors import UserError
from dit_jax.workdirs import identity

KINDS = ("random", "balanced")


def draw(
    config: ConfigDict, kind: str, num: int, seed: int = 0, workdir: pathlib.Path | None = None
) -> conditions.Request:
    """Draws `num` labels, or the captions of so many images of the data, held out if there are.

    Captions are drawn without repetition as long as there are enough; 'balanced' ones are the
    first, in order.
    Args: workdir, of the run, whose data must be those that it began with.
    Raises: ValueError for another kind; as `latents.open_split` and `identity.check_splits`.
    """
    if kind not in KINDS:
        raise UserError(f"unknown labels {kind!r}; choose {' or '.join(KINDS)}.")
    return conditions.build(config).draw(kind, num, seed, lambda: _open(config, workdir))


def draw_for_picture(config: ConfigDict, num: int) -> conditions.Request:
    """Returns labels in equal blocks, or the first captions of the data."""
    return conditions.build(config).draw_for_picture(num, lambda: _open(config))


def _open(config, workdir=None):
    split = "eval" if config.data.eval_split else "train"
    source = latents.open_split(config, split)
    if workdir:
        identity.check_splits({split: source}, workdir)
    return source
