"""The rows of a sweep's cells as one table, and samples of its models."""

import collections
import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from dit_jax import conditions, models, workdirs
from dit_jax.data import pixels
from dit_jax.errors import MissingFileError, UserError
from dit_jax.evaluation import plots, rows
from dit_jax.sampling import pictures
from dit_jax.system import files, forms, json_files
from dit_jax.workdirs import metric_lines
from experiments.scaling.cells import record
from experiments.scaling.fits import selection, table

logger = logging.getLogger("dit_jax")

SETTINGS = ("sampler", "steps", "grid", "cfg_scale", "num", "seed", "labels", "raw")
CODE = ("device", "jax", "git_revision")
OF_DIT = ("block", "depth", "hidden_size", "num_heads", "patch_size")  # empty of a UNet
SHOWN = 10  # samples of a model
OF_SAMPLE = ("sampler", "steps", "cfg_scale", "num", "seed", "labels")
NEEDED = {  # of a row of samples
    "step": forms.is_count,
    "sample": forms.object_of({key: forms.SAMPLE[key] for key in OF_SAMPLE}),
    "extractor": forms.object_of({"name": forms.is_text}),
    "reference": forms.object_of({"name": forms.is_text}),
    "picture": forms.is_text,
    **dict.fromkeys(CODE, forms.is_text),
}


def collect(
    workdir: pathlib.Path, where: Sequence[str] = (), cells: Sequence[str] | None = None
) -> list[dict]:
    """The table's rows, by gmacs, cell and step: of every compute point that a cell has reached.

    Args: where, as --where of `dit_jax.plot`, of the evaluations.   cells, by name; None is
      all that have begun.
    Raises: FileNotFoundError if there is no row; ValueError for evaluations that were not done
      alike, and for a directory of another name than its cell's.
    """
    return [line for line, _ in _points(workdir, where, cells)]


def _points(workdir, where, cells=None):
    """(row of the table, the evaluation it is of or None)."""
    found = [path for path in directories(workdir) if cells is None or path.name in cells]
    _check_names(found)
    evaluations = [row for path in found for row in _evaluations(path, bool(where))]
    for condition in where:
        evaluations = plots.where(evaluations, condition)
    _check_alike(evaluations)
    last = {(row["workdir"], row["step"]): row for row in evaluations}
    points = [
        (line, row) for path in found for line, row in _of_cell(path, last) if row or not where
    ]
    if not points:
        raise MissingFileError(f"no cell in {workdir} has reached a compute point yet.")
    return sorted(points, key=lambda point: [point[0][key] for key in ("gmacs", "cell", "step")])


