"""The rows of a sweep's cells as one table, and samples of its models.

  python -m experiments.scaling.collect --workdir DIR --out table.csv [--samples samples.npz]
  python -m experiments.scaling.collect --workdir DIR --where sample.cfg_scale=1 --out table.csv

Rows that were not measured alike are refused. `table.py` tells the columns. Beside the table
`<out>.cost.json` says what it took: its times differ from run to run, those in the table do not.
"""

import collections
import json
import pathlib

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import checkpoint, cli, flops, generate, metrics, plot, rows, spool
from experiments.scaling import table

FLAGS = flags.FLAGS

SETTINGS = ("sampler", "steps", "grid", "cfg_scale", "num", "seed", "labels", "raw")
CODE = ("device", "jax", "git_revision")
SHOWN = 10  # samples of a model


def collect(workdir: pathlib.Path, conditions: list[str]) -> list[dict]:
    """The table's rows, by gmacs, cell and step: of every compute point that a cell has reached.

    Of evaluations that were done again the last counts.
    Args: conditions, as --where of `dit_jax.plot`, of the evaluations.
    Raises: FileNotFoundError if there is no row; ValueError for evaluations that were not done
      alike.
    """
    cells = directories(workdir)
    evaluations = [row for directory in cells for row in _evaluations(directory)]
    for condition in conditions:
        evaluations = plot.where(evaluations, condition)
    _check_alike(evaluations)
    last = {(row["workdir"], row["step"]): row for row in evaluations}
    found = [
        line
        for directory in cells
        for line in _lines(directory, last)
        if not conditions or (line["cell"], line["step"]) in last
    ]
    if not found:
        raise FileNotFoundError(f"no cell in {workdir} has reached a compute point yet.")
    return sorted(found, key=lambda line: (line["gmacs"], line["cell"], line["step"]))


