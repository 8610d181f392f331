"""Measures the samples of a checkpoint: one JSON row, appended to DIR/evaluations.jsonl.

  python -m dit_jax.evaluate --workdir runs/digits --num 1000

The measures are of raw pixels: `fd_pixels`, a Frechet distance, and `label_accuracy`.
"""

import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, data, fid, flops, generate, metrics

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3


def label_accuracy(
    images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray
) -> float:
    """Share of images that a 3-nearest-neighbour classifier on the real ones gives their label.

    Args: images [N, H, W, C] uint8, labels [N]; distances are Euclidean in pixels.
    """
    # Imported here: only this needs it, and it takes a second.
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(NEIGHBOURS)
    classifier.fit(_pixels(real_images), real_labels)
    return float(classifier.score(_pixels(images), labels))


def fd_pixels(images: np.ndarray, real_images: np.ndarray) -> dict[str, float]:
    """Frechet distance of pixels in [-1, 1] to the real images, and between halves of those.

    Returns: 'fd_pixels', and 'fd_pixels_real_halves', what two sets of real images come to.
    """
    real = _pixels(real_images)[np.random.RandomState(0).permutation(len(real_images))]
    halves = [fid.Statistics.of(half) for half in np.array_split(real, 2)]
    statistics = fid.Statistics.of(_pixels(images))
    return {
        "fd_pixels": fid.frechet_distance(statistics, halves[0].merge(halves[1])),
        "fd_pixels_real_halves": fid.frechet_distance(*halves),
    }


def _pixels(images):
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def evaluate(
    workdir: pathlib.Path,
    settings: dict | None = None,
    num: int = 1000,
    seed: int = 0,
    step: int | None = None,
    raw: bool = False,
    progress: bool = False,
) -> dict:
    """The row of `num` samples, labels in equal shares; one that was measured before is read back.

    Args: settings overrides keys of `config.sample`; the others as in `generate`.
    Writes evaluation_<step>.png, 100 of the samples with a class per row when there are ten.
    """
    trained = generate.load(workdir, step, raw)
    config, counts = trained.config, flops.count(trained.config.model)
    config.sample.update(settings or {})
    row = {
        "step": trained.step,
        "sample": {**config.sample.to_dict(), "num": num, "seed": seed, "raw": raw},
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": trained.step * config.batch_size,
        "train_gflops": trained.step * config.batch_size * counts["train_gflops_per_image"],
    }
    path = workdir / "evaluations.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        if row.items() <= (measured := json.loads(line)).items():
            logger.info("measured before: %s", path)
            return measured

    source = data.open_source(config, config.data.train_split)
    real = [source[i] for i in range(len(source))]
    real_images = np.stack([example["image"] for example in real])
    real_labels = np.array([example["label"] for example in real])
    labels = np.arange(num) * trained.model.num_classes // num
    sample = generate.make_sample_fn(config.sample, trained.model, trained.process, trained.mesh)
    images = generate.generate(
        sample, trained.params, labels, seed, trained.mesh, progress=progress
    )
    shown = images[np.linspace(0, num - 1, min(num, 100)).astype(int)]
    Image.fromarray(generate.image_grid(shown, columns=10)).save(picture_path(workdir, row))
    row["label_accuracy"] = label_accuracy(images, labels, real_images, real_labels)
    row |= fd_pixels(images, real_images)
    row |= metrics.training_speed(workdir, trained.step, config.batch_size)
    row["git_revision"] = _git_revision()
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def picture_path(workdir: pathlib.Path, row: dict) -> pathlib.Path:
    return workdir / f"evaluation_{row['step']}.png"


def _git_revision():
    """The commit of this code, with '-dirty' if it has changes; '' outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = pathlib.Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        return ""


def main(_):
    workdir = pathlib.Path(FLAGS.workdir)
    row = evaluate(
        workdir,
        cli.sampling_settings(),
        FLAGS.num,
        FLAGS.seed,
        FLAGS.step,
        FLAGS.raw,
        progress=sys.stderr.isatty(),
    )
    print(f"picture: {picture_path(workdir, row)}")
    print(
        f"label_accuracy {row['label_accuracy']:.3f}  fd_pixels {row['fd_pixels']:.3f} (between "
        f"halves of the real images: {row['fd_pixels_real_halves']:.3f})  "
        f"img_per_s {row['img_per_s'] or 0:.0f}  steps {row['step']}  "
        f"seconds {row['seconds'] or 0:.0f}"
    )


if __name__ == "__main__":
    cli.define_sampling()
    flags.DEFINE_integer("num", 1000, "Samples.", lower_bound=2)
    cli.run(main)
