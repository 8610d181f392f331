"""The table of a sweep, made from the evaluations of its cells, and samples of its models."""

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

# Sampling settings, in the order in which an error lists them.
SETTINGS = ("sampler", "steps", "grid", "cfg_scale", "num", "seed", "labels", "raw")
CODE = ("device", "jax", "git_revision")  # columns that say what a row was measured with
# Columns that are empty for a UNet.
DIT_COLUMNS = ("block", "depth", "hidden_size", "num_heads", "patch_size")
MOST_SAMPLES = 10  # of a model
SAMPLE_KEYS = ("sampler", "steps", "cfg_scale", "num", "seed", "labels")
NEEDED = {  # keys that an evaluation of samples must have, and checks of their values
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
    return [row for row, _ in _read_points(workdir, where, cells)]


def _read_points(workdir, where, cells=None):
    """Returns pairs (row of the table, its evaluation or None)."""
    directories = _list_directories(workdir, cells)
    _check_directory_names(directories)
    evaluations = []
    for directory in directories:
        evaluations += _read_evaluations(directory, last_run_only=not where)
    for condition in where:
        evaluations = queries.select(evaluations, condition)
    _check_same_settings(evaluations)
    # Of several evaluations of a compute point, the last one counts.
    newest = {(evaluation["workdir"], evaluation["step"]): evaluation for evaluation in evaluations}
    points = [point for directory in directories for point in _collect_cell(directory, newest)]
    if where:  # a condition cannot hold for a compute point without an evaluation
        points = [(row, evaluation) for row, evaluation in points if evaluation]
    if not points:
        raise MissingFileError(f"no cell in {workdir} has reached a compute point yet.")
    return sorted(points, key=lambda point: [point[0][key] for key in ("gmacs", "cell", "step")])


def _list_directories(workdir, cells):
    """Returns the directories of the cells that have begun.   Raises: FileNotFoundError."""
    directories = sorted(path.parent for path in workdir.glob(f"*/{record.FILE}"))
    if not directories:
        raise MissingFileError(
            f"{workdir} holds no cells: python -m experiments.scaling.sweep runs them there."
        )
    return [path for path in directories if cells is None or path.name in cells]


def _check_directory_names(directories):
    """Raises unless each directory has its cell's name; rows of a copy would count twice."""
    for directory in directories:
        if directory.name != (name := _read_record(directory)["name"]):
            raise UserError(
                f"{files.printable(directory)} holds the cell of "
                f"{files.printable(directory.parent / name)}: a cell has one directory, with its "
                f"name. Move a copy out of {directory.parent}. Rename a renamed directory back."
            )


def _read_evaluations(directory, last_run_only):
    """Returns the evaluations of a cell, with the keys that `dit_jax.plot` needs.

    Args: last_run_only, whether to drop evaluations that the sweep's last run did not make.
    """
    pictures = _read_record(directory).get("pictures", ())  # of the last run
    lines = json_files.read_json_lines(directory / "evaluations.jsonl", _list_invalid_keys)
    return [
        _add_place(evaluation, directory.name, line_number)
        for line_number, evaluation in enumerate(lines, 1)
        if "sample" in evaluation and (not last_run_only or evaluation["picture"] in pictures)
    ]


def _add_place(evaluation, workdir, line_number):
    """Returns an evaluation with the keys 'workdir' and 'place' added in front.

    `rows.get_measures` takes all keys after 'picture' for measures, so they may not come last.
    """
    place = {"workdir": workdir, "place": f"{workdir} row {line_number}"}
    return {**place, **evaluation, **place}  # again, in case a damaged row has these keys itself


def _list_invalid_keys(evaluation):
    """Returns the keys of an evaluation that are missing or have a wrong type."""
    form = NEEDED if "sample" in evaluation else {}
    return row_schema.list_invalid_keys(evaluation) or schemas.list_invalid_keys(evaluation, form)


def _read_record(directory):
    """Returns the record of a cell.   Raises: ValueError, with the way out, if it is damaged."""
    try:
        return record.read(directory)
    except ValueError as error:
        raise UserError(f"{error}. Run the sweep again, which writes it anew.") from None


def _check_same_settings(evaluations):
    """Raises a ValueError unless all evaluations have the same settings."""
    # As JSON, since a value may be a list.
    settings = pd.DataFrame(
        {name: json.dumps(value) for name, value in _get_settings(evaluation).items()}
        for evaluation in evaluations
    ).fillna("null")
    lines = []
    for name in settings:
        counts = settings[name].value_counts()
        if len(counts) > 1:
            values = ", ".join(f"{value} in {count} rows" for value, count in counts.items())
            lines.append(f"  {name}: {values}")
    if lines:
        raise UserError(
            "these rows have different settings, so one table cannot hold them:\n"
            + "\n".join(lines)
            + "\nChoose with --where, such as --where num=1000 or --where sample.cfg_scale=1.5."
        )


def _get_settings(evaluation):
    """Returns {name: value} of all settings that measures depend on, SETTINGS first."""
    sampling = queries.get_settings(evaluation)
    ordered = [name for name in SETTINGS if name in sampling]
    ordered += [name for name in sampling if name not in (*SETTINGS, "vae_digest")]
    settings = {name: sampling[name] for name in ordered}
    settings["vae_digest"] = sampling.get("vae_digest")
    for group in ("extractor", "reference"):
        settings |= {f"{group}.{key}": value for key, value in evaluation[group].items()}
    return settings


def _collect_cell(directory, evaluations):
    """Returns the points of one cell, as `_read_points`.

    Args: evaluations, by (name of the cell's directory, step).
    """
    # A compute point has an evaluation of samples, held-out losses, or both.
    cell = _read_record(directory)
    held_out = {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval_")}
        for line in metric_lines.read_lines(directory / "metrics.jsonl")
        if "eval_loss" in line
    }
    config = workdirs.load_config(directory)
    _warn_of_lost_losses(directory, config, cell, held_out)
    evaluated = {step: evaluations.get((directory.name, step)) for step in cell["steps"]}
    steps = [step for step in cell["steps"] if evaluated[step] or step in held_out]
    if not steps:
        return []

    # The order of the keys is the order of the table's columns; fits/table.py explains each.
    workdirs.check_draws_images(directory, config)
    model, counts = config.model, models.count(config)
    is_dit = model.name == "dit"
    rows_of_cell = [
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
            **_make_evaluation_columns(evaluated[step]),
            **{name: (evaluated[step] or cell).get(name) for name in CODE},
        }
        for step in steps
    ]
    return [(row, evaluated[row["step"]]) for row in rows_of_cell]


