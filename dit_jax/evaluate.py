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
from dit_jax.diffusion import samplers
from dit_jax.errors import UserError
from dit_jax.evaluation import bits_per_dim, extractors, image_sets, references, rows, samples
from dit_jax.sampling import runs, sampling_flags
from dit_jax.system import files

FLAGS = flags.FLAGS


def main(_):
    workdir = FLAGS.workdir
    progress = sys.stderr.isatty() and jax.process_index() == 0
    _check_flags()
    # Bits per dimension need no extractor and no reference.
    if FLAGS.bpd:
        _print_bpd(workdir, progress)
        return
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
    """Returns what remains of a stopped command, in words for a message."""
    if FLAGS.bpd or not FLAGS.workdir:
        return "nothing is kept"
    return "the batches that are complete are kept"


def _check_flags():
    """Raises ValueError unless the flags request one thing, and none belongs to another."""
    given = [name for name in ("workdir", "samples", "make_reference") if FLAGS[name].value]
    if len(given) != 1:
        raise UserError("give one of --workdir, --samples and --make_reference.")
    job = "bpd" if FLAGS.bpd and FLAGS.workdir else given[0]
    guide_flags, image_flags = {"guide", "guide_step"}, {"image_size", "image_channels", "data_dir"}
    sample_flags = {*samplers.SETTINGS, *guide_flags, "labels", "save_npz"}
    run_flags = sample_flags | {"step", "vae", "raw", "seed", "bpd", "bpd_steps"}
    reference_flags = {"reference", "extractor", "weights", "extractor_dtype"}
    # A flag that a job does not use would silently change nothing.
    unused = {
        "workdir": image_flags,
        # Of the sampling settings the bits depend on variance and clip_x_0 alone.
        "bpd": image_flags | reference_flags | sample_flags - {"variance", "clip_x_0"},
        "samples": run_flags,
        "make_reference": run_flags | {"num", "batch_size"},
    }[job]
    if useless := sorted(f"--{name}" for name in unused if FLAGS[name].present):
        raise UserError(f"--{job} takes no {', '.join(useless)}.")
    if FLAGS.bpd_steps and not FLAGS.bpd:
        raise UserError(f"--bpd_steps={FLAGS.bpd_steps} goes with --bpd; samples have --steps.")
    if not FLAGS.workdir and not FLAGS.reference:
        raise UserError(f"--reference is missing: {references.FORMS}.")
    if not FLAGS.workdir and jax.process_count() > 1:
        raise UserError(f"--{job} is done by one process: start the command alone.")


def _make_reference(extractor, progress):
    """Writes the .npz of the statistics of --reference's images."""
    out = FLAGS.make_reference
    cli.check_out(out, (".npz",), "--make_reference=")
    size, channels = FLAGS.image_size, int(FLAGS.image_channels)
    arguments = FLAGS.reference, extractor, size, channels, str(FLAGS.data_dir or ""), progress
    reference = references.load(*arguments)
    reference.save(out)
    print(f"{out}: {json.dumps({'extractor': reference.extractor, 'source': reference.source})}")


def _evaluate_images(extractor, progress):
    """Returns (row, the directory that its picture's path is relative to) for --samples."""
    data_dir = str(FLAGS.data_dir or "")
    arguments = FLAGS.samples, FLAGS.image_size, int(FLAGS.image_channels), data_dir
    images = image_sets.open_images(*arguments)
    # The reference is made at the size of the images.
    *size, channels = images.shape
    image_size = sizes.simplify(size)
    if FLAGS.image_size not in (None, image_size):
        raise UserError(
            f"--image_size={FLAGS.image_size}, but {files.printable(images.name)} has images of "
            f"{sizes.show(size)} pixels. Leave the flag out."
        )
    reference = references.load(
        FLAGS.reference, extractor, image_size, channels, data_dir, progress
    )
    options = FLAGS.num, FLAGS.batch_size, progress
    row = samples.evaluate_images(images, extractor, reference, *options)
    return row, samples.path_beside(images).parent


def _evaluate(workdir, extractor, progress):
    """Returns (row, the directory that its picture's path is relative to) for a run's samples."""
    if FLAGS.save_npz:  # checked before anything is drawn
        cli.check_out(FLAGS.save_npz, (".npz",), "--save_npz=")
    trained = runs.load(**sampling_flags.get_load_arguments())
    arguments = trained.config, FLAGS.reference, extractor, progress, workdir
    reference = references.load_for_run(*arguments)
    options = FLAGS.num or 1000, FLAGS.seed, FLAGS.labels, FLAGS.batch_size, FLAGS.save_npz
    row = samples.evaluate(trained, workdir, extractor, reference, *options, progress)
    return row, workdir


def _print_row(row, directory):
    """Prints the row as JSON, then its picture and its measures for people."""
    print(json.dumps(row))
    print(f"picture: {directory / row['picture']}")
    # Speeds are those of training, not of this command.
    speeds = {f"training {name}": row.get(name) for name in ("img_per_s", "seconds")}
    values = {k: v for k, v in (rows.get_measures(row) | speeds).items() if v is not None}
    print("  ".join(f"{name} {value:.6g}" for name, value in values.items()))


def _print_bpd(workdir, progress):
    """Prints the bits per dimension of held-out images."""
    loading = sampling_flags.get_load_arguments()
    variance = loading["settings"].pop("variance", None)
    trained = runs.load(**loading)
    # A chain's bound needs a variance: the model's, if it is learned.
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    if variance and (not chain or trained.model.learn_sigma):
        raise UserError(f"--variance={variance} is of process ddpm without a learned variance.")
    trained.config.sample.variance = variance or trained.config.sample.variance
    options = FLAGS.num or 1000, FLAGS.seed, FLAGS.bpd_steps, FLAGS.batch_size, progress
    row = bits_per_dim.evaluate(trained, workdir, *options)
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
