"""Plots of rows of measures: which rows form a curve, and the names of the axes."""

import collections
import dataclasses
import glob
import json
import logging
import pathlib
import re
from collections.abc import Hashable, Iterable

import numpy as np

from dit_jax import workdirs
from dit_jax.config import ranges
from dit_jax.diffusion import samplers
from dit_jax.errors import MissingFileError, UserError
from dit_jax.evaluation import plot_style, row_schema
from dit_jax.system import json_files

logger = logging.getLogger("dit_jax")

# Values with one number for each model.
MODEL_COSTS = ("gmacs", "params")
CHECKPOINT_COSTS = (
    "step",
    "images_seen",
    "train_gflops",
    "seconds",
)  # one number for each checkpoint
# Names with a logarithmic axis. A measure that begins as in DISTANCES gets one if its largest value
# is more than SPAN times its smallest.
LOG = ("steps", "num", "images_seen", "train_gflops", *MODEL_COSTS)
DISTANCES, SPAN = ("fid", "sfid", "fd_"), 10
# Values that the rows of a plot must share. Otherwise their distances measure different things.
SAME = ("extractor.name", "extractor.dtype", "extractor.digest", "reference.digest", "num")

LEAST, MOST = 1e-100, 1e100  # magnitudes of numbers other than 0; matplotlib overflows beyond
LONG = 20  # characters of a label that leaves little room beside it


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

    def seeds(self) -> str:
        """Returns 'mean of 3 seeds', or '' if no point has several."""
        counts = [len(seeds) for seeds in self.points.values()]
        least, most = min(counts), max(counts)
        return "" if most == 1 else f"mean of {f'{least} to ' * (least < most)}{most} seeds"


def plot(rows: list[dict], x: str, y: str, out: pathlib.Path) -> None:
    """Writes the plot of y against x to a .png or .svg.

    Args:
      rows: as `read` returns them.
      x, y: names as for `value`.
    Raises: ValueError as `curves`; OSError.
    """
    plot_style.save(draw(rows, x, y), out)


def read(patterns: Iterable[str]) -> list[dict]:
    """Returns the rows of files or globs.

    Each row gets 'workdir', the shortest distinct name of its workdir, and 'place', its file and
    number.
    Raises: FileNotFoundError for a pattern without a file.
    """
    paths = []
    for pattern in patterns:
        literal = pathlib.Path(pattern).is_file()  # a file's name may look like a glob
        matches = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise MissingFileError(
                f"no file {pattern}: python -m dit_jax.evaluate --workdir DIR writes "
                "DIR/evaluations.jsonl."
            )
        paths += [path for path in matches if path not in paths]
    names = _distinct([_directory(path) for path in paths])
    return [
        {**row, "workdir": name, "place": f"{path} row {i}"}
        for path, name in zip(paths, names, strict=True)
        for i, row in enumerate(
            json_files.read_json_lines(pathlib.Path(path), row_schema.list_invalid_keys), 1
        )
    ]


def _directory(path):
    """Returns the parts of the path of the workdir, or of the images, that a file belongs to.

    A workdir's file is evaluations.jsonl. That of images is NAME.evaluations.jsonl beside them.
    """
    path = pathlib.Path(path).absolute()
    if path.name == "evaluations.jsonl":
        return path.parent.parts
    return path.with_name(path.name.removesuffix(".evaluations.jsonl")).parts


def _distinct(directories):
    """Returns a name for each directory: as few of its last parts as tell all apart."""
    for count in range(1, max(map(len, directories)) + 1):
        names = ["/".join(parts[-count:]) for parts in directories]
        if len(set(names)) == len(names):
            break
    return names


def value(row: dict, name: str):
    """Returns a row's value, such as 'fid', or a setting, such as 'steps'; None if it has neither.

    A dot leads into an object: 'reference.digest'.
    """
    outer, dot, inner = name.partition(".")
    result = row.get(outer, settings(row).get(outer))
    if dot:
        result = result.get(inner) if isinstance(result, dict) else None
    return None if isinstance(result, dict) else result


def settings(row: dict) -> dict:
    """Returns how a row was measured, without settings that its sampler or grid ignores."""
    if "samples" in row:  # images without a run; they give their file its name
        return {"num": row["samples"]["num"]}
    if "sample" not in row:
        likelihood = row.get("likelihood", {})
        return likelihood and {"clip_x_0": False, **likelihood}  # older rows lack it
    sample = {"guide": None, "guide_step": None, **workdirs.upgrade_sample(row["sample"])}
    # Otherwise rows that differ in an ignored setting would become different curves.
    for key in list(sample):
        for chosen, owners in samplers.get_owners(key).items():
            if sample.get(chosen) not in owners:
                sample.pop(key, None)
    return sample


