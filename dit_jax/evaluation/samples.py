"""Compares a run's samples, or existing images, with a reference: a row of measures."""

import functools
import logging
import pathlib

import jax
import numpy as np
from PIL import Image

from dit_jax import sharding
from dit_jax.errors import UserError
from dit_jax.evaluation import (
    batch_cache,
    extractors,
    image_progress,
    image_sets,
    measures,
    metrics,
    references,
    rows,
)
from dit_jax.sampling import generate, pictures, requests, runs
from dit_jax.system import files
from dit_jax.workdirs import digests, metric_lines

logger = logging.getLogger("dit_jax")

SHOWN = 100  # samples in the picture


def evaluate(
    trained: runs.Trained,
    workdir: pathlib.Path,
    extractor: extractors.Extractor,
    reference: references.Reference | None,
    num: int = 1000,
    seed: int = 0,
    labels: str = "random",
    batch_size: int | None = None,
    save_npz: pathlib.Path | None = None,
    progress: bool = False,
) -> dict:
    """Draws `num` samples and measures them; returns the row, or reads an earlier one.

    The workdir keeps finished batches until the row is written, so that a killed command resumes.
    Args:
      reference: the result of `references.load_for_run`.
      labels: the `labels` of `requests.draw`.
      save_npz: a file for all images, which the ADM evaluator reads: 'arr_0' [N, H, W, C] uint8,
        and 'label' if they have labels.
    Raises: ValueError for too few samples; FloatingPointError if samples or features are not
      finite; OSError if something cannot be written.
    """
    config, mesh = trained.config, trained.mesh
    request = requests.draw(config, labels, num, seed, workdir)
    # Everything that changes the samples apart from the parameters: `rows.find` compares it.
    settings = {**config.sample.to_dict(), "num": num, "seed": seed, "labels": labels}
    settings |= {"raw": trained.raw, "vae_digest": trained.vae_digest}
    settings |= trained.condition.describe(request)
    if guide := trained.guide:
        settings |= {"guide": guide.workdir, "guide_step": guide.step}
        settings["guide_digest"] = digests.digest(guide.params)
    row = rows.describe_checkpoint(trained, "sample", settings)
    row |= _describe_comparison(extractor, reference, num)
    # Images become features on the devices, without a copy to the host.
    extract = extractor.compile(mesh)

    def to_arrays(x_0):
        image = trained.to_image(x_0)
        return {"image": image, **extract(image)}

    def make_batches(ranges):
        sample = trained.make_sample_fn()
        arguments = trained.params, request, seed, mesh, to_arrays, batch_size, ranges
        for indices, batch in generate.batches(sample, *arguments):
            if trained.condition.has_classes:
                # The last batch may have more images than indices.
                label = np.resize(request.cond[indices], len(batch["image"]))
                batch = {**batch, "label": label}
            yield indices, batch

    speed = metric_lines.training_speed(workdir, trained.step, config.batch_size)

    def measure(arrays):
        return _measure(arrays, reference, trained.class_names, progress) | speed

    path = workdir / "evaluations.jsonl"
    return _add_row(path, row, num, make_batches, measure, save_npz, progress)