def _warn_of_lost_losses(directory, config, cell, held_out):
    """Logs a warning if held-out losses of a finished cell are missing in its metrics.jsonl."""
    # Held-out losses are measured at multiples of `every` and at the end.
    every = config.eval_every_steps
    if not every or not config.data.eval_split or cell["state"] != "done":
        return
    due = [step for step in cell["steps"] if step % every == 0 or step == config.total_steps]
    if lost := [step for step in due if step not in held_out]:
        logger.warning(
            "%s has lost the held-out loss of steps %s: the table lacks it. To make it again, "
            "remove the directory and run the sweep.",
            directory / "metrics.jsonl",
            ", ".join(map(str, lost)),
        )


def _make_evaluation_columns(evaluation):
    """Returns the table's columns from an evaluation; {} for None."""
    if evaluation is None:
        return {}
    sample = evaluation["sample"]
    return {
        **rows.get_measures(evaluation),
        "sampler": sample["sampler"],
        "sampling_steps": sample["steps"],
        "cfg_scale": sample["cfg_scale"],
        "num": sample["num"],
        "extractor": evaluation["extractor"]["name"],
        "reference": evaluation["reference"]["name"],
    }


def sum_costs(workdir: pathlib.Path, cells: Sequence[str]) -> dict:
    """Returns the cost of the finished cells: their number, summed hours, and devices used."""
    records = map(_read_record, _list_directories(workdir, cells))
    done = [cell for cell in records if cell["state"] == "done"]
    return {
        "cells": len(done),
        "hours": round(sum(cell["wall_seconds"] for cell in done) / 3600, 3),
        "devices": sorted({f"{cell['devices']} x {cell['device']}" for cell in done}),
        "cells_seconds": {cell["name"]: round(cell["wall_seconds"], 1) for cell in done},
    }


