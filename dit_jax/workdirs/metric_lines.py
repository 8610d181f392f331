"""Reads metrics.jsonl, and computes the training speed from its lines."""

import math
import pathlib

from dit_jax.system import json_files, schemas


def read_lines(path: pathlib.Path) -> list[dict]:
    """Returns the undamaged lines of metrics.jsonl; a warning counts the damaged lines.

    Each line has a 'step'. Its other values are numbers or None.
    """
    return json_files.read_json_lines(path, _list_invalid_keys)


def _list_invalid_keys(line):
    """Returns the keys of a line whose values have a wrong type."""
    # Any float is accepted, because the loss of held-out images may be NaN.
    is_scalar = schemas.optional(lambda value: isinstance(value, float) or schemas.is_number(value))
    form = dict.fromkeys(line, is_scalar)
    form |= {"step": schemas.is_count, "img_per_s": schemas.is_positive}
    return schemas.list_invalid_keys(line, form, {"img_per_s"})


def training_speed(workdir: pathlib.Path, step: int, batch_size: int) -> dict[str, float]:
    """Returns 'img_per_s' and 'seconds' of training up to a step, from metrics.jsonl.

    Compilation time is not included. Both are None if nothing up to that step was timed.
    """
    lines = read_lines(workdir / "metrics.jsonl")
    # A report covers the steps since the report before it.
    images, seconds, last_step = 0, 0, 0
    for line in lines:
        if "img_per_s" in line and line["step"] <= step:
            reported = (line["step"] - last_step) * batch_size
            images, seconds = images + reported, seconds + reported / line["img_per_s"]
            last_step = line["step"]
    if not 0 < seconds < math.inf:  # no report, or steps out of order
        return {"img_per_s": None, "seconds": None}
    return {"img_per_s": images / seconds, "seconds": seconds}