def evaluate_images(
    images: image_sets.ImageSet,
    extractor: extractors.Extractor,
    reference: references.Reference,
    num: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """Measures the first `num` images of a set, by default all; returns the row.

    Uses this process's devices. The row is written to NAME.evaluations.jsonl beside the images, and
    its picture to NAME.evaluations/.
    Raises: ValueError if there are fewer images than `num`; as `evaluate`.
    """
    num = num or images.num
    if num > images.num:
        name = files.printable(images.name)
        raise UserError(f"{name} has {images.num} images, fewer than --num={num}.")
    reference.check(images.shape)
    samples = {"name": images.name, "num": num, "digest": images.digest}
    row = {"samples": samples, **rows.describe_code()}
    row |= _describe_comparison(extractor, reference, num)
    batch_size = batch_size or generate.BATCH_PER_DEVICE * jax.local_device_count()

    def make_batches(ranges):
        for indices in ranges:
            extracted = extractors.extract(extractor, images, batch_size, indices)
            yield from ((part, block | features) for part, block, features in extracted)

    def measure(arrays):
        return _measure(arrays, reference, images.class_names, progress)

    return _add_row(path_beside(images), row, num, make_batches, measure, progress=progress)


def path_beside(images: image_sets.ImageSet) -> pathlib.Path:
    """Returns NAME.evaluations.jsonl beside the images; for a split, in the working directory."""
    path = pathlib.Path(images.name).expanduser().resolve()
    if not path.exists():
        path = pathlib.Path(images.name.replace("/", "_"))
    return path.with_name(f"{path.name.removesuffix('.npz')}.evaluations.jsonl")


def _describe_comparison(extractor, reference, num):
    """Returns the part of a row about extractor and reference; the first process has both."""

    def describe():
        measures.check_counts(num, reference)
        return reference.source

    return {"extractor": extractor.identity, "reference": sharding.broadcast_result(describe)}


def _measure(arrays, reference, class_names, progress):
    """Measures samples by their features and labels."""
    label = arrays.get("label")
    if label is not None and "probabilities" in arrays:
        _warn_if_sorted(label)
    inputs = measures.Inputs(arrays, reference, label, class_names, progress)
    values = measures.measure_features(inputs)
    rows.check(values)
    return values


def _add_row(path, row, num, make_batches, measure, save_npz=None, progress=False):
    """Measures a row and writes it to `path`; an earlier one is read. Returns the row.

    Args:
      make_batches: as for `_fill`.
      measure: measure(arrays) returns the measures of the features and labels of all images.
    """
    with rows.hold(path, row) as lock:
        name, first_process = rows.get_name(row), jax.process_index() == 0
        row["picture"] = f"{path.with_suffix('').name}/{name}.png"
        picture = path.parent / row["picture"]
        # The first process keeps batches in one of two directories: with all images, or with few.
        all_images = batch_cache.BatchCache(picture.with_suffix(".images"), row["git_revision"])
        few_images = batch_cache.BatchCache(picture.with_suffix(""), row["git_revision"])
        cache = all_images if save_npz else few_images

        def remove_batches():
            few_images.remove()
            all_images.remove()

        # An earlier row is read only if its picture, and the .npz if requested, exist as well.
        earlier_row = rows.find(path, row)
        complete = sharding.broadcast_result(
            lambda: picture.is_file() and (not save_npz or batch_cache.get_name(save_npz) == name)
        )
        if earlier_row and complete:
            logger.info("measured before: %s", path)
            if first_process:
                remove_batches()  # of a command that was killed after it wrote the row
            return earlier_row

        _fill(cache, num, make_batches, bool(save_npz), lock, progress)

        # Only the first process has all features, so it measures for all.
        def finish():
            arrays = cache.read(SHOWN)
            row.update(measure(arrays))
            _write_picture(picture, arrays["image"], arrays.get("label"))
            if save_npz:
                cache.write_npz(save_npz, name)
            # Written last, when picture and .npz are complete.
            rows.append(path, row)
            remove_batches()
            return row

        return sharding.broadcast_result(finish)


def _fill(cache, num, make_batches, all_images, lock, progress):
    """Adds the images that a cache lacks: none, some after an interruption, or all.

    Args:
      make_batches: make_batches(ranges) yields (indices, arrays) for the images in these ranges.
        The arrays are 'image', perhaps 'label', and the features. Rows after those of the indices
        only fill up the batch.
      all_images: whether the cache takes all images, or only those of the picture.
    """
    bounds = sharding.broadcast_result(
        lambda: [(part.start, part.stop) for part in cache.prepare(num)]
    )
    missing = [range(*pair) for pair in bounds]
    with image_progress.ImageProgress(num, num - sum(map(len, missing)), progress) as bar:
        for indices, batch in make_batches(missing) if missing else ():
            arrays = {name: np.asarray(a) for name, a in batch.items() if name != "image"}
            # Images are large: only those that will be written leave the device.
            if all_images or indices.start < SHOWN:
                arrays["image"] = generate.to_host(batch["image"])
            arrays = {name: array[: len(indices)] for name, array in arrays.items()}
            extractors.check_finite(arrays, indices)
            # The directory may have been moved or removed since the last batch.
            lock.check_together()
            sharding.broadcast_result(functools.partial(cache.add, indices, arrays))
            bar.update(len(indices))


def _warn_if_sorted(label):
    """Logs a warning if images are sorted by class, so that the Inception Score is too low."""
    size = metrics.SPLIT_SIZE
    parts = [label[i : i + size] for i in range(0, len(label) - size + 1, size)]
    if not parts:
        return
    num_classes = len(np.unique(label))
    classes_per_part = np.mean([len(np.unique(part)) for part in parts])
    # The expected number of classes in a part of shuffled images.
    classes_if_shuffled = num_classes * (1 - (1 - 1 / num_classes) ** size)
    if classes_per_part < classes_if_shuffled / 2:
        logger.warning(
            "the images are sorted by class, so the Inception Score is too low: it is the mean of "
            "parts of %d images, which have %.0f of the %d classes. Shuffle the images.",
            size,
            classes_per_part,
            num_classes,
        )


def _write_picture(path, image, label):
    """Writes the images in rows of ten, sorted by class if there are labels."""
    if label is not None:
        image = image[np.argsort(label[: len(image)], kind="stable")]
    picture = Image.fromarray(pictures.image_grid(image, columns=10))
    files.replace(path, lambda file: picture.save(file, "PNG"))
