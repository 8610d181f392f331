"""Edits of images by a trained model, as a PNG: the input image, then the drawn images.

  python -m dit_jax.edit image-to-image --workdir W --image a.png --strength 0.6 --labels 3
  python -m dit_jax.edit inpaint --workdir W --image a.png --mask m.png --prompt "a red hat"
  python -m dit_jax.edit interpolate --workdir W --labels 3,8 --numbers 0,1 --num 9
  python -m dit_jax.edit invert --workdir W --image a.png --labels 3 [--labels_after 8]

image-to-image adds noise to an image, then takes the last share --strength of the sampling steps.
inpaint draws anew where the mask is white. With a model of latents the VAE decodes the whole image,
so pixels that the mask keeps may change a little. interpolate leads from one class or prompt to
another, and from the noise of one image to that of another. invert finds the noise from which DDIM
draws the image, and draws from this noise again. With --labels_after or --prompt_after the new
image has that class or prompt, and is guided as the run samples. Without them it is the same image,
and is not guided. --cfg_scale sets the guidance in both cases. The inversion is never guided.
"""

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, conditions
from dit_jax.config import parsers, ranges, sizes
from dit_jax.diffusion import edits
from dit_jax.errors import UserError
from dit_jax.sampling import editing, pictures, runs, sampling_flags
from dit_jax.system import files

FLAGS = flags.FLAGS

# Flag for the condition of the input image -> flag of invert for the condition of the new image.
AFTER = {kind.flag: f"{kind.flag}_after" for kind in conditions.KINDS.values()}
# Task -> its flags, without the flags of all tasks.
TASKS = {
    "image-to-image": ("image", "strength", "num"),
    "inpaint": ("image", "mask", "strength", "num"),
    "interpolate": ("numbers", "num"),
    "invert": ("image", *AFTER.values()),
}


def main(words):
    if not words or words[0] not in TASKS:
        task = " ".join(words) or "nothing"
        raise UserError(f"the task must be one of {', '.join(TASKS)}, not {task}.")
    task, out = words[0], FLAGS.out
    cli.check_out(out, (".png",))
    # A flag of another task would silently change nothing.
    other_flags = {name for names in TASKS.values() for name in names} - {*TASKS[task]}
    if unused := sorted(f"--{name}" for name in other_flags if FLAGS[name].present):
        raise UserError(f"{task} takes no {', '.join(unused)}.")
    for name in ("image", "mask"):
        if name in TASKS[task] and not FLAGS[name].value:
            raise UserError(f"{task} needs --{name}.")
    load_arguments = sampling_flags.get_load_arguments()
    # The inversion is not guided, so guided drawing would not return the same image.
    if task == "invert" and not any(FLAGS[name].value for name in AFTER.values()):
        load_arguments["settings"].setdefault("cfg_scale", 1.0)
    trained = runs.load(**load_arguments)
    # The picture is one row: the input image, if the task has one, then `num` drawn images.
    shape = sizes.image_shape(trained.config.data)
    pictures.check_grid(FLAGS.num + 1, shape, FLAGS.num + 1)
    images, x_0 = [], None
    if "image" in TASKS[task]:
        images = [editing.read_image(FLAGS.image, trained.config)]
        x_0 = editing.encode(trained, images[0])
    request = _make_request(task, trained, x_0)
    images.append(editing.draw(trained, request, FLAGS.seed, FLAGS.strength))
    images = np.concatenate(images)
    # Every process has all images, but only one writes them.
    if jax.process_index() == 0:
        picture = Image.fromarray(pictures.image_grid(images, len(images)))
        files.replace(out, lambda file: picture.save(file, "PNG"))
    print(f"{task} by step {trained.step}: {out}")


def _make_request(task, trained, x_0):
    """Makes the `editing.EditRequest` of a task for the input image x_0, if the task has one."""
    condition_flags = sampling_flags.get_conditions()
    if task == "interpolate":
        ends = editing.parse_ends(trained, FLAGS.num, **condition_flags)
        return editing.make_interpolation(*ends, FLAGS.numbers)
    if task == "invert":
        after_flags = {name: FLAGS[flag].value for name, flag in AFTER.items()}
        before, after = editing.parse_before_and_after(trained, after_flags, **condition_flags)
        edit = edits.FromNoise(editing.invert(trained, before, x_0))
        return editing.EditRequest(after, edit)
    request = trained.make_request(FLAGS.num, FLAGS.seed, **condition_flags)
    if task == "image-to-image":
        return editing.EditRequest(request, edits.ImageToImage(x_0))
    mask = editing.read_mask(FLAGS.mask, FLAGS.image, trained.config)
    return editing.EditRequest(request, edits.Inpaint(x_0, mask))


if __name__ == "__main__":
    sampling_flags.define_sampling()
    sampling_flags.define_conditions()
    cli.define_path("image", None, "Input image file, cropped like the model's data.")
    cli.define_path("mask", None, "inpaint: image file of the same size; white is drawn anew.")
    flags.DEFINE_float(
        "strength", 1.0, "Share of the sampling steps that are taken, in (0, 1].", 0, 1
    )
    numbers_help = "interpolate: indices of the two images whose noise is interpolated."
    flags.DEFINE(parsers.ListParser(int, 2), "numbers", "0,0", numbers_help)
    for name, flag in AFTER.items():
        after_help = f"invert: like --{name}, for the image that is drawn again."
        flags.DEFINE(conditions.FLAGS[name].parser, flag, None, after_help)
    num_help = "Number of drawn images; invert draws one."
    flags.DEFINE_integer("num", 4, num_help, 1, ranges.MAX_PICTURE_IMAGES)
    cli.define_path("out", "edited.png", "PNG: the input image and the drawn images in a row.")
    cli.run(main, "TASK")
