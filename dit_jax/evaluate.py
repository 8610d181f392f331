"""Measures samples against real images: a JSON row in DIR/evaluations.jsonl, a picture beside it.

  python -m dit_jax.evaluate --workdir runs/dit --reference imagenet256.npz --num 50000 \\
      --sampler ddpm --steps 250 --cfg_scale 1.5
  python -m dit_jax.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  python -m dit_jax.evaluate --make_reference imagenet256.npz --reference imagenet2012:train \\
      --image_size 256
  python -m dit_jax.evaluate --workdir runs/dit --bpd --num 100

A reference is an .npz of the ADM evaluator or of --make_reference, a folder of images, or a TFDS
split. The default is the run's training images. The devices turn images into features, and images
leave them only for the picture and for --save_npz. A killed command continues when it is run again.
--bpd measures the bits per dimension of held-out images under the model instead. x_0 is clipped as
in the run's samples; --clip_x_0 changes that.
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
    # Bits per dimension need neither extractor nor reference.
    if FLAGS.bpd:
        _print_bpd(workdir, progress)
        return
    # Samples and reference must have features of the same extractor.
    default = references.default_extractor(FLAGS.reference)
    extractor = extractors.load(FLAGS.extractor or default, FLAGS.weights, FLAGS.extractor_dtype)
    if FLAGS.make_reference:
        _make_reference(extractor, progress)
    elif FLAGS.samples:
        _print_row(*_evaluate_images(extractor, progress))
    else:
        _print_row(*_evaluate_run(workdir, extractor, progress))


def _describe_kept():
    """Returns what a stopped command keeps, for a message."""
    if FLAGS.bpd or not FLAGS.workdir:
        return "nothing is kept"
    return "the batches that are complete are kept"


def _check_flags():
    """Raises ValueError unless the flags request one job, and all of them belong to it."""
    jobs = [name for name in ("workdir", "samples", "make_reference") if FLAGS[name].value]
    if len(jobs) != 1:
        raise UserError("give one of --workdir, --samples and --make_reference.")
    job = "bpd" if FLAGS.bpd and FLAGS.workdir else jobs[0]
    guide_flags, image_flags = {"guide", "guide_step"}, {"image_size", "image_channels", "data_dir"}
    sample_flags = {*samplers.SETTINGS, *guide_flags, "labels", "save_npz"}
    run_flags = sample_flags | {"step", "vae", "raw", "seed", "bpd", "bpd_steps"}
    reference_flags = {"reference", "extractor", "weights", "extractor_dtype"}
    # A flag of another job would have no effect.
    unused_flags = {
        "workdir": image_flags,
        # The only sampling settings of bits per dimension are variance and clip_x_0.
        "bpd": image_flags | reference_flags | sample_flags - {"variance", "clip_x_0"},
        "samples": run_flags,
        "make_reference": run_flags | {"num", "batch_size"},
    }[job]
    if refused := sorted(f"--{name}" for name in unused_flags if FLAGS[name].present):
        raise UserError(f"--{job} takes no {', '.join(refused)}.")
    if FLAGS.bpd_steps and not FLAGS.bpd:
        raise UserError(f"--bpd_steps={FLAGS.bpd_steps} goes with --bpd; samples have --steps.")
    if not FLAGS.workdir and not FLAGS.reference:
        raise UserError(f"--reference is missing. Give {references.FORMS}.")
    if not FLAGS.workdir and jax.process_count() > 1:
        raise UserError(
            f"--{job} runs in one process, not in {jax.process_count()}. Start only one."
        )


def _make_reference(extractor, progress):
    """Writes the reference of --reference's images to an .npz."""
    out, data_dir = FLAGS.make_reference, str(FLAGS.data_dir or "")
    cli.check_out(out, (".npz",), "--make_reference=")
    image_options = FLAGS.image_size, int(FLAGS.image_channels), data_dir
    reference = references.load(FLAGS.reference, extractor, *image_options, progress)
    reference.save(out)
    print(f"{out}: {json.dumps({'extractor': reference.extractor, 'source': reference.source})}")