def directories(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Those of the cells that have begun.   Raises: FileNotFoundError if none has."""
    found = sorted(path.parent for path in workdir.glob("*/cell.json"))
    if not found:
        raise FileNotFoundError(
            f"{workdir} holds no cells: python -m experiments.scaling.sweep runs them there."
        )
    return found


def _evaluations(directory):
    """The rows of samples of a cell, with what `dit_jax.plot` asks of them."""
    return [
        {"workdir": directory.name, "place": f"{directory.name} row {i}", **row}
        for i, row in enumerate(metrics.read_json_lines(directory / "evaluations.jsonl"), 1)
        if "sample" in row
    ]


def _check_alike(found):
    """Demands one sampler, number of samples, extractor and reference of all evaluations."""

    def settings(row):
        sampled = plot.settings(row)
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
        raise ValueError(
            "these rows were not measured alike, so that one table cannot hold them:\n"
            + "\n".join(lines)
            + "\nChoose with --where, such as --where num=1000 or --where sample.cfg_scale=1.5."
        )


def _lines(directory, evaluations):
    """The table's rows of a cell."""
    record = json.loads((directory / "cell.json").read_text())
    held_out = {
        line["step"]: {name: value for name, value in line.items() if name.startswith("eval_")}
        for line in metrics.read_json_lines(directory / "metrics.jsonl")
        if "eval_loss" in line
    }
    evaluated = {step: evaluations.get((directory.name, step)) for step in record["steps"]}
    steps = [step for step in record["steps"] if evaluated[step] or step in held_out]
    if not steps:
        return []
    config = checkpoint.load_config(directory)
    model, counts = config.model, flops.count(config)
    return [
        {
            "cell": record["name"],
            "grid": record["grid"],
            "model": f"{record['size']}/{model.patch_size}",
            "size": record["size"],
            "block": model.block,
            "depth": model.depth,
            "hidden_size": model.hidden_size,
            "num_heads": model.num_heads,
            "patch_size": model.patch_size,
            "tokens": counts["tokens"],
            "params": counts["params"],
            "gmacs": counts["gmacs"],
            "seed": config.seed,
            "learning_rate": config.optim.learning_rate,
            "batch_size": config.batch_size,
            "step": step,
            "images_seen": step * config.batch_size,
            "train_gflops": step * config.batch_size * counts["train_gflops_per_image"],
            **held_out.get(step, {}),
            **_measured(evaluated[step]),
            **{name: (evaluated[step] or record)[name] for name in CODE},
        }
        for step in steps
    ]


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


def cost(workdir: pathlib.Path) -> dict:
    """What the cells that are done took: wall time from start to end, on which devices."""
    records = [json.loads((d / "cell.json").read_text()) for d in directories(workdir)]
    done = [record for record in records if record["state"] == "done"]
    return {
        "cells": len(done),
        "hours": round(sum(record["wall_seconds"] for record in done) / 3600, 3),
        "devices": sorted({f"{record['devices']} x {record['device']}" for record in done}),
        "cells_seconds": {record["name"]: round(record["wall_seconds"], 1) for record in done},
    }


def samples(workdir: pathlib.Path, lines: list[dict]) -> dict[str, np.ndarray]:
    """Samples of every model at its last step, of its first seed, all of the same noise and labels.

    Args: lines, of `collect`.
    Returns: image [models, n, H, W, C] uint8, label [n] int32, and the models' names.
    """
    last = {}
    for row in sorted(lines, key=lambda row: (row["seed"], -row["step"])):
        last.setdefault((row["model"], row["block"]), row)
    images, label = [], None
    for row in last.values():
        directory = workdir / row["cell"]
        evaluated = metrics.read_json_lines(directory / "evaluations.jsonl")
        picture = next(r for r in reversed(evaluated) if r["step"] == row["step"])
        config = checkpoint.load_config(directory)
        image, label = _shown(directory, picture, config)
        images.append(image)
    names = [f"{model} {block}" if _blocks(lines) > 1 else model for model, block in last]
    return {"image": np.stack(images), "label": label, "model": np.array(names)}


def _blocks(lines):
    return len({row["block"] for row in lines})


def _shown(directory, row, config: ConfigDict):
    """(images [n, H, W, C], labels [n]) out of an evaluation's picture, the first of each label."""
    sample = row["sample"]
    labels = generate.draw_labels(
        sample["labels"], sample["num"], config.model.num_classes, sample["seed"]
    )
    grid = np.asarray(Image.open(directory / row["picture"]))
    images = generate.split_grid(grid, config.data.image_size)
    labels = np.sort(labels[: len(images)], kind="stable")  # as the picture has them
    _, first = np.unique(labels, return_index=True)
    images = images[first[:SHOWN]]
    channels = config.data.image_channels
    return images[..., :channels], labels[first[:SHOWN]]


def write(workdir: pathlib.Path, out: pathlib.Path, conditions: list[str]) -> list[dict]:
    """Writes the table and its cost; errors as `collect`."""
    lines = collect(workdir, conditions)
    table.write(out, lines)
    text = json.dumps(cost(workdir), indent=1) + "\n"
    out.with_suffix(".cost.json").write_text(text)
    return lines


def main(_):
    workdir, out = pathlib.Path(FLAGS.workdir), pathlib.Path(FLAGS.out)
    cli.check_out(out, (".csv",))
    if FLAGS.samples:
        cli.check_out(pathlib.Path(FLAGS.samples), (".npz",), "--samples=")
    lines = write(workdir, out, FLAGS.where or [])
    print(f"{out}: {len(lines)} rows of {len({row['cell'] for row in lines})} cells")
    if FLAGS.samples:
        arrays = samples(workdir, lines)
        spool.replace(pathlib.Path(FLAGS.samples), lambda f: np.savez_compressed(f, **arrays))
        print(FLAGS.samples)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a sweep.", required=True)
    flags.DEFINE_string("out", None, "The .csv to write.", required=True)
    flags.DEFINE_string("samples", None, "Write samples of all models to this .npz.")
    flags.DEFINE_multi_string("where", None, "NAME=VALUE,...: only rows of which this is true.")
    cli.run(main)
