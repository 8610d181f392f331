"""Evaluation of samples against a reference, for a run's samples or for images that exist."""

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
    """Returns the row of `num` samples. A row that was measured before is read back.

    Finished batches are kept in the workdir until the row is written: a killed command continues.
    Args:
      reference: as `references.load_for_run` returns it.
      labels: a kind of `requests.draw`.
      save_npz: where to write all images in the form of the ADM evaluator: 'arr_0' [N, H, W, C]
        uint8, and 'label' if they have any.
    Raises: ValueError for a reference of other images, or too few samples; FloatingPointError if
      samples or features are not finite; OSError if something cannot be written.
    """
    config, mesh = trained.config, trained.mesh
    request = requests.draw(config, labels, num, seed, workdir)
    # All that the samples depend on apart from the parameters: `rows.find` compares it.
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

    def output(x_0):
        image = trained.to_image(x_0)
        return {"image": image, **extract(image)}

    def batches(wanted):
        sample = trained.make_sample_fn()
        arguments = trained.params, request, seed, mesh, output, batch_size, wanted
        for numbers, batch in generate.batches(sample, *arguments):
            if trained.condition.has_classes:
                # The last batch has more images than numbers.
                label = np.resize(request.cond[numbers], len(batch["image"]))
                batch = {**batch, "label": label}
            yield numbers, batch

    speed = metric_lines.training_speed(workdir, trained.step, config.batch_size)

    def measure(arrays):
        return _measure(arrays, reference, trained.class_names, progress) | speed

    path = workdir / "evaluations.jsonl"
    return _add_row(path, row, num, batches, measure, save_npz, progress)


def evaluate_images(
    images: image_sets.ImageSet,
    extractor: extractors.Extractor,
    reference: references.Reference,
    num: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """Returns the row of the first `num` images of a set, by default of all.

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

    def batches(wanted):
        for part in wanted:
            extracted = extractors.extract(extractor, images, batch_size, part)
            yield from ((numbers, block | features) for numbers, block, features in extracted)

    def measure(arrays):
        return _measure(arrays, reference, images.class_names, progress)

    return _add_row(path_beside(images), row, num, batches, measure, progress=progress)


def path_beside(images: image_sets.ImageSet) -> pathlib.Path:
    """Returns NAME.evaluations.jsonl beside the images; of a split, in the working directory."""
    path = pathlib.Path(images.name).expanduser().resolve()
    if not path.exists():
        path = pathlib.Path(images.name.replace("/", "_"))
    return path.with_name(f"{path.name.removesuffix('.npz')}.evaluations.jsonl")


def _describe_comparison(extractor, reference, num):
    """Returns the part of a row about extractor and reference, which the first process has."""

    def describe():
        measures.check_counts(num, reference)
        return reference.source

    return {"extractor": extractor.identity, "reference": sharding.broadcast_result(describe)}


def _measure(arrays, reference, class_names, progress):
    """Returns the measures of samples from their features and labels."""
    label = arrays.get("label")
    if label is not None and "probabilities" in arrays:
        _warn_if_sorted(label)
    inputs = measures.Inputs(arrays, reference, label, class_names, progress)
    values = measures.measure_features(inputs)
    rows.check(values)
    return values


def _add_row(path, row, num, batches, measure, save_npz=None, progress=False):
    """Returns the row with its measures, and writes it to `path`, or reads it back from there.

    Args:
      batches: as for `_fill`.
      measure: measure(arrays) returns the values of all images' features and labels.
    """
    with rows.hold(path, row) as lock:
        name, first_process = rows.get_name(row), jax.process_index() == 0
        row["picture"] = f"{path.with_suffix('').name}/{name}.png"
        picture = path.parent / row["picture"]
        # The first process keeps batches in one of two directories: with or without all images.
        few_images, all_images = (
            batch_cache.BatchCache(picture.with_suffix(suffix), row["git_revision"])
            for suffix in ("", ".images")
        )
        cache = all_images if save_npz else few_images

        def remove_batches():
            few_images.remove()
            all_images.remove()

        # A finished row is read back only if its picture, and the .npz if requested, exist as well.
        measured = rows.find(path, row)
        complete = sharding.broadcast_result(
            lambda: picture.is_file() and (not save_npz or batch_cache.get_name(save_npz) == name)
        )
        if measured and complete:
            logger.info("measured before: %s", path)
            if first_process:
                remove_batches()  # left by a command that was killed after the row
            return measured

        _fill(cache, num, batches, bool(save_npz), lock, progress)

        # The first process alone has all features, so it measures for all.
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


def _fill(cache, num, batches, all_images, lock, progress):
    """Adds the images that a cache lacks: none, some after an interruption, or all.

    Args:
      batches: batches(wanted) yields (numbers, arrays) for the images in these ranges. The arrays
        are 'image', perhaps 'label', and the features. They may have more rows than there are
        numbers.
      all_images: whether the cache takes all images, or only those of the picture.
    """
    bounds = sharding.broadcast_result(
        lambda: [(part.start, part.stop) for part in cache.prepare(num)]
    )
    missing = [range(*pair) for pair in bounds]
    with image_progress.ImageProgress(num, num - sum(map(len, missing)), progress) as bar:
        for numbers, batch in batches(missing) if missing else ():
            arrays = {key: np.asarray(a) for key, a in batch.items() if key != "image"}
            # Images are large: only those that will be written leave the device.
            if all_images or numbers.start < SHOWN:
                arrays["image"] = generate.to_host(batch["image"])
            arrays = {key: array[: len(numbers)] for key, array in arrays.items()}
            extractors.check_finite(arrays, numbers)
            # The directory may have been moved or removed since the last batch.
            lock.check_together()
            sharding.broadcast_result(functools.partial(cache.add, numbers, arrays))
            bar.update(len(numbers))


def _warn_if_sorted(label):
    """Logs a warning if images sorted by class make the Inception Score too low."""
    size = metrics.SPLIT_SIZE
    parts = [label[i : i + size] for i in range(0, len(label) - size + 1, size)]
    if not parts:
        return
    classes = len(np.unique(label))
    classes_in_part = np.mean([len(np.unique(part)) for part in parts])
    # The expected number of different classes in a part of shuffled images.
    in_random_order = classes * (1 - (1 - 1 / classes) ** size)
    if classes_in_part < in_random_order / 2:
        logger.warning(
            "the images are sorted by class: of %d classes the parts of %d images, in their order, "
            "whose mean the Inception Score is, have %.0f, so it is too low. Shuffle them.",
            classes,
            size,
            classes_in_part,
        )


def _write_picture(path, image, label):
    """Writes the images in rows of ten, sorted by class if there are labels."""
    if label is not None:
        image = image[np.argsort(label[: len(image)], kind="stable")]
    picture = Image.fromarray(pictures.image_grid(image, columns=10))
    files.replace(path, lambda file: picture.save(file, "PNG"))