def _evaluate_images(extractor, progress):
    """Evaluates --samples; returns (row, the directory of the row's file)."""
    data_dir = str(FLAGS.data_dir or "")
    image_options = FLAGS.image_size, int(FLAGS.image_channels), data_dir
    images = image_sets.open_images(FLAGS.samples, *image_options)
    # The reference is made at the size of the images.
    *size, channels = images.shape
    image_size = sizes.simplify(size)
    if FLAGS.image_size not in (None, image_size):
        raise UserError(
            f"--image_size={FLAGS.image_size}, but {files.printable(images.name)} has images of "
            f"{sizes.show(size)} pixels. Leave the flag out."
        )
    image_options = image_size, channels, data_dir
    reference = references.load(FLAGS.reference, extractor, *image_options, progress)
    options = FLAGS.num, FLAGS.batch_size, progress
    row = samples.evaluate_images(images, extractor, reference, *options)
    return row, samples.path_beside(images).parent


def _evaluate_run(workdir, extractor, progress):
    """Evaluates a run's samples; returns (row, the directory of the row's file)."""
    if FLAGS.save_npz:  # checked before anything is drawn
        cli.check_out(FLAGS.save_npz, (".npz",), "--save_npz=")
    trained = runs.load(**sampling_flags.get_load_arguments())
    arguments = trained.config, FLAGS.reference, extractor, progress, workdir
    reference = references.load_for_run(*arguments)
    options = FLAGS.num or 1000, FLAGS.seed, FLAGS.labels, FLAGS.batch_size, FLAGS.save_npz
    row = samples.evaluate(trained, workdir, extractor, reference, *options, progress)
    return row, workdir


def _print_row(row, directory):
    """Prints the row as JSON, then the path of its picture, and its measures for people."""
    print(json.dumps(row))
    print(f"picture: {directory / row['picture']}")
    # The speeds in a row are of training, not of this command.
    speeds = {f"training {name}": row.get(name) for name in ("img_per_s", "seconds")}
    values = rows.get_measures(row) | speeds
    shown = (f"{name} {value:.6g}" for name, value in values.items() if value is not None)
    print("  ".join(shown))


def _print_bpd(workdir, progress):
    """Prints the bits per dimension of held-out images."""
    load_arguments = sampling_flags.get_load_arguments()
    variance = load_arguments["settings"].pop("variance", None)
    trained = runs.load(**load_arguments)
    # The bound of a discrete process needs a variance: the model's, if it is learned.
    is_discrete = isinstance(trained.process, diffusion.DiscreteProcess)
    if variance and (not is_discrete or trained.model.learn_sigma):
        raise UserError(f"--variance={variance} needs process ddpm without a learned variance.")
    trained.config.sample.variance = variance or trained.config.sample.variance
    options = FLAGS.num or 1000, FLAGS.seed, FLAGS.bpd_steps, FLAGS.batch_size, progress
    row = bits_per_dim.evaluate(trained, workdir, *options)
    # The measure is bits_per_dim of pixels, or bits_per_latent_dim; its terms have longer names.
    name = next(name for name in row if name.startswith("bits_per_"))
    terms = {key.removeprefix(f"{name}_"): row[key] for key in row if f"{name}_" in key}
    shown = [f"{key} {value:.4f}" for key, value in ({name: row[name]} | terms).items()]
    shown += [f"{key} {value}" for key, value in row["likelihood"].items()]
    print("  ".join(shown))


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
        "Default: the reference's own, inception for images, pixels without --reference.",
    )
    cli.define_path("weights", None, "Workdir of its weights; runs/<extractor> by default.")
    flags.DEFINE_enum(
        "extractor_dtype", "float32", ["float32", "bfloat16"], "Published numbers are float32."
    )
    size_help = "Without --workdir: size to which a folder or split is cropped, a number or HxW."
    flags.DEFINE(parsers.SizeParser(), "image_size", None, size_help)
    flags.DEFINE_enum("image_channels", "3", ["1", "3"], "Without --workdir: 1 grey, 3 RGB.")
    cli.define_path("data_dir", None, "TFDS data directory; TFDS's standard one by default.")
    flags.DEFINE_enum(
        "labels", "random", ["random", "balanced"], "Of samples; published numbers: random."
    )
    num_help = "Samples (default 1000, or all of --samples), or held-out images with --bpd."
    flags.DEFINE_integer("num", None, num_help, 2, ranges.MAX_COUNT)
    cli.define_path("save_npz", None, "Write the samples, as the ADM evaluator reads them.")
    flags.DEFINE_bool("bpd", False, "Bits per dimension of held-out images instead.")
    flags.DEFINE_integer(
        "bpd_steps",
        None,
        "Steps of --bpd. Default: all levels of process ddpm (a bound), or "
        f"{bits_per_dim.ODE_STEPS} of an ODE.",
        lower_bound=1,
        upper_bound=10**6,
    )
    cli.run(main, kept=_describe_kept)
