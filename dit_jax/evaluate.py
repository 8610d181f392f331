"""Measures samples against real images: a JSON row in DIR/evaluations.jsonl, a picture beside it.

  python -m dit_jax.evaluate --workdir runs/dit --reference imagenet256.npz --num 50000 \\
      --sampler ddpm --steps 250 --cfg_scale 1.5
  python -m dit_jax.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  python -m dit_jax.evaluate --make_reference imagenet256.npz --reference imagenet2012:train \\
      --image_size 256
  python -m dit_jax.evaluate --workdir runs/dit --bpd --num 100

A reference is the ADM evaluator's .npz, one that --make_reference wrote, a folder of images or a
TFDS split; by default the run's training images. Images become features on the devices and, but
for those in the picture, stay there, unless --save_npz wants them. Killed and run again, the
command continues. With --bpd held-out images are measured: bits per dimension under the model,
with x_0 clipped as the run samples or as --clip_x_0 says.
"""

import functools
import json
import logging
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import (
    bits,
    cli,
    conditions,
    diffusion,
    extractors,
    fid,
    images,
    measures,
    metrics,
    references,
    rows,
    sharding,
    spool,
)
from dit_jax.config import ranges
from dit_jax.sampling import generate, pictures, runs
from dit_jax.system import files
from dit_jax.workdirs import digests

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

SHOWN = 100  # of the samples, in the picture


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
    """The row of `num` samples; one that was measured before is read back.

    What a batch was measured by is kept in the workdir until the row is written, so that a command
    that was killed continues.

    Args:
      reference: as `references.of_run`.   labels: the kind of `conditions.draw`.
      save_npz: where to write all images as the ADM evaluator reads them, 'arr_0' [N, H, W, C]
        uint8, and 'label' if they have any.
    Raises: ValueError for a reference of other images, or too few samples; FloatingPointError
      where samples or features are not finite; OSError if something cannot be written.
    """
    config, mesh = trained.config, trained.mesh
    told = conditions.draw(config, labels, num, seed, workdir)
    settings = {**config.sample.to_dict(), "num": num, "seed": seed, "labels": labels}
    settings |= {"raw": trained.raw, "vae_digest": trained.vae_digest}
    if config.model.condition != "label":
        settings["captions"] = told.digest()
    if guide := trained.guide:
        settings |= {"guide": guide.workdir, "guide_step": guide.step}
        settings["guide_digest"] = digests.digest(guide.params)
    row = rows.of_checkpoint(trained, "sample", settings)
    row |= _compared(extractor, reference, num)
    extract = extractor.compile(mesh)

    def output(x_0):
        image = trained.to_image(x_0)
        return {"image": image, **extract(image)}

    def batches(wanted):
        sample = trained.make_sample_fn()
        arguments = trained.params, told, seed, mesh, output, batch_size, wanted
        for numbers, batch in generate.batches(sample, *arguments):
            if trained.model.condition == "label" and trained.model.num_classes:
                label = np.resize(told.cond[numbers], len(batch["image"]))
                batch = {**batch, "label": label}
            yield numbers, batch

    speed = metrics.training_speed(workdir, trained.step, config.batch_size)
    path = workdir / "evaluations.jsonl"
    names = trained.class_names
    return _measure(path, row, speed, num, batches, reference, save_npz, progress, names)