def directories(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Those of the cells that have begun.   Raises: FileNotFoundError if none has."""
    found = sorted(path.parent for path in workdir.glob(f"*/{record.FILE}"))
    if not found:
        raise MissingFileError(
            f"{workdir} holds no cells: python -m experiments.scaling.sweep runs them there."
        )
    return found


def _check_names(found):
    """Demands that each directory bears its cell's name: rows of a copy would count twice."""
    for path in found:
        if path.name != (name := _record(path)["name"]):
            shown = files.printable(path.parent / name)
            raise UserError(
                f"{files.printable(path)} holds the cell of {shown}: a cell has one directory, "
                f"which bears its name. Move a copy out of {path.parent}; name the cell's own as "
                "it was."
            )


def _evaluations(directory, every):
    """The rows of samples of a cell, with what `dit_jax.plot` asks of them.

    Those that the sweep has made last, or every one.
    """
    pictures = _record(directory).get("pictures", ())
    found = json_files.read_json_lines(directory / "evaluations.jsonl", _list_wrong)
    return [
        _placed(row, directory.name, i)
        for i, row in enumerate(found, 1)
        if "sample" in row and (every or row["picture"] in pictures)
    ]


def _placed(row, workdir, number):
    """The row with its place in front, since its measures are last; a damaged row may have one."""
    place = {"workdir": workdir, "place": f"{workdir} row {number}"}
    return {**place, **row, **place}


def _list_wrong(row):
    form = NEEDED if "sample" in row else {}
    return forms.wrong_in_row(row) or forms.wrong_keys(row, form)


def _record(directory):
    try:
        return record.read(directory)
    except ValueError as error:
        raise UserError(f"{error}. The sweep, run again, writes it anew.") from None


def _check_alike(found):
    """Demands one sampler, number of samples, extractor and reference of all evaluations."""

    def settings(row):
        sampled = plots.settings(row)
        of_vae = {"vae_digest": sampled.get("vae_digest")}
        measured = {name: sampled[name] for name in SETTINGS if name in sampled}
        rest = {k: v for k, v in sampled.items() if k not in measured and k not in of_vae}
        extractor = {f"extractor.{k}": v for k, v in row["extractor"].items()}
        reference = {f"reference.{k}": v for k, v in row["reference"].items()}
        return {**measured, **rest, **of_vae, **extractor, **reference}

    of_rows = [settings(row) for row in found]
    names = dict.fromkeys(name for values in of_rows for name in values)
    lines = []
    for name in names:
        counts = collections.Counter(json.dumps(values.get(name)) for values in of_rows)
        if len(counts) > 1:
            values = ", ".join(f"{value} in {n} rows" for value, n in counts.most_common())
            lines.append(f"  {name}: {values}")
    if lines:
        raise UserError(
            "these rows were not measured alike, so that one table cannot hold them:\n"
            + "\n".join(lines)
            + "\nChoose with --where, such as --where num=1000 or --where sample.cfg_scale=1.5."
        )


def _of_cell(directory, evaluations):
    """The points of a cell, as `_points`."""
    found = _record(directory)
    held_out = {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval_")}
        for line in metric_lines.read_lines(directory / "metrics.jsonl")
        if "eval_loss" in line
    }
    config = workdirs.load_config(directory)
    _warn_of_lost(directory, config, found, held_out)
    evaluated = {step: evaluations.get((directory.name, step)) for step in found["steps"]}
    steps = [step for step in found["steps"] if evaluated[step] or step in held_out]
    if not steps:
        return []
    workdirs.check_draws(directory, config)
    model, counts = config.model, models.count(config)
    of_dit = model.name == "dit"
    lines = [
        {
            "cell": found["name"],
            "grid": found["grid"],
            "model": f"{found['size']}/{model.patch_size}" if of_dit else found["size"],
            "network": model.name,
            "size": found["size"],
            **{key: model[key] if of_dit else None for key in OF_DIT},
            "tokens": counts.get("tokens"),
            "params": counts["params"],
            "gmacs": counts["gmacs"],
            "seed": config.seed,
            "learning_rate": config.optim.learning_rate,
            "batch_size": config.batch_size,
            "eval_draws": config.eval_draws,
            **found["axes"],
            "step": step,
            "images_seen": step * config.batch_size,
            "train_gflops": step * config.batch_size * counts["train_gflops_per_image"],
            **held_out.get(step, {}),
            **_measured(evaluated[step]),
            **{name: (evaluated[step] or found).get(name) for name in CODE},
        }
        for step in steps
    ]
    return [(line, evaluated[line["step"]]) for line in lines]


def _warn_of_lost(directory, config, found, held_out):
    """Says which held-out losses of a cell that is done are not in its metrics.jsonl."""
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
    """The columns of an evaluation."""
    if row is None:
        return {}
    sample = row["sample"]
    return {
        **rows.measures(row),
        "sampler": sample["sampler"],
        "sampling_steps": sample["steps"],
        "cfg_scale": sample["cfg_scale"],
        "num": sample["num"],
        "extractor": row["extractor"]["name"],
        "reference": row["reference"]["name"],
    }


def cost(workdir: pathlib.Path, cells: Sequence[str]) -> dict:
    """What the cells took that are done: hours of each added up, and on which devices each ran."""
    records = [_record(path) for path in directories(workdir) if path.name in cells]
    done = [one for one in records if one["state"] == "done"]
    return {
        "cells": len(done),
        "hours": round(sum(one["wall_seconds"] for one in done) / 3600, 3),
        "devices": sorted({f"{one['devices']} x {one['device']}" for one in done}),
        "cells_seconds": {one["name"]: round(one["wall_seconds"], 1) for one in done},
    }


def samples(
    workdir: pathlib.Path, where: Sequence[str] = (), cells: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Samples of every model at its last step, of its first seed, all of the same noise and labels.

    Args: as `collect`.
    Returns: image [models, n, H, W, C] uint8, label [n] int32; cell [models], as in the table.
    Raises: as `collect`; ValueError if there are no samples, for those of several sizes, and for a
      picture that is none or lies outside of its cell.
    """
    points = [(line, row) for line, row in _points(workdir, where, cells) if row]
    if not points:
        raise UserError(f"no cell in {workdir} has samples: its sweep has evaluate.num=0.")
    last = {}
    for line, row in sorted(points, key=lambda point: (point[0]["seed"], -point[0]["step"])):
        last.setdefault(selection.model_of(line), (line, row))
    order = sorted(last.values(), key=lambda point: point[0]["gmacs"])
    shown = [_shown(workdir / line["cell"], row) for line, row in order]
    if len(shapes := {image.shape for image, _ in shown}) > 1:
        raise UserError(
            f"the samples of the cells in {workdir} have several shapes, {sorted(shapes)}: an "
            "array of them needs one."
        )
    return {
        "image": np.stack([image for image, _ in shown]),
        "label": shown[0][1],
        "cell": np.array([line["cell"] for line, _ in order]),
    }


def _shown(directory, row):
    """(images [n, H, W, C], labels [n]) out of an evaluation's picture, the first of each label."""
    config, sample = workdirs.load_config(directory), row["sample"]
    if config.model.condition != "label":
        raise UserError(
            f"{directory} is told {config.model.condition}: samples side by side are of labels. "
            "dit_jax.sample draws prompts."
        )
    images = _read_picture(directory, row, config.data.image_size)
    # The labels of the first images are the same, however many there are.
    num = min(sample["num"], len(images))
    labels = conditions.draw_labels(sample["labels"], num, config.model.num_classes, sample["seed"])
    labels = np.sort(labels, kind="stable")  # as the picture has them
    _, first = np.unique(labels, return_index=True)
    images = images[first[:SHOWN]]
    return images[..., : config.data.image_channels], labels[first[:SHOWN]]


def _read_picture(directory, row, size):
    """The images [n, H, W, 3] of an evaluation's picture.

    Raises: ValueError that names the picture and the row's place.
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
    """Writes the table and its cost; arguments and errors as `collect`."""
    lines = collect(workdir, where, cells)
    table.write(out, lines)
    found = cost(workdir, {line["cell"] for line in lines})
    files.replace_text(out.with_suffix(".cost.json"), json.dumps(found, indent=1) + "\n")
    return lines