def read_samples(
    workdir: pathlib.Path, where: Sequence[str] = (), cells: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Returns samples of every model, drawn from the same noise and labels.

    They are from the last step of the model's first seed.
    Args: as `collect`.
    Returns: image [models, n, H, W, C] uint8; label [n] int32; cell [models] of names.
    Raises: as `collect`; ValueError if there are no samples, if their shapes differ, or if a
      picture cannot be read or is outside its cell.
    """
    points = [point for point in _read_points(workdir, where, cells) if point[1]]
    if not points:
        raise UserError(f"no cell in {workdir} has samples: its sweep has evaluate.num=0.")
    table_rows, evaluations = zip(*points, strict=True)
    chosen = table.from_rows(table_rows)
    # In this order, the first row of a model is the one to show.
    chosen = chosen.sort_values(["seed", "step"], ascending=[True, False], kind="stable")
    chosen = chosen.groupby(selection.name_models(chosen)).head(1)
    chosen = chosen.sort_values("gmacs", kind="stable")
    shown = [_read_samples(workdir / chosen["cell"][i], evaluations[i]) for i in chosen.index]
    if len(shapes := {image.shape for image, _ in shown}) > 1:
        raise UserError(
            f"the samples of the cells in {workdir} have several shapes, {sorted(shapes)}, which "
            "do not fit into one array. Choose cells of one shape with --where."
        )
    return {
        "image": np.stack([image for image, _ in shown]),
        "label": shown[0][1],
        "cell": chosen["cell"].to_numpy(str),
    }


def _read_samples(directory, evaluation):
    """Reads the first image of each label from an evaluation's picture.

    Returns: images [n, H, W, C] uint8, labels [n].
    Raises: ValueError for a model without labels; as `_read_picture`.
    """
    config, sample = workdirs.load_config(directory), evaluation["sample"]
    if config.model.condition != "label":
        raise UserError(
            f"{directory} has condition={config.model.condition}: only models with labels can be "
            "compared here. dit_jax.sample draws images of prompts."
        )
    images = _read_picture(directory, evaluation, config.data.image_size)
    # The labels are drawn again from the seed. The first ones do not depend on how many are drawn.
    num = min(sample["num"], len(images))
    labels = conditions.draw_labels(sample["labels"], num, config.model.num_classes, sample["seed"])
    labels = np.sort(labels, kind="stable")  # the picture shows images sorted by label
    _, first_of_label = np.unique(labels, return_index=True)
    shown = first_of_label[:MOST_SAMPLES]
    return images[shown][..., : config.data.image_channels], labels[shown]


def _read_picture(directory, evaluation, size):
    """Reads the images [n, H, W, 3] in an evaluation's picture.

    The path comes from a file that a stranger may have written, so it must be in the cell's
    directory `evaluations`.
    Raises: ValueError with the picture and the evaluation's place.
    """
    folder, _, name = evaluation["picture"].partition("/")
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
            f"cannot read the picture {files.printable(evaluation['picture'])} of "
            f"{files.printable(evaluation['place'])} in {files.printable(directory)}: {error}"
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
    table_rows = collect(workdir, where, cells)
    table.write(out, table_rows)
    cost = sum_costs(workdir, {row["cell"] for row in table_rows})
    # In a file of its own: times differ between runs, and equal sweeps should make equal tables.
    files.replace_text(out.with_suffix(".cost.json"), json.dumps(cost, indent=1) + "\n")
    return table_rows