def evaluate_images(
    found: images.ImageSet,
    extractor: extractors.Extractor,
    reference: references.Reference,
    num: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """The row of the first `num` of a set of images, by default all, on this process's devices.

    Row and picture are written beside the images, to NAME.evaluations.jsonl and NAME.evaluations/.
    Raises: ValueError for fewer images than `num`; else as `evaluate`.
    """
    num = num or found.num
    if num > found.num:
        name = files.printable(found.name)
        raise ValueError(f"{name} has {found.num} images, fewer than --num={num}.")
    samples = {"name": found.name, "num": num, "digest": found.digest}
    row = {"samples": samples, **rows.of_code()}
    reference.check(found.shape)
    row |= _compared(extractor, reference, num)
    batch_size = batch_size or generate.BATCH_PER_DEVICE * jax.local_device_count()

    def batches(wanted):
        for part in wanted:
            blocks, start = found.blocks(batch_size, part.start, part.stop), part.start
            for block, extracted in references.extract_blocks(extractor, blocks, batch_size):
                numbers = range(start, start + len(block["image"]))
                start = numbers.stop
                yield numbers, {**block, **extracted}

    path = path_beside(found)
    names = found.class_names
    return _measure(path, row, {}, num, batches, reference, None, progress, names)


def path_beside(found: images.ImageSet) -> pathlib.Path:
    """NAME.evaluations.jsonl beside the images; in the working directory for those of a split."""
    path = pathlib.Path(found.name).expanduser().resolve()
    if not path.exists():
        path = pathlib.Path(found.name.replace("/", "_"))
    return path.with_name(f"{path.name.removesuffix('.npz')}.evaluations.jsonl")


def _compared(extractor, reference, num):
    """What a row says of extractor and reference, in every process; `reference` is the first's."""
    sharding.together(lambda: reference and measures.check_counts(num, reference))
    source = json.loads(sharding.from_first_process(json.dumps(reference and reference.source)))
    return {"extractor": extractor.identity, "reference": source}


def _measure(path, row, speed, num, batches, reference, save_npz, progress, class_names=None):
    """The row with its measures, written to `path`, or read back from there.

    Args: batches(wanted) yields (numbers, {'image', perhaps 'label', features of the extractor})
      of these ranges of images, which may have more rows than numbers.
      class_names: of the labels, where known.
    """
    with rows.hold(path, row) as lock:
        name, first_process = rows.name(row), jax.process_index() == 0
        row["picture"] = f"{path.with_suffix('').name}/{name}.png"
        picture = path.parent / row["picture"]
        spools = [
            spool.Spool(picture.with_suffix(suffix), row["git_revision"])
            for suffix in ("", ".images")
        ]
        kept = spools[bool(save_npz)]
        measured = rows.find(path, row)
        complete = picture.is_file()
        complete &= not save_npz or spool.name_of(save_npz) == name
        if measured and sharding.from_first_process("complete" * complete):
            logger.info("measured before: %s", path)
            for rest in spools * first_process:  # if it was killed between the row and this
                rest.remove()
            return measured

        wanted = _find_missing(kept, num)
        with metrics.ImageProgress(num, num - sum(map(len, wanted)), progress) as bar:
            for numbers, batch in batches(wanted) if wanted else ():
                arrays = {key: np.asarray(a) for key, a in batch.items() if key != "image"}
                if save_npz or numbers.start < SHOWN:
                    arrays["image"] = generate.to_host(batch["image"])
                arrays = {key: array[: len(numbers)] for key, array in arrays.items()}
                references.check_finite(arrays, numbers)
                lock.check_together()
                sharding.together(functools.partial(_add, kept, numbers, arrays))
                bar.update(len(numbers))

        def finish():
            if not first_process:
                return None
            arrays = kept.read(SHOWN)
            _warn_if_sorted(arrays)
            label = arrays.get("label")
            found = measures.of_features(arrays, reference, label, progress, class_names)
            rows.check(found)
            row.update(found)
            row.update(speed)
            _write_picture(picture, arrays["image"], label)
            if save_npz:
                kept.write_npz(save_npz, name)
            rows.append(path, row)
            for rest in spools:
                rest.remove()
            return row

        return json.loads(sharding.from_first_process(json.dumps(sharding.together(finish))))


def _find_missing(kept, num):
    """The ranges of images that the first process has not kept yet, in every process."""
    missing = sharding.together(lambda: kept.find_missing(num) if jax.process_index() == 0 else [])
    bounds = sharding.from_first_process(json.dumps([(part.start, part.stop) for part in missing]))
    return [range(*pair) for pair in json.loads(bounds)]


def _add(kept, numbers, arrays):
    if jax.process_index() == 0:
        kept.add(numbers, arrays)


def _warn_if_sorted(arrays):
    if "probabilities" not in arrays or "label" not in arrays:
        return
    label, size = arrays["label"], fid.SPLIT_SIZE
    parts = [label[i : i + size] for i in range(0, len(label) - size + 1, size)]
    classes = len(np.unique(label))
    found = np.mean([len(np.unique(part)) for part in parts or [label]])
    in_random_order = classes * (1 - (1 - 1 / classes) ** size)
    if parts and found < in_random_order / 2:
        logger.warning(
            "the images are sorted by class: of %d classes the parts of %d images, in their order, "
            "whose mean the Inception Score is, have %.0f, so it is too low. Shuffle them.",
            classes,
            size,
            found,
        )


def _write_picture(path, image, label):
    """Images in rows of ten, by class where there are labels."""
    if label is not None:
        image = image[np.argsort(label[: len(image)], kind="stable")]
    picture = Image.fromarray(pictures.image_grid(image, columns=10))
    files.replace(path, lambda file: picture.save(file, "PNG"))


def main(_):
    workdir = FLAGS.workdir
    progress = sys.stderr.isatty() and jax.process_index() == 0
    _check_flags()
    if FLAGS.bpd:
        _print_bpd(workdir, cli.loading(), progress)
        return
    if FLAGS.bpd_steps:
        raise ValueError(f"--bpd_steps={FLAGS.bpd_steps} goes with --bpd; samples have --steps.")
    if not FLAGS.workdir and not FLAGS.reference:
        raise ValueError(f"--reference is missing: {references.FORMS}.")
    default = references.default_extractor(FLAGS.reference)
    extractor = extractors.load(FLAGS.extractor or default, FLAGS.weights, FLAGS.extractor_dtype)
    if FLAGS.make_reference:
        _make_reference(extractor, progress)
    elif FLAGS.samples:
        _print_row(*_evaluate_images(extractor, progress))
    else:
        _print_row(*_evaluate(workdir, extractor, progress))


def _kept():
    if FLAGS.bpd or not FLAGS.workdir:
        return "nothing is kept"
    return "the batches that are complete are kept"


def _check_flags():
    """Demands one thing to do, and no flag of another.   Raises: ValueError."""
    given = [name for name in ("workdir", "samples", "make_reference") if FLAGS[name].value]
    if len(given) != 1:
        raise ValueError("give one of --workdir, --samples and --make_reference.")
    of_samples = {*cli.SAMPLING, "step", "vae", "raw", "guide", "guide_step", "seed", "labels"}
    of_samples |= {"save_npz"}
    of_reference = {"reference", "extractor", "weights", "extractor_dtype"}
    of_images = {"image_size", "image_channels", "data_dir"}
    of_bpd = {"bpd", "bpd_steps"}
    others = {
        "workdir": of_images,
        "samples": of_samples | of_bpd,
        "make_reference": of_samples | of_bpd | {"num", "batch_size"},
    }[given[0]]
    if FLAGS.bpd and FLAGS.workdir:
        others = of_images | of_reference | {"labels", "save_npz"}
    if useless := sorted(f"--{name}" for name in others if FLAGS[name].present):
        mode = "bpd" if FLAGS.bpd and FLAGS.workdir else given[0]
        raise ValueError(f"--{mode} takes no {', '.join(useless)}.")


def _make_reference(extractor, progress):
    if jax.process_count() > 1:
        raise ValueError("--make_reference is done by one process: start the command alone.")
    out = FLAGS.make_reference
    cli.check_out(out, (".npz",), "--make_reference=")
    given = FLAGS.image_size, int(FLAGS.image_channels), str(FLAGS.data_dir or "")
    reference = references.load(FLAGS.reference, extractor, *given, progress)
    reference.save(out)
    print(f"{out}: {json.dumps({'extractor': reference.extractor, 'source': reference.source})}")


def _evaluate_images(extractor, progress):
    """(row, the directory that its picture is relative to)."""
    if jax.process_count() > 1:
        raise ValueError("--samples are measured by one process: start the command alone.")
    data_dir = str(FLAGS.data_dir or "")
    given = FLAGS.image_size, int(FLAGS.image_channels), data_dir
    found = images.open_images(FLAGS.samples, *given)
    size, _, channels = found.shape
    if FLAGS.image_size not in (None, size):
        name = files.printable(found.name)
        raise ValueError(f"--image_size={FLAGS.image_size}, but {name} has {size} pixels.")
    arguments = FLAGS.reference, extractor, size, channels, data_dir, progress
    reference = references.load(*arguments)
    row = evaluate_images(found, extractor, reference, FLAGS.num, FLAGS.batch_size, progress)
    return row, path_beside(found).parent


def _evaluate(workdir, extractor, progress):
    if FLAGS.save_npz:
        cli.check_out(FLAGS.save_npz, (".npz",), "--save_npz=")
    trained = runs.load(**cli.loading())
    reference = references.of_run(trained.config, FLAGS.reference, extractor, progress, workdir)
    row = evaluate(
        trained,
        workdir,
        extractor,
        reference,
        FLAGS.num or 1000,
        FLAGS.seed,
        FLAGS.labels,
        FLAGS.batch_size,
        FLAGS.save_npz,
        progress,
    )
    return row, workdir


def _print_row(row, directory):
    """The row, and for people its picture and measures."""
    print(json.dumps(row))
    print(f"picture: {directory / row['picture']}")
    names = list(row)[list(row).index("picture") + 1 :]
    training = {"img_per_s": "training img_per_s", "seconds": "training seconds"}
    known = {training.get(name, name): row[name] for name in names if row[name] is not None}
    print("  ".join(f"{name} {value:.6g}" for name, value in known.items()))


def _print_bpd(workdir, loading, progress):
    variance = loading["settings"].pop("variance", None)
    others = [f"--{name}" for name in loading["settings"] if name != "clip_x_0"]
    if loading["guide_workdir"] or loading["guide_step"] is not None:
        others.append("--guide or --guide_step")
    if others:
        raise ValueError(f"--bpd draws no samples, so it takes no {', '.join(others)}.")
    trained = runs.load(**loading)
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    if variance and (not chain or trained.model.learn_sigma):
        raise ValueError(f"--variance={variance} is of process ddpm without a learned variance.")
    trained.config.sample.variance = variance or trained.config.sample.variance
    row = bits.evaluate(
        trained,
        workdir,
        FLAGS.num or 1000,
        FLAGS.seed,
        FLAGS.bpd_steps,
        FLAGS.batch_size,
        progress,
    )
    name = next(name for name in row if name.startswith("bits_per_"))
    parts = (f"  {key.removeprefix(name + '_')} {row[key]:.4f}" for key in row if name + "_" in key)
    settings = "  ".join(f"{key} {value}" for key, value in row["likelihood"].items())
    print(f"{name} {row[name]:.4f}{''.join(parts)}  {settings}")


if __name__ == "__main__":
    cli.define_sampling(required=False)
    flags.DEFINE_integer("batch_size", None, "Images at a time, all devices.", lower_bound=1)
    cli.define_images("samples", "Images to measure: an .npz or a folder.")
    cli.define_images("reference", f"{references.FORMS}. Default: the training images.")
    cli.define_path("make_reference", None, "Write --reference's statistics to this .npz.")
    flags.DEFINE_enum(
        "extractor",
        None,
        extractors.NAMES,
        "By default the one of --reference, inception for images, pixels without --reference.",
    )
    cli.define_path("weights", None, "Workdir of its weights; runs/<extractor> by default.")
    flags.DEFINE_enum(
        "extractor_dtype", "float32", ["float32", "bfloat16"], "Published numbers are float32."
    )
    text = "Without --workdir: pixels that a folder or split is cropped to."
    flags.DEFINE_integer("image_size", None, text, 1, ranges.MOST_IMAGE_SIZE)
    flags.DEFINE_enum("image_channels", "3", ["1", "3"], "The same: 1 grey, 3 RGB.")
    cli.define_path("data_dir", None, "TFDS data directory; TFDS's standard one by default.")
    flags.DEFINE_enum(
        "labels", "random", ["random", "balanced"], "Of samples; published numbers: random."
    )
    text = "Samples, by default 1000, of --samples all; with --bpd held-out images."
    flags.DEFINE_integer("num", None, text, 2, ranges.MOST)
    cli.define_path("save_npz", None, "Write the samples, as the ADM evaluator reads them.")
    flags.DEFINE_bool("bpd", False, "Bits per dimension of held-out images instead.")
    flags.DEFINE_integer(
        "bpd_steps",
        None,
        f"By default all levels of process ddpm (a bound); else {bits.ODE_STEPS}, of an ODE.",
        lower_bound=1,
        upper_bound=10**6,
    )
    cli.run(main, kept=_kept)
