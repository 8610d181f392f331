"""Curves of one value of rows against another: which rows are comparable, and which are a curve."""

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

MODEL_COSTS = ("gmacs", "params")  # one number for each model
# One number for each checkpoint.
CHECKPOINT_COSTS = ("step", "images_seen", "train_gflops", "seconds")
# Values that the rows of a plot must share. Otherwise their distances measure different things.
SAME = ("extractor.name", "extractor.dtype", "extractor.digest", "reference.digest", "num")
SMALLEST, LARGEST = 1e-100, 1e100  # magnitudes of numbers other than 0; matplotlib overflows beyond

# Settings in the label of a curve. Other settings are their name and value.
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
FIRST = ("workdir", "step", "sampler", "steps")  # these begin a label


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of a curve, in the order in which a line joins them."""

    label: str  # what sets the curve apart; '' for a single one
    points: dict[Hashable, list[tuple[float | str, float]]]  # (x, y) of its seeds

    def means(self) -> list[tuple[float | str, float]]:
        """Returns (x, y) of each point: the means over its seeds."""
        return [
            (x[0] if isinstance(x[0], str) else float(np.mean(x)), float(np.mean(y)))
            for x, y in (zip(*seeds, strict=True) for seeds in self.points.values())
        ]

    def describe_seeds(self) -> str:
        """Returns 'mean of 3 seeds', or '' if no point has several."""
        counts = [len(seeds) for seeds in self.points.values()]
        least, most = min(counts), max(counts)
        return "" if most == 1 else f"mean of {f'{least} to ' * (least < most)}{most} seeds"


def from_rows(rows: list[dict], x: str, y: str) -> list[Curve]:
    """Returns the curves of y against x, without the rows that lack one of them.

    Of rows that differ only in their measures, as those of two code revisions, the last counts.
    Raises: ValueError if no row has both, if y is no number, or for rows that cannot be compared;
      as `check_drawable`.
    """
    complete = select_complete(rows, x, y)
    _check(rows, complete, x, y)
    point_key = get_point_key(complete, x)
    # A row replaces earlier ones of the same measurement.
    latest = {_to_json(_identity(row)): row for row in complete}
    if num_replaced := len(complete) - len(latest):
        logger.info("%d rows were measured again: the last ones count.", num_replaced)
    rows = list(latest.values())
    # Curves differ in the settings that vary between rows, except for those that vary along a curve
    # or between the seeds of a point.
    along = {x, y, point_key, "seed", "num"}
    if x in CHECKPOINT_COSTS:
        along.add("step")
    values = collections.defaultdict(set)
    for row in rows:
        for name, value in _identity(row).items():
            values[name].add(_to_json(value))
    varying = [name for name in values if len(values[name]) > 1 and name not in along]
    # Rows that agree in all these settings, and in the key of the point, are seeds of one point.
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    order_key = x if x in MODEL_COSTS else point_key
    for row in sorted(rows, key=lambda row: _order(queries.get_value(row, order_key))):
        identity, x_value = _identity(row), queries.get_value(row, x)
        x_value = x_value if queries.is_number(x_value) else queries.to_text(x_value)
        curve = groups[tuple(_to_json(identity.get(name)) for name in varying)]
        seeds = curve[_to_json(queries.get_value(row, point_key))]
        seeds.append((x_value, queries.get_value(row, y)))
    return [
        Curve(_label(dict(zip(varying, key, strict=True))), dict(groups[key]))
        for key in sorted(groups, key=lambda key: [_order(json.loads(text)) for text in key])
    ]


def select_complete(rows: list[dict], x: str, y: str) -> list[dict]:
    """Returns the rows that have both values."""
    return [
        row for row in rows if None not in (queries.get_value(row, x), queries.get_value(row, y))
    ]


def _check(rows, complete, x, y):
    """Raises ValueError unless there are complete rows, of numbers that can be drawn together."""
    if not complete:
        missing = [n for n in (x, y) if all(queries.get_value(row, n) is None for row in rows)]
        what = " and no row has ".join(missing) or f"both {x} and {y}"
        known = queries.list_names(rows) or "nothing"
        raise UserError(f"no row has {what}. The rows have {known}.")
    if missing := len(rows) - len(complete):
        logger.info("%d of %d rows lack %s or %s: left out.", missing, len(rows), x, y)
    places = {}  # whether x is a number -> the first such row
    for row in complete:
        place = row.get("place", "a row")
        values = {name: queries.get_value(row, name) for name in (x, y)}
        if isinstance(values[y], str | list):
            raise UserError(f"{y} is no number, but {values[y]!r}: it can only be --x.")
        check_drawable(place, values)
        places.setdefault(queries.is_number(values[x]), f"{values[x]!r} in {place}")
    if len(places) > 1:
        raise UserError(
            f"{x} is a number in some rows and none in others: {places[True]}, {places[False]}. "
            "Keep those of one kind with --where, or mend the file."
        )
    _check_comparable(complete, x)


def check_drawable(place: str, values: dict) -> None:
    """Raises ValueError unless every number of a row is 0 or has a size that can be drawn.

    Args:
      place: of the row, for the message.
      values: name -> value; other values than numbers pass.
    """
    for name, number in values.items():
        if queries.is_number(number) and (abs(number) > LARGEST or 0 < abs(number) < SMALLEST):
            raise UserError(
                f"{place} has {name}={ranges.shorten(number)}, "
                f"which is not drawn: but for 0, sizes must be {SMALLEST:g} to {LARGEST:g}. "
                "Leave the row out, or mend the file."
            )


def _check_comparable(rows, x):
    """Raises ValueError, with a way out, unless rows agree in the values SAME; x may vary."""
    differing, lines = [], []
    for name in SAME:
        places = collections.defaultdict(list)
        for row in rows:
            text = queries.to_text(queries.get_value(row, name))
            places[text].append(row.get("place", "a row"))
        if len(places) > 1 and name != x:
            differing.append(name)
            for text, (first, *others) in places.items():
                more = f" and {len(others)} more" if others else ""
                lines.append(f"  {name}={text or repr(text)} in {first}{more}")
    if not differing:
        return
    conditions = collections.Counter(
        ",".join(f"{name}={queries.to_text(queries.get_value(row, name))}" for name in differing)
        for row in rows
    )
    ((most_common, _),) = conditions.most_common(1)
    raise UserError(
        "these rows cannot be compared in one plot, they differ in what they measure:\n"
        + "\n".join(lines)
        + f"\nKeep those of one kind, such as --where {most_common}"
    )


def get_point_key(rows: list[dict], x: str) -> str:
    """Returns the name whose values distinguish the points: x, or what is written at each."""
    if x in MODEL_COSTS:
        return "workdir"
    # Between two measures, the guidance scale is what changes along the curve.
    return "cfg_scale" if is_measure(rows, x) else x


def is_measure(rows: list[dict], name: str) -> bool:
    """Returns whether a name is a measure: a number in a row that is no cost and no setting."""
    costs = (*CHECKPOINT_COSTS, *MODEL_COSTS, "img_per_s", "workdir")
    return name not in costs and any(isinstance(row.get(name), int | float) for row in rows)


def _identity(row):
    """Returns all values that determine a result."""
    names = ("workdir", "step")
    return {name: row.get(name) for name in names} | queries.get_settings(row)


def _to_json(value):
    """Returns a value as text that can be a key; json.loads gives the value back."""
    return json.dumps(value, sort_keys=True)


def _order(value):
    """Returns a key that sorts values of any kind: None, numbers, intervals, words."""
    if value is None:
        return 0, 0
    if isinstance(value, list):
        return 2, [_order(one) for one in value]
    return 3 if isinstance(value, str) else 1, value


def _label(varying):
    """Returns a curve's label, 'ddpm, 250 steps', from name -> JSON of a varying setting."""
    first = [name for name in FIRST if name in varying]
    names = first + [name for name in varying if name not in first]
    return ", ".join(filter(None, (_describe(name, varying[name]) for name in names)))


def _describe(name, value_json):
    """Returns a setting in words, or '' for None."""
    if (name, value_json) in VALUE_PHRASES:
        return VALUE_PHRASES[name, value_json]
    value = json.loads(value_json)
    if value is None:
        return ""
    text = " to ".join(map(queries.to_text, value if isinstance(value, list) else [value]))
    if name in PHRASES:
        return PHRASES[name].format(text=text, value=value)
    return f"{plot_style.label(name)} {text}"
