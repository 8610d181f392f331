"""The table of a sweep, made of the rows of its cells, and samples of its models."""

import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dit_jax import conditions, models, workdirs
from dit_jax.data import pixels
from dit_jax.errors import MissingFileError, UserError
from dit_jax.evaluation import queries, row_schema, rows
from dit_jax.sampling import pictures
from dit_jax.system import files, json_files, schemas
from dit_jax.workdirs import metric_lines
from experiments.scaling.cells import record
from experiments.scaling.fits import selection, table

logger = logging.getLogger("dit_jax")

# Sampling settings in the order in which an error lists them.
SETTINGS = ("sampler", "steps", "grid", "cfg_scale", "num", "seed", "labels", "raw")
CODE = ("device", "jax", "git_revision")
# Columns that are empty for a UNet.
DIT_COLUMNS = ("block", "depth", "hidden_size", "num_heads", "patch_size")
SHOWN = 10  # samples shown per model
SAMPLE_KEYS = ("sampler", "steps", "cfg_scale", "num", "seed", "labels")
NEEDED = {  # required keys of an evaluation's row
    "step": schemas.is_count,
    "sample": schemas.object_of({key: row_schema.SAMPLE[key] for key in SAMPLE_KEYS}),
    "extractor": schemas.object_of({"name": schemas.is_string}),
    "reference": schemas.object_of({"name": schemas.is_string}),
    "picture": schemas.is_string,
    **dict.fromkeys(CODE, schemas.is_string),
}


def collect(
    workdir: pathlib.Path, where: Sequence[str] = (), cells: Sequence[str] | None = None
) -> list[dict]:
    """Returns the table: a row per compute point that a cell has reached, by gmacs, cell, step.

    Args:
      where: conditions on the evaluations, as --where of `dit_jax.plot`.
      cells: names; None is all cells that have begun.
    Raises: FileNotFoundError if there is no row; ValueError if evaluations differ in their
      settings, or if a directory does not have its cell's name.
    """
    return [line for line, _ in _read_points(workdir, where, cells)]


def _read_points(workdir, where, cells=None):
    """Returns pairs (row of the table, its evaluation or None)."""
    paths = [path for path in list_directories(workdir) if cells is None or path.name in cells]
    _check_names(paths)
    evaluations = [row for path in paths for row in _evaluations(path, bool(where))]
    for condition in where:
        evaluations = queries.select(evaluations, condition)
    _check_alike(evaluations)
    last = {(row["workdir"], row["step"]): row for row in evaluations}  # later rows replace earlier
    # A condition can only hold for an evaluation, so with --where other compute points are dropped.
    points = [
        (line, row) for path in paths for line, row in _collect_cell(path, last) if row or not where
    ]
    if not points:
        raise MissingFileError(f"no cell in {workdir} has reached a compute point yet.")
    return sorted(points, key=lambda point: [point[0][key] for key in ("gmacs", "cell", "step")])


