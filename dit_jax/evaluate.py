"""Measures the samples of a checkpoint: a JSON row in DIR/evaluations.jsonl, a picture beside it.

  python -m dit_jax.evaluate --workdir runs/digits --num 1000

The measures are of raw pixels: `fd_pixels`, a Frechet distance, and `label_accuracy`.
"""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, data, fid, flops, generate, metrics, sharding

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3
MAX_VALUES = 4096  # of an image: the measures of raw pixels cost its cube, and mean little beyond


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
    values = int(np.prod(images.shape[1:]))
    if min(len(images), len(real_images) // 2) <= values:
        logger.warning(
            "fd_pixels: %d samples and %d real images in each half are too few for the covariance "
            "of %d values; compare it only with others of the same numbers.",
            len(images),
            len(real_images) // 2,
            values,
        )
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
    trained: generate.Trained,
    workdir: pathlib.Path,
    num: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """The row of `num` samples, labels in equal shares; one that was measured before is read back.

    Its 'picture' in the workdir shows 100 of the samples, with a class per row when there are ten.
    Raises: ValueError for images of more than MAX_VALUES values.
    """
    config, counts = trained.config, flops.count(trained.config)
    values = config.data.image_size**2 * config.data.image_channels
    if values > MAX_VALUES:
        raise ValueError(
            f"label_accuracy and fd_pixels are for small images, at most {MAX_VALUES} values; "
            f"these have {values}. Use dit_jax.sample to look at them."
        )
    sample = {**config.sample.to_dict(), "num": num, "seed": seed, "raw": trained.raw}
    if guide := trained.guide:
        sample |= {"guide": guide.workdir, "guide_step": guide.step}
    row = {
        "step": trained.step,
        "sample": json.loads(json.dumps(sample)),  # as it will be read back
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": trained.step * config.batch_size,
        "train_gflops": trained.step * config.batch_size * counts["train_gflops_per_image"],
    }
    settings_hash = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]
    row["picture"] = f"evaluations/{trained.step}-{settings_hash}.png"
    row["git_revision"] = _git_revision()
    if measured := sharding.from_first_process(_measured_before(workdir, row)):
        logger.info("measured before: %s", workdir / "evaluations.jsonl")
        return json.loads(measured)

    speed = metrics.training_speed(workdir, trained.step, config.batch_size)
    source = data.open_images(config, config.data.train_split)
    real = [source[i] for i in range(len(source))]
    real_images = np.stack([example["image"] for example in real])
    real_labels = np.array([example["label"] for example in real])
    labels = np.arange(num) * trained.model.num_classes // num
    images = generate.generate(
        trained.make_sample_fn(),
        trained.params,
        labels,
        seed,
        trained.mesh,
        trained.to_image,
        progress,
        batch_size,
    )
    row["label_accuracy"] = label_accuracy(images, labels, real_images, real_labels)
    row |= fd_pixels(images, real_images)
    row |= speed
    if jax.process_index() == 0:
        shown = images[np.linspace(0, num - 1, min(num, 100)).astype(int)]
        _write(workdir, row, generate.image_grid(shown, columns=10))
    return row


def _measured_before(workdir, row):
    """The same row with its measures as JSON, if its picture is still there; else ''."""
    if row["git_revision"].endswith("-dirty") or not (workdir / row["picture"]).is_file():
        return ""
    rows = metrics.read_json_lines(workdir / "evaluations.jsonl")
    return next((json.dumps(r) for r in rows if row.items() <= r.items()), "")


def _write(workdir, row, picture):
    path = workdir / "evaluations.jsonl"
    try:
        (workdir / row["picture"]).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(workdir / row["picture"])
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"cannot write to {workdir}: {error}\nMeasured: {json.dumps(row)}") from error


def _git_revision():
    """The commit of this code, with '-dirty' if it has changes; of an installation its version."""
    root = pathlib.Path(__file__).parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if (root / ".git").exists() and shutil.which("git"):
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return importlib.metadata.version("dit_jax")


def main(_):
    workdir = pathlib.Path(FLAGS.workdir)
    trained = generate.load(**cli.loading())
    row = evaluate(
        trained, workdir, FLAGS.num, FLAGS.seed, FLAGS.batch_size, progress=sys.stderr.isatty()
    )
    print(f"picture: {workdir / row['picture']}")
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
