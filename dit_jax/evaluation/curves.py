"""Curves of one value of rows against another: the comparable rows, grouped into curves."""

import collections
import dataclasses
import json
import logging
from collections.abc import Hashable

import numpy as np

from dit_jax.config import ranges
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style, queries

logger = logging.getLogger("dit_jax")

MODEL_COSTS = ("gmacs", "params")  # every checkpoint of a model has the same
CHECKPOINT_COSTS = ("step", "images_seen", "train_gflops", "seconds")
# Values that the rows of a plot must share. Otherwise their distances measure different things.
SHARED = ("extractor.name", "extractor.dtype", "extractor.digest", "reference.digest", "num")
# Magnitudes of numbers other than 0. Beyond these, matplotlib overflows.
SMALLEST, LARGEST = 1e-100, 1e100

# Setting -> its phrase in the label of a curve. Any other setting has its name and value.
PHRASES = {
    "workdir": "{text}",
    "step": "step {value:,}",
    "sampler": "{text}",
    "steps": "{value:,} steps",
    "kind": "{text}",
    "grid": "{text} grid",
    "variance": "{text} variance",
    "labels": "{text} labels",
    "guide": "guided by {text}",
}
# (Setting, JSON of its value) -> its phrase.
VALUE_PHRASES = {
    ("raw", "true"): "raw parameters",
    ("raw", "false"): "EMA",
    ("guide", "null"): "no guide",
}
LEADING = ("workdir", "step", "sampler", "steps")  # the settings that come first in a label


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of a curve, in the order in which a line joins them."""

    label: str  # the settings in which the curve differs from the others; '' for a single curve
    points: dict[Hashable, list[tuple[float | str, float]]]  # point -> (x, y) of each seed

    def means(self) -> list[tuple[float | str, float]]:
        """Returns (x, y) of each point: the means over its seeds."""
        means = []
        for seeds in self.points.values():
            x, y = zip(*seeds, strict=True)
            x_mean = x[0] if isinstance(x[0], str) else float(np.mean(x))
            means.append((x_mean, float(np.mean(y))))
        return means

    def describe_seeds(self) -> str:
        """Returns 'mean of 3 seeds' or 'mean of 1 to 3 seeds'; '' if no point has several."""
        counts = [len(seeds) for seeds in self.points.values()]
        least, most = min(counts), max(counts)
        if most == 1:
            return ""
        return f"mean of {most if least == most else f'{least} to {most}'} seeds"


def from_rows(rows: list[dict], x: str, y: str) -> list[Curve]:
    """Returns the curves of y against x, without the rows that lack x or y.

    The last of several rows counts if they differ only in measures and code revision.
    Raises: ValueError if no row has both x and y, if y is not a number, or for rows that cannot be
      compared; as `check_drawable`.
    """
    complete = select_complete(rows, x, y)
    _check(rows, complete, x, y)
    point_key = get_point_key(complete, x)
    # A row replaces earlier rows of the same measurement.
    latest = {_to_json(_get_identity(row)): row for row in complete}
    if num_replaced := len(complete) - len(latest):
        logger.info("%d rows were measured again: only the last ones count.", num_replaced)
    rows = list(latest.values())
    varying = _list_varying(rows, x, y, point_key)
    # Rows that agree in all these settings, and in the key of the point, are seeds of one point.
    points_by_curve = collections.defaultdict(lambda: collections.defaultdict(list))
    order_key = x if x in MODEL_COSTS else point_key
    for row in sorted(rows, key=lambda row: _get_sort_key(queries.get_value(row, order_key))):
        identity, x_value = _get_identity(row), queries.get_value(row, x)
        x_value = x_value if queries.is_number(x_value) else queries.to_text(x_value)
        points = points_by_curve[tuple(_to_json(identity.get(name)) for name in varying)]
        seeds = points[_to_json(queries.get_value(row, point_key))]
        seeds.append((x_value, queries.get_value(row, y)))
    in_order = sorted(
        points_by_curve, key=lambda curve: [_get_sort_key(json.loads(value)) for value in curve]
    )
    return [
        Curve(_make_label(dict(zip(varying, curve, strict=True))), dict(points_by_curve[curve]))
        for curve in in_order
    ]


def _list_varying(rows, x, y, point_key):
    """Returns the settings that tell curves apart.

    These vary between rows, but neither along a curve nor between the seeds of a point.
    """
    within_curve = {x, y, point_key, "seed", "num"}
    if x in CHECKPOINT_COSTS:
        within_curve.add("step")
    values = collections.defaultdict(set)
    for row in rows:
        for name, value in _get_identity(row).items():
            values[name].add(_to_json(value))
    return [name for name in values if len(values[name]) > 1 and name not in within_curve]


def select_complete(rows: list[dict], x: str, y: str) -> list[dict]:
    """Returns the rows that have both values."""
    return [
        row for row in rows if None not in (queries.get_value(row, x), queries.get_value(row, y))
    ]


def _check(rows, complete, x, y):
    """Raises ValueError unless there are complete rows, and one plot can show them together."""
    if not complete:
        absent = [
            name for name in (x, y) if all(queries.get_value(row, name) is None for row in rows)
        ]
        missing = " and no row has ".join(absent) or f"both {x} and {y}"
        known = queries.list_names(rows) or "nothing"
        raise UserError(f"no row has {missing}. The rows have {known}.")
    if num_left_out := len(rows) - len(complete):
        logger.info("%d of %d rows lack %s or %s: left out.", num_left_out, len(rows), x, y)
    examples = {}  # whether x is a number -> the first such row
    for row in complete:
        place = row.get("place", "a row")
        values = {name: queries.get_value(row, name) for name in (x, y)}
        if isinstance(values[y], str | list):
            raise UserError(f"{y} is not a number, but {values[y]!r}. Plot it as --x.")
        check_drawable(place, values)
        examples.setdefault(queries.is_number(values[x]), f"{values[x]!r} in {place}")
    if len(examples) > 1:
        raise UserError(
            f"{x} is a number in some rows but not in others: {examples[True]}, {examples[False]}. "
            "Keep the rows of one kind with --where, or mend the file."
        )
    _check_comparable(complete, x)


def check_drawable(place: str, values: dict) -> None:
    """Raises ValueError unless matplotlib can draw every number of a row.

    Args:
      place: file and number of the row, for the message.
      values: name -> value; values that are not numbers are not checked.
    """
    for name, value in values.items():
        if queries.is_number(value) and (abs(value) > LARGEST or 0 < abs(value) < SMALLEST):
            raise UserError(
                f"{place} has {name}={ranges.shorten(value)}, but the magnitude of a number must "
                f"be 0 or {SMALLEST:g} to {LARGEST:g}. Leave the row out, or mend the file."
            )


def _check_comparable(rows, x):
    """Raises ValueError, with a way out, unless rows agree in the values SHARED; x may vary."""
    differing, lines = [], []
    for name in SHARED:
        places = collections.defaultdict(list)
        for row in rows:
            value = queries.to_text(queries.get_value(row, name))
            places[value].append(row.get("place", "a row"))
        if len(places) > 1 and name != x:
            differing.append(name)
            for value, (first_place, *other_places) in places.items():
                more = f" and {len(other_places)} more" if other_places else ""
                lines.append(f"  {name}={value or repr(value)} in {first_place}{more}")
    if not differing:
        return
    conditions = collections.Counter(
        ",".join(f"{name}={queries.to_text(queries.get_value(row, name))}" for name in differing)
        for row in rows
    )
    ((most_common, _),) = conditions.most_common(1)
    raise UserError(
        "these rows cannot be compared in one plot, because they measure different things:\n"
        + "\n".join(lines)
        + f"\nKeep the rows of one kind, such as --where {most_common}"
    )


def get_point_key(rows: list[dict], x: str) -> str:
    """Returns the name whose values tell the points of a curve apart: x, workdir or cfg_scale."""
    if x in MODEL_COSTS:
        return "workdir"
    # In a plot of two measures the guidance scale changes along the curve.
    return "cfg_scale" if is_measure(rows, x) else x


def is_measure(rows: list[dict], name: str) -> bool:
    """Returns whether a name is a measure: a number in a row that is neither cost nor setting."""
    costs = (*CHECKPOINT_COSTS, *MODEL_COSTS, "img_per_s", "workdir")
    return name not in costs and any(isinstance(row.get(name), int | float) for row in rows)


def _get_identity(row):
    """Returns the values that identify a measurement: workdir, step and settings."""
    return {name: row.get(name) for name in ("workdir", "step")} | queries.get_settings(row)


def _to_json(value):
    """Returns a value as JSON, which can be a dictionary's key."""
    return json.dumps(value, sort_keys=True)


def _get_sort_key(value):
    """Returns a key that sorts values of any kind: None, numbers, lists, strings."""
    if value is None:
        return 0, 0
    if isinstance(value, list):
        return 2, [_get_sort_key(item) for item in value]
    return 3 if isinstance(value, str) else 1, value


def _make_label(settings):
    """Returns a curve's label, such as 'ddpm, 250 steps', from {name: JSON of the value}."""
    leading = [name for name in LEADING if name in settings]
    names = leading + [name for name in settings if name not in leading]
    phrases = [_make_phrase(name, settings[name]) for name in names]
    return ", ".join(phrase for phrase in phrases if phrase)


def _make_phrase(name, value_json):
    """Returns a setting in words, or '' for None."""
    if (name, value_json) in VALUE_PHRASES:
        return VALUE_PHRASES[name, value_json]
    value = json.loads(value_json)
    if value is None:
        return ""
    text = " to ".join(map(queries.to_text, value if isinstance(value, list) else [value]))
    if name in PHRASES:
        return PHRASES[name].format(text=text, value=value)
    return f"{plot_style.get_label(name)} {text}"