def where(rows: list[dict], condition: str) -> list[dict]:
    """Returns the rows that meet a condition such as 'num=50000,sampler=ddpm'.

    Raises: ValueError for a condition of another form, a name that no row has, or if no row is
      left.
    """
    # A comma separates conditions only before another name: values may have commas too.
    for part in re.split(r",(?=[\w.]+=)", condition):
        name, equals, expected = part.partition("=")
        if not equals:
            raise UserError(f"--where={condition}: {part!r} is no NAME=VALUE.")
        known = {_text(value(row, name)): None for row in rows}
        if set(known) == {"none"}:
            raise UserError(f"no row has {name!r} of --where. They have {_names(rows)}.")
        rows = [row for row in rows if _matches(value(row, name), expected)]
        if not rows:
            raise UserError(f"no row has {part}: the rows have {name} {', '.join(known)}.")
    return rows


def _matches(found, wanted):
    """Returns whether a value equals the text that a user typed; numbers compare as numbers."""
    if _is_number(found):
        try:
            return float(wanted) == found
        except ValueError:
            return False
    return _text(found).lower() == wanted.lower()


def _text(found):
    """Returns a value as a user types it."""
    if found is None or isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, list):
        return ",".join(map(_text, found))
    return found if isinstance(found, str) else f"{found:.10g}"


def _names(rows):
    """Returns the names that --where, --x and --y accept for these rows, for messages."""
    names = {name: None for row in rows for name in (*row, *settings(row))}
    known = [name for name in names if any(value(row, name) is not None for row in rows)]
    return ", ".join(sorted(set(known) - {"place", "git_revision", "picture"}))


def curves(rows: list[dict], x: str, y: str) -> list[Curve]:
    """Returns the curves of y against x, without the rows that lack one of them.

    If rows differ only in their measures, such as rows of two code revisions, the last one is
    drawn.
    Raises: ValueError if no row has both, if y is no number, or for rows that cannot be compared;
      as `check_drawable`.
    """
    # Rows that cannot be drawn are left out or refused.
    complete = _complete(rows, x, y)
    if not complete:
        missing = [n for n in (x, y) if all(value(row, n) is None for row in rows)]
        what = " and no row has ".join(missing) or f"both {x} and {y}"
        raise UserError(f"no row has {what}. The rows have {_names(rows) or 'nothing'}.")
    if len(complete) < len(rows):
        missing = len(rows) - len(complete)
        logger.info("%d of %d rows lack %s or %s: left out.", missing, len(rows), x, y)
    if text := next((v for row in complete if isinstance(v := value(row, y), str | list)), None):
        raise UserError(f"{y} is no number, but {text!r}: it can only be --x.")
    _check_kinds(complete, x)
    for row in complete:
        check_drawable(row.get("place", "a row"), {name: value(row, name) for name in (x, y)})
    _check_comparable(complete, x)
    # A row replaces earlier ones of the same measurement.
    point_key = _point_key(complete, x)
    kept = {_frozen(_identity(row)): row for row in complete}
    if num_replaced := len(complete) - len(kept):
        logger.info("%d rows were measured again: the last ones count.", num_replaced)
    rows = list(kept.values())
    # Curves differ in the settings that vary between rows, except for those that vary along a curve
    # or between the seeds of a point.
    same = {x, y, point_key, "seed", "num", *(["step"] if x in CHECKPOINT_COSTS else [])}
    keys = dict.fromkeys(key for row in rows for key in _identity(row) if key not in same)
    varying = [
        key for key in keys if len({_frozen(i[key]) for i in map(_identity, rows) if key in i}) > 1
    ]
    # Rows that agree in all these settings, and in the key of the point, are seeds of one point.
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in sorted(
        rows, key=lambda row: _order(value(row, x if x in MODEL_COSTS else point_key))
    ):
        identity = _identity(row)
        key = tuple((name, _frozen(identity.get(name))) for name in varying)
        x_value = value(row, x)
        point = (x_value if _is_number(x_value) else _text(x_value), value(row, y))
        groups[key][_frozen(value(row, point_key))].append(point)
    ordered = sorted(groups, key=lambda key: [_order(json.loads(v)) for _, v in key])
    return [
        Curve(_label({name: json.loads(v) for name, v in key}), dict(groups[key]))
        for key in ordered
    ]


def _complete(rows, x, y):
    """Returns the rows that have both values."""
    return [row for row in rows if None not in (value(row, x), value(row, y))]


