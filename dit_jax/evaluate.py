"""Measures samples against real images: a JSON row in DIR/evaluations.jsonl, a picture beside it.

  python -m dit_jax.evaluate --workdir runs/dit --reference imagenet256.npz --num 50000 \\
      --sampler ddpm --steps 250 --cfg_scale 1.5
  python -m dit_jax.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  python -m dit_jax.evaluate --make_reference imagenet256.npz --reference imagenet2012:train \\
      --image_size 256
  python -m dit_jax.evaluate --workdir runs/dit --bpd --num 100

A reference is the ADM evaluator's .npz, one that --make_reference wrote, a folder of images or a
TFDS split; by default the run's training images. The devices turn images into features; images
leave the devices only for the picture and for --save_npz. A command that was killed continues when
it is run again. --bpd measures held-out images instead: bits per dimension under the model. x_0 is
then clipped as when the run samples, or as --clip_x_0 says.
"""

import json
import sys

import jax
from absl import flags

from dit_jax import cli, diffusion
from dit_jax.config import parsers, ranges, sizes
from dit_jax.diffusion import sampler_settings
from dit_jax.errors import UserError
from dit_jax.evaluation import bits_per_dim, extractors, image_sets, references, samples
from dit_jax.sampling import runs, sampling_flags
from dit_jax.system import files

FLAGS = flags.FLAGS


def main(_):
    workdir = FLAGS.workdir
    progress = sys.stderr.isatty() and jax.process_index() == 0
    _check_flags()
    # Bits per dimension need no extractor and no reference.
    if FLAGS.bpd:
        _print_bpd(workdir, sampling_flags.get_load_arguments(), progress)
        return
    if FLAGS.bpd_steps:
        raise UserError(f"--bpd_steps={FLAGS.bpd_steps} goes with --bpd; samples have --steps.")
    if not FLAGS.workdir and not FLAGS.reference:
        raise UserError(f"--reference is missing: {references.FORMS}.")
    # Features of samples and reference must come from the same extractor.
    default = references.default_extractor(FLAGS.reference)
    extractor = extractors.load(FLAGS.extractor or default, FLAGS.weights, FLAGS.extractor_dtype)
    if FLAGS.make_reference:
        _make_reference(extractor, progress)
    elif FLAGS.samples:
        _print_row(*_evaluate_images(extractor, progress))
    else:
        _print_row(*_evaluate(workdir, extractor, progress))


def _kept():
    """Returns what is kept of a stopped command, in words for a message."""
    if FLAGS.bpd or not FLAGS.workdir:
        return "nothing is kept"
    return "the batches that are complete are kept"


def _check_flags():
    """Raises ValueError unless the flags request one thing, and none belongs to another."""
    given = [name for name in ("workdir", "samples", "make_reference") if FLAGS[name].value]
    if len(given) != 1:
        raise UserError("give one of --workdir, --samples and --make_reference.")
    sample_flags = {
        *sampler_settings.SETTINGS,
        "step",
        "vae",
        "raw",
        "guide",
        "guide_step",
        "seed",
        "labels",
    }
    sample_flags |= {"save_npz"}
    reference_flags = {"reference", "extractor", "weights", "extractor_dtype"}
    image_flags = {"image_size", "image_channels", "data_dir"}
    bpd_flags = {"bpd", "bpd_steps"}
    # A flag that the requested thing does not use would silently change nothing.
    others = {
        "workdir": image_flags,
        "samples": sample_flags | bpd_flags,
        "make_reference": sample_flags | bpd_flags | {"num", "batch_size"},
    }[given[0]]
    if FLAGS.bpd and FLAGS.workdir:
        others = image_flags | reference_flags | {"labels", "save_npz"}
    if useless := sorted(f"--{name}" for name in others if FLAGS[name].present):
        mode = "bpd" if FLAGS.bpd and FLAGS.workdir else given[0]
        raise UserError(f"--{mode} takes no {', '.join(useless)}.")


def _make_reference(extractor, progress):
    """Writes the .npz of the statistics of --reference's images."""
    if jax.process_count() > 1:
        raise UserError("--make_reference is done by one process: start the command alone.")
    out = FLAGS.make_reference
    cli.check_out(out, (".npz",), "--make_reference=")
    given = FLAGS.image_size, int(FLAGS.image_channels), str(FLAGS.data_dir or "")
    reference = references.load(FLAGS.reference, extractor, *given, progress)
    reference.save(out)
    print(f"{out}: {json.dumps({'extractor': reference.extractor, 'source': reference.source})}")


