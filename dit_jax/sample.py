"""Samples of a trained model as a PNG grid or an .npz.

  python -m dit_jax.sample --workdir runs/digits --labels 0,3,9 --num 30 --out grid.png
  python -m dit_jax.sample --workdir runs/sd15 --prompt "an astronaut riding a horse" \\
      --sampler dpmpp2m --steps 20 --cfg_scale 7.5 --out x.png
"""

import sys

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, conditions
from dit_jax.config import ranges, sizes
from dit_jax.errors import UserError, UserFileError
from dit_jax.sampling import pictures, runs, sampling_flags
from dit_jax.system import files

FLAGS = flags.FLAGS
DEFAULT_NUM = 16  # images, if the flags list no conditions


def _write(out, images, labels):
    """Writes the images as a PNG grid, or as an .npz with the arrays of `labels`."""

    def write(file):
        if out.suffix == ".npz":
            np.savez(file, arr_0=images, **labels)
        else:
            columns = FLAGS.columns or pictures.grid_columns(len(images))
            Image.fromarray(pictures.image_grid(images, columns)).save(file, "PNG")

    try:
        files.replace(out, write)  # whole or not at all
    except OSError as error:
        raise UserFileError(f"cannot write --out={out}: {error}") from error


def main(_):
    # Flags are checked before the model is loaded, which takes long.
    out = FLAGS.out
    cli.check_out(out, (".png", ".npz"))
    if FLAGS.columns and out.suffix == ".npz":
        raise UserError(f"--columns={FLAGS.columns} needs --out to be a .png, not {out}.")
    condition_flags = sampling_flags.get_conditions()
    num = FLAGS.num or conditions.count_requested(condition_flags) or DEFAULT_NUM
    if FLAGS.columns > num:
        raise UserError(f"--columns={FLAGS.columns} must be at most {num}, the number of images.")
    trained = runs.load(**sampling_flags.get_load_arguments())
    if out.suffix == ".png":
        pictures.check_grid(num, sizes.image_shape(trained.config.data), FLAGS.columns)
    request = trained.make_request(num, FLAGS.seed, **condition_flags)
    progress = sys.stderr.isatty()
    images = trained.generate(request, FLAGS.seed, batch_size=FLAGS.batch_size, progress=progress)
    # Every process has all images, but only one writes them.
    if jax.process_index() == 0:
        labels = {"label": request.cond} if trained.condition.has_classes else {}
        _write(out, images, labels)
    print(f"{len(images)} samples of step {trained.step}: {out}")


if __name__ == "__main__":
    sampling_flags.define_sampling()
    flags.DEFINE_integer("batch_size", None, "Images at a time, all devices.", lower_bound=1)
    sampling_flags.define_conditions()
    repeated = " or ".join(f"--{name}" for name, flag in conditions.FLAGS.items() if flag.repeated)
    num_help = f"Number of images. By default one for each {repeated}, or {DEFAULT_NUM}."
    flags.DEFINE_integer("num", None, num_help, 1, ranges.MAX_COUNT)
    cli.define_path("out", "samples.png", "A .png grid, or an .npz with arr_0 and label.")
    flags.DEFINE_integer(
        "columns", 0, "Columns of the grid; 0 for a grid that is about square.", lower_bound=0
    )
    cli.run(main)