def _check_kinds(rows, x):
    """Raises unless --x is a number in all rows, or in none.

    Raises: ValueError with two places.
    """
    places = {}
    for row in rows:
        place = row.get("place", "a row")
        places.setdefault(_is_number(value(row, x)), f"{value(row, x)!r} in {place}")
    if len(places) > 1:
        raise UserError(
            f"{x} is a number in some rows and none in others: {places[True]}, {places[False]}. "
            "Keep those of one kind with --where, or mend the file."
        )


def check_drawable(place: str, values: dict) -> None:
    """Raises unless each number of a row is 0 or has a magnitude from LEAST to MOST.

    Args:
      place: of the row, for the message.
      values: name -> value; other values than numbers pass.
    Raises: ValueError with the row's place, and the name and value of the first other number.
    """
    for name, number in values.items():
        if _is_number(number) and (abs(number) > MOST or 0 < abs(number) < LEAST):
            raise UserError(
                f"{place} has {name}={ranges.shorten(number)}, "
                f"which is not drawn: but for 0, sizes of numbers must be {LEAST:g} to {MOST:g}. "
                "Leave the row out, or mend the file."
            )


def _is_number(found):
    """Returns whether a value is a number. True and False are none."""
    return isinstance(found, int | float) and not isinstance(found, bool)


def _check_comparable(rows, x):
    """Raises unless the rows agree in the values SAME, of which x may vary.

    Raises: ValueError with the values that differ, and a condition that keeps the most common kind.
    """
    differing = {}
    for name in SAME:
        places = collections.defaultdict(list)
        for row in rows:
            places[_text(value(row, name))].append(row.get("place", "a row"))
        if len(places) > 1 and name != x:
            differing[name] = places
    if not differing:
        return
    lines = [
        f"  {name}={text or repr(text)} in {places[0]}"
        + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        for name, values in differing.items()
        for text, places in values.items()
    ]
    common = collections.Counter(
        tuple(_text(value(row, name)) for name in differing) for row in rows
    )
    kind, _ = common.most_common(1)[0]
    condition = ",".join(f"{name}={text}" for name, text in zip(differing, kind, strict=True))
    raise UserError(
        "these rows cannot be compared in one plot, they differ in what they measure:\n"
        + "\n".join(lines)
        + f"\nKeep those of one kind, such as --where {condition}"
    )


def _point_key(rows, x):
    """Returns the name whose values tell the points of a curve apart.

    It is x, or the name whose value is written at each point.
    """
    if x in MODEL_COSTS:
        return "workdir"
    # Of two measures plotted against each other, the guidance scale is what changes along the
    # curve.
    return "cfg_scale" if _is_measure(rows, x) else x


def _is_measure(rows, name):
    """Returns whether a name is a measure: a number in a row that is no cost and no setting."""
    costs = (*CHECKPOINT_COSTS, *MODEL_COSTS, "img_per_s", "workdir")
    return name not in costs and any(isinstance(row.get(name), int | float) for row in rows)


def _identity(row):
    """Returns all values that determine a result."""
    return {"workdir": row.get("workdir"), "step": row.get("step"), **settings(row)}


def _frozen(found):
    """Returns a value as text that can be a key; json.loads gives the value back."""
    return json.dumps(found, sort_keys=True)


def _order(found):
    """Returns a key that sorts values of any kind: None, numbers, intervals, words."""
    kinds = (type(None), int | float, list, str)
    rank = next(i for i, kind in enumerate(kinds) if isinstance(found, kind))
    if isinstance(found, list):
        return rank, [_order(value) for value in found]
    return rank, found or 0 if rank < 2 else found


def _label(varying):
    """Returns the label of a curve: {'sampler': 'ddpm', 'steps': 250} gives 'ddpm, 250 steps'."""
    first = [name for name in ("workdir", "step", "sampler", "steps") if name in varying]
    names = first + [name for name in varying if name not in first]
    return ", ".join(filter(None, (_setting(name, varying[name]) for name in names)))


def _setting(name, found):
    """Returns a setting in words, or '' for None."""
    if name == "guide":
        return f"guided by {found}" if found else "no guide"
    if found is None:
        return ""
    if name == "raw":
        return "raw parameters" if found else "EMA"
    text = " to ".join(map(_text, found)) if isinstance(found, list) else _text(found)
    if name in ("workdir", "sampler", "kind"):
        return text
    if name in ("step", "steps"):
        return f"step {found:,}" if name == "step" else f"{found:,} steps"
    if name in ("grid", "variance", "labels"):
        return f"{text} {name}"
    return f"{plot_style.label(name)} {text}"