def _evaluate_images(extractor, progress):
    """Returns (row, the directory that its picture's path is relative to) for --samples."""
    if jax.process_count() > 1:
        raise UserError("--samples are measured by one process: start the command alone.")
    data_dir = str(FLAGS.data_dir or "")
    given = FLAGS.image_size, int(FLAGS.image_channels), data_dir
    images = image_sets.open_images(FLAGS.samples, *given)
    # The reference is made at the size of the images.
    height, width, channels = images.shape
    size = sizes.simplify((height, width))
    if FLAGS.image_size not in (None, size):
        name = files.printable(images.name)
        raise UserError(
            f"--image_size={FLAGS.image_size}, but {name} has images of {height} x {width} pixels."
        )
    arguments = FLAGS.reference, extractor, size, channels, data_dir, progress
    reference = references.load(*arguments)
    row = samples.evaluate_images(
        images, extractor, reference, FLAGS.num, FLAGS.batch_size, progress
    )
    return row, samples.path_beside(images).parent


def _evaluate(workdir, extractor, progress):
    """Returns (row, the directory that its picture's path is relative to) for a run's samples."""
    if FLAGS.save_npz:  # checked before anything is drawn
        cli.check_out(FLAGS.save_npz, (".npz",), "--save_npz=")
    trained = runs.load(**sampling_flags.get_load_arguments())
    reference = references.load_for_run(
        trained.config, FLAGS.reference, extractor, progress, workdir
    )
    row = samples.evaluate(
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
    """Prints the row as JSON, then its picture and its measures for people."""
    print(json.dumps(row))
    print(f"picture: {directory / row['picture']}")
    # The measures follow the picture in a row. Speeds are those of training, not of this command.
    names = list(row)[list(row).index("picture") + 1 :]
    training = {"img_per_s": "training img_per_s", "seconds": "training seconds"}
    known = {training.get(name, name): row[name] for name in names if row[name] is not None}
    print("  ".join(f"{name} {value:.6g}" for name, value in known.items()))


def _print_bpd(workdir, loading, progress):
    """Prints the bits per dimension of held-out images."""
    # Of the sampling settings the bits depend on variance and clip_x_0 alone.
    variance = loading["settings"].pop("variance", None)
    others = [f"--{name}" for name in loading["settings"] if name != "clip_x_0"]
    if loading["guide_workdir"] or loading["guide_step"] is not None:
        others.append("--guide or --guide_step")
    if others:
        raise UserError(f"--bpd draws no samples, so it takes no {', '.join(others)}.")
    trained = runs.load(**loading)
    # A chain's bound needs a variance: the model's, if it is learned.
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    if variance and (not chain or trained.model.learn_sigma):
        raise UserError(f"--variance={variance} is of process ddpm without a learned variance.")
    trained.config.sample.variance = variance or trained.config.sample.variance
    row = bits_per_dim.evaluate(
        trained,
        workdir,
        FLAGS.num or 1000,
        FLAGS.seed,
        FLAGS.bpd_steps,
        FLAGS.batch_size,
        progress,
    )
    # The bits are named by the model: bits_per_dim of pixels, bits_per_latent_dim of latents.
    name = next(name for name in row if name.startswith("bits_per_"))
    parts = (f"  {key.removeprefix(name + '_')} {row[key]:.4f}" for key in row if name + "_" in key)
    settings = "  ".join(f"{key} {value}" for key, value in row["likelihood"].items())
    print(f"{name} {row[name]:.4f}{''.join(parts)}  {settings}")


if __name__ == "__main__":
    sampling_flags.define_sampling(required=False)
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
    text = "Without --workdir: pixels that a folder or split is cropped to, a number or HxW."
    flags.DEFINE(parsers.SizeParser(), "image_size", None, text)
    flags.DEFINE_enum("image_channels", "3", ["1", "3"], "The same: 1 grey, 3 RGB.")
    cli.define_path("data_dir", None, "TFDS data directory; TFDS's standard one by default.")
    flags.DEFINE_enum(
        "labels", "random", ["random", "balanced"], "Of samples; published numbers: random."
    )
    text = "Samples, by default 1000, of --samples all; with --bpd held-out images."
    flags.DEFINE_integer("num", None, text, 2, ranges.MAX_COUNT)
    cli.define_path("save_npz", None, "Write the samples, as the ADM evaluator reads them.")
    flags.DEFINE_bool("bpd", False, "Bits per dimension of held-out images instead.")
    flags.DEFINE_integer(
        "bpd_steps",
        None,
        "By default all levels of process ddpm (a bound); else "
        f"{bits_per_dim.ODE_STEPS}, of an ODE.",
        lower_bound=1,
        upper_bound=10**6,
    )
    cli.run(main, kept=_kept)