def list_directories(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the directories of cells that have begun.   Raises: FileNotFoundError for none."""
    paths = sorted(path.parent for path in workdir.glob(f"*/{record.FILE}"))
    if not paths:
        raise MissingFileError(
            f"{workdir} holds no cells: python -m experiments.scaling.sweep runs them there."
        )
    return paths


def _check_names(found):
    """Raises unless each directory has its cell's name; rows of a copy would count twice."""
    for path in found:
        if path.name != (name := _record(path)["name"]):
            shown = files.printable(path.parent / name)
            raise UserError(
                f"{files.printable(path)} holds the cell of {shown}: a cell has one directory, "
                f"which bears its name. Move a copy out of {path.parent}; name the cell's own as "
                "it was."
            )


def _evaluations(directory, every):
    """Returns the evaluations of a cell, with the keys that `dit_jax.plot` needs.

    Args: every, False for the evaluations of the sweep's last run only, which cell.json lists.
    """
    pictures = _record(directory).get("pictures", ())
    lines = json_files.read_json_lines(directory / "evaluations.jsonl", _list_invalid_keys)
    return [
        _add_place(row, directory.name, i)
        for i, row in enumerate(lines, 1)
        if "sample" in row and (every or row["picture"] in pictures)
    ]


def _add_place(row, workdir, number):
    """Returns the row with keys 'workdir' and 'place' added in front.

    `rows.measures` takes all keys behind 'picture' for measures, so nothing may be added there.
    """
    place = {"workdir": workdir, "place": f"{workdir} row {number}"}
    return {**place, **row, **place}  # again, in case a damaged row has such keys itself


def _list_invalid_keys(row):
    """Returns the keys of a row that are missing or have a wrong type."""
    form = NEEDED if "sample" in row else {}
    return row_schema.list_invalid_keys(row) or schemas.list_invalid_keys(row, form)


def _record(directory):
    """Returns the record of a cell.   Raises: ValueError, with the way out, if it is damaged."""
    try:
        return record.read(directory)
    except ValueError as error:
        raise UserError(f"{error}. The sweep, run again, writes it anew.") from None


def _check_alike(evaluations):
    """Raises unless all evaluations have the same sampler, number, extractor and reference."""

    def settings(row):
        sampled = queries.get_settings(row)
        vae = {"vae_digest": sampled.get("vae_digest")}
        measured = {name: sampled[name] for name in SETTINGS if name in sampled}
        rest = {k: v for k, v in sampled.items() if k not in measured and k not in vae}
        extractor = {f"extractor.{k}": v for k, v in row["extractor"].items()}
        reference = {f"reference.{k}": v for k, v in row["reference"].items()}
        return {**measured, **rest, **vae, **extractor, **reference}

    # As JSON, since a value may be a list.
    texts = [{name: json.dumps(v) for name, v in settings(row).items()} for row in evaluations]
    texts = pd.DataFrame(texts).fillna("null")
    lines = []
    for name in texts:
        counts = texts[name].value_counts()
        if len(counts) > 1:
            values = ", ".join(f"{value} in {n} rows" for value, n in counts.items())
            lines.append(f"  {name}: {values}")
    if lines:
        raise UserError(
            "these rows have different settings, so one table cannot hold them:\n"
            + "\n".join(lines)
            + "\nChoose with --where, such as --where num=1000 or --where sample.cfg_scale=1.5."
        )


def _collect_cell(directory, evaluations):
    """Returns the points of one cell, as `_read_points`.

    Args: evaluations, by (name of the cell's directory, step).
    """
    # A compute point has an evaluation of samples, held-out losses, or both.
    cell = _record(directory)
    held_out = {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval_")}
        for line in metric_lines.read_lines(directory / "metrics.jsonl")
        if "eval_loss" in line
    }
    config = workdirs.load_config(directory)
    _warn_of_lost(directory, config, cell, held_out)
    evaluated = {step: evaluations.get((directory.name, step)) for step in cell["steps"]}
    steps = [step for step in cell["steps"] if evaluated[step] or step in held_out]
    if not steps:
        return []

    # The order of the keys is the order of the table's columns; fits/table.py explains each.
    workdirs.check_draws_images(directory, config)
    model, counts = config.model, models.count(config)
    is_dit = model.name == "dit"
    lines = [
        {
            "cell": cell["name"],
            "grid": cell["grid"],
            "model": f"{cell['size']}/{model.patch_size}" if is_dit else cell["size"],
            "network": model.name,
            "size": cell["size"],
            **{key: model[key] if is_dit else None for key in DIT_COLUMNS},
            "tokens": counts.get("tokens"),
            "params": counts["params"],
            "gmacs": counts["gmacs"],
            "seed": config.seed,
            "learning_rate": config.optim.learning_rate,
            "batch_size": config.batch_size,
            "eval_draws": config.eval_draws,
            **cell["axes"],
            "step": step,
            "images_seen": step * config.batch_size,
            "train_gflops": step * config.batch_size * counts["train_gflops_per_image"],
            **held_out.get(step, {}),
            **_measured(evaluated[step]),
            **{name: (evaluated[step] or cell).get(name) for name in CODE},
        }
        for step in steps
    ]
    return [(line, evaluated[line["step"]]) for line in lines]


def _warn_of_lost(directory, config, found, held_out):
    """Logs a warning if held-out losses of a finished cell are missing in its metrics.jsonl."""
    # Held-out losses are measured at multiples of `every` and at the end.
    every = config.eval_every_steps
    measured = every and config.data.eval_split and found["state"] == "done"
    due = [s for s in found["steps"] if measured and (s % every == 0 or s == config.total_steps)]
    if lost := [step for step in due if step not in held_out]:
        logger.warning(
            "%s has lost the held-out loss of steps %s: the table lacks it. To make it again, "
            "remove the directory and run the sweep.",
            directory / "metrics.jsonl",
            ", ".join(map(str, lost)),
        )


def _measured(row):
    """Returns the table's columns from an evaluation; {} for None."""
    if row is None:
        return {}
    sample = row["sample"]
    return {
        **rows.get_measures(row),
        "sampler": sample["sampler"],
        "sampling_steps": sample["steps"],
        "cfg_scale": sample["cfg_scale"],
        "num": sample["num"],
        "extractor": row["extractor"]["name"],
        "reference": row["reference"]["name"],
    }


def sum_costs(workdir: pathlib.Path, cells: Sequence[str]) -> dict:
    """Returns the cost of the finished cells: their number, summed hours, and devices used."""
    records = [_record(path) for path in list_directories(workdir) if path.name in cells]
    done = [one for one in records if one["state"] == "done"]
    return {
        "cells": len(done),
        "hours": round(sum(one["wall_seconds"] for one in done) / 3600, 3),
        "devices": sorted({f"{one['devices']} x {one['device']}" for one in done}),
        "cells_seconds": {one["name"]: round(one["wall_seconds"], 1) for one in done},
    }


def read_samples(
    workdir: pathlib.Path, where: Sequence[str] = (), cells: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Returns samples of every model, drawn from the same noise and labels.

    A model is shown at the last step of its first seed.
    Args: as `collect`.
    Returns: image [models, n, H, W, C] uint8; label [n] int32; cell [models] of names.
    Raises: as `collect`; ValueError if there are no samples, if their shapes differ, or if a
      picture cannot be read or lies outside its cell.
    """
    points = [(line, row) for line, row in _read_points(workdir, where, cells) if row]
    if not points:
        raise UserError(f"no cell in {workdir} has samples: its sweep has evaluate.num=0.")
    lines = table.from_rows([line for line, _ in points])
    # The first point of a model is the one to show.
    lines = lines.sort_values(["seed", "step"], ascending=[True, False], kind="stable")
    lines = lines.groupby(selection.name_models(lines)).head(1).sort_values("gmacs", kind="stable")
    shown = [_read_samples(workdir / points[i][0]["cell"], points[i][1]) for i in lines.index]
    if len(shapes := {image.shape for image, _ in shown}) > 1:
        raise UserError(
            f"the samples of the cells in {workdir} have several shapes, {sorted(shapes)}: an "
            "array of them needs one."
        )
    return {
        "image": np.stack([image for image, _ in shown]),
        "label": shown[0][1],
        "cell": lines["cell"].to_numpy(str),
    }


def _read_samples(directory, row):
    """Reads the first image of each label from an evaluation's picture.

    Returns: images [n, H, W, C] uint8, labels [n].
    Raises: ValueError for a model without labels; as `_read_picture`.
    """
    config, sample = workdirs.load_config(directory), row["sample"]
    if config.model.condition != "label":
        raise UserError(
            f"{directory} has condition={config.model.condition}: only models with labels are "
            "compared. dit_jax.sample draws prompts."
        )
    images = _read_picture(directory, row, config.data.image_size)
    # The labels are drawn again from the seed: the first ones do not depend on the number drawn.
    num = min(sample["num"], len(images))
    labels = conditions.draw_labels(sample["labels"], num, config.model.num_classes, sample["seed"])
    labels = np.sort(labels, kind="stable")  # the picture shows images sorted by label
    _, first = np.unique(labels, return_index=True)
    images = images[first[:SHOWN]]
    return images[..., : config.data.image_channels], labels[first[:SHOWN]]


def _read_picture(directory, row, size):
    """Reads the images [n, H, W, 3] in an evaluation's picture.

    The path comes from a file that a stranger may have written, so it must lie in the cell's
    directory `evaluations`.
    Raises: ValueError with the picture and the row's place.
    """
    folder, _, name = row["picture"].partition("/")
    path = directory / folder / name
    try:
        if folder != "evaluations" or not name or "/" in name or "\0" in name:
            raise UserError("it is not in the cell's directory evaluations")
        if path.parent.is_symlink() or path.is_symlink() or not path.is_file():
            raise UserError("it is no file there; links, pipes and devices are not read")
        image = pixels.decode(pixels.read_file(path))
        return pictures.split_grid(np.asarray(pixels.to_channels(image, 3)), size)
    except ValueError as error:
        raise UserError(
            f"cannot read the picture {files.printable(row['picture'])} of "
            f"{files.printable(row['place'])} in {files.printable(directory)}: {error}"
        ) from error


def write(
    workdir: pathlib.Path,
    out: pathlib.Path,
    where: Sequence[str] = (),
    cells: Sequence[str] | None = None,
) -> list[dict]:
    """Writes the table, and its cost as .cost.json beside it; returns the table's rows.

    Args and raises: as `collect`.
    """
    lines = collect(workdir, where, cells)
    table.write(out, lines)
    total = sum_costs(workdir, {line["cell"] for line in lines})
    # In a file of its own: times differ between runs, and equal sweeps should make equal tables.
    files.replace_text(out.with_suffix(".cost.json"), json.dumps(total, indent=1) + "\n")
    return lines