def axis_label(rows: list[dict], name: str, with_num: bool = False) -> str:
    """Returns the label of an axis: 'FID', or 'FID (50,000 samples)' with the number of samples."""
    text = plot_style.label(name)
    num = {value(row, "num") for row in rows if value(row, name) is not None}
    if with_num and _is_measure(rows, name) and len(num) == 1 and None not in num:
        images = "held-out images" if any("likelihood" in row for row in rows) else "samples"
        text += "\n" * (len(text) > LONG) or " "
        text += f"({num.pop():,} {images})"
    return text


def draw(rows: list[dict], x: str, y: str):
    """Returns the matplotlib Figure of y against x.

    Raises: ValueError as `curves`.
    """
    matplotlib = plot_style.import_matplotlib()
    drawn = curves(rows, x, y)
    rows = _complete(rows, x, y)
    point_key = _point_key(rows, x)
    # Long labels, or more than four curves, do not fit inside the axes.
    labels = [_with_seeds(curve) for curve in drawn]
    longest = max(map(len, labels))
    outside = len(drawn) > 4 or longest > 1.2 * LONG
    columns = 1 if longest > LONG or not outside else 2
    with matplotlib.rc_context(plot_style.STYLE):
        height = plot_style.HEIGHT + 0.16 * outside * -(-len(drawn) // columns)
        figure = matplotlib.figure.Figure(figsize=(plot_style.WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw_curve(axes, i, curve, point_key, x) for i, curve in enumerate(drawn)]
        points = [p for curve in drawn for seeds in curve.points.values() for p in seeds]
        for axis, name, column in ((axes.xaxis, x, 0), (axes.yaxis, y, 1)):
            _scale(axis, name, [point[column] for point in points])
        axes.set_xlabel(axis_label(rows, x))
        axes.set_ylabel(axis_label(rows, y, with_num=True))
        title = (
            f"at points: {plot_style.LABELS[point_key]}" if point_key == "cfg_scale" != x else None
        )
        if any(labels) or title:
            place = dict(loc="outside lower center" if outside else "best", ncols=columns)
            options = dict(title=title, frameon=False, alignment="left", **place)
            named = [line for line, label in zip(lines, labels, strict=True) if label]
            plot_style.legend(figure if outside else axes, named, filter(None, labels), **options)
    return figure


def _with_seeds(curve):
    """Returns a curve's label with its number of seeds."""
    if not curve.label or not curve.seeds():
        return curve.label or curve.seeds()
    return f"{curve.label} ({curve.seeds()})"


def _draw_curve(axes, i, curve, at, x):
    """Draws a curve, and returns its line.

    Each point is named by its value of `at`, the result of `_point_key`, unless that is x itself.
    """
    color, marker = (
        plot_style.COLORS[i % len(plot_style.COLORS)],
        plot_style.MARKERS[i % len(plot_style.MARKERS)],
    )
    means = curve.means()
    xs, ys = zip(*means, strict=True)
    xs = [plot_style.literal(name) if isinstance(name, str) else name for name in xs]
    # A line between words or models would suggest values in between.
    joined = x not in MODEL_COSTS and not isinstance(xs[0], str)
    dash = (
        plot_style.DASHES[i // len(plot_style.COLORS) % len(plot_style.DASHES)]
        if joined
        else "none"
    )
    (line,) = axes.plot(xs, ys, color=color, marker=marker, linestyle=dash)
    several = [point for seeds in curve.points.values() if len(seeds) > 1 for point in seeds]
    if several:
        plot_style.draw_seeds(axes, several, color)
    if at == x:
        return line
    axes.margins(0.12)  # room for names
    for j, (key, mean) in enumerate(zip(curve.points, means, strict=True)):
        # Many models have similar sizes: their names alternate above and below.
        below = at == "workdir" and j % 2
        place = dict(xytext=(-3, -3), ha="right", va="top") if below else dict(xytext=(3, 3))
        if (text := json.loads(key)) is not None:
            grey = dict(textcoords="offset points", fontsize=7, color="0.25")
            axes.annotate(plot_style.literal(_text(text)), mean, **grey, **place)
    return line


def _scale(axis, name, values):
    """Makes an axis logarithmic if its values call for it, and gives it readable ticks."""
    if isinstance(values[0], str):
        return
    low, high = min(values), max(values)
    spans = name.startswith(DISTANCES) and high > SPAN * low
    counts = name in ("step", "images_seen", "params")
    if low > 0 and (name in LOG or spans):
        plot_style.log_scale(axis, counts)
    elif counts:
        axis.set_major_formatter(
            plot_style.import_matplotlib().ticker.EngFormatter(sep="")
        )  # 400k, 1M
