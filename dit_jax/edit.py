"""Edits of images by a trained model, as a PNG: the given image first, then the drawn ones.

  python -m dit_jax.edit image-to-image --workdir W --image a.png --strength 0.6 --labels 3
  python -m dit_jax.edit inpaint --workdir W --image a.png --mask m.png --prompt "a red hat"
  python -m dit_jax.edit interpolate --workdir W --labels 3,8 --numbers 0,1 --num 9
  python -m dit_jax.edit invert --workdir W --image a.png --labels 3 [--labels_after 8]

image-to-image adds noise to an image and draws from there: it takes the last share `strength` of
the sampling steps. inpaint draws anew where the mask is white. interpolate goes from one class or
prompt to another, and from one noise to another. invert finds the noise from which DDIM draws the
image, and draws from this noise again. With --labels_after or --prompt_after the new image is of
that class or prompt, guided as the run samples. Without them it is the same image, and neither
the inversion nor the drawing is guided. --cfg_scale sets the guidance in both cases. With a model
of latents the VAE decodes the whole image, so pixels that the mask keeps may change a little.
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

# The flags with which invert draws the image again, by the flag of `sample` that they stand for.
AFTER = {kind.flag: f"{kind.flag}_after" for kind in conditions.KINDS.values()}
# The flags of each task that not all tasks take.
TASKS = {
    "image-to-image": ("image", "strength", "num"),
    "inpaint": ("image", "mask", "strength", "num"),
    "interpolate": ("numbers", "num"),
    "invert": ("image", *AFTER.values()),
}


def main(words):
    if not words or words[0] not in TASKS:
        raise UserError(f"say which of {', '.join(TASKS)}, not {' '.join(words) or 'nothing'}.")
    task, out = words[0], FLAGS.out
    cli.check_out(out, (".png",))
    # A flag of another task would silently change nothing.
    others = {name for names in TASKS.values() for name in names} - {*TASKS[task]}
    if useless := sorted(f"--{name}" for name in others if FLAGS[name].present):
        raise UserError(f"{task} takes no {', '.join(useless)}.")
    for name in ("image", "mask"):
        if name in TASKS[task] and not FLAGS[name].value:
            raise UserError(f"{task} needs --{name}.")
    loading = sampling_flags.get_load_arguments()
    # Drawing must not be guided if it is to return the image, because the inversion is not.
    if task == "invert" and not any(FLAGS[name].value for name in AFTER.values()):
        loading["settings"].setdefault("cfg_scale", 1.0)
    trained = runs.load(**loading)
    # The picture is one row: the given image, if there is one, then `num` drawn ones.
    shape = sizes.image_shape(trained.config.data)
    pictures.check_grid(FLAGS.num + 1, shape, FLAGS.num + 1)
    given = [editing.read_image(FLAGS.image, trained.config)] if "image" in TASKS[task] else []
    request = _make_request(task, trained, *(editing.encode(trained, image) for image in given))
    images = np.concatenate([*given, editing.draw(trained, request, FLAGS.seed, FLAGS.strength)])
    if jax.process_index() == 0:  # every process has all images, one writes them
        picture = Image.fromarray(pictures.image_grid(images, len(images)))
        files.replace(out, lambda file: picture.save(file, "PNG"))
    print(f"{task} by step {trained.step}: {out}")


def _make_request(task, trained, x_0=None):
    """Returns the `editing.EditRequest` of a task, for an image with this x_0."""
    condition_flags = sampling_flags.get_conditions()
    if task == "interpolate":
        ends = editing.parse_ends(trained, FLAGS.num, **condition_flags)
        return editing.interpolate(*ends, FLAGS.numbers)
    if task == "invert":
        after_flags = {name: FLAGS[flag].value for name, flag in AFTER.items()}
        before, after = editing.parse_before_and_after(trained, after_flags, **condition_flags)
        edit = edits.FromNoise(editing.invert(trained, before, x_0))
        return editing.EditRequest(after, edit)
    request = trained.request(FLAGS.num, FLAGS.seed, **condition_flags)
    if task == "image-to-image":
        return editing.EditRequest(request, edits.ImageToImage(x_0))
    mask = editing.read_mask(FLAGS.mask, FLAGS.image, trained.config)
    return editing.EditRequest(request, edits.Inpaint(x_0, mask))


if __name__ == "__main__":
    sampling_flags.define_sampling()
    sampling_flags.define_conditions()
    cli.define_path("image", None, "Image file, cropped as the model's data are.")
    cli.define_path("mask", None, "inpaint: image of the same size, white where it draws anew.")
    flags.DEFINE_float("strength", 1.0, "Share of the steps, the last ones, in (0, 1].", 0, 1)
    text = "interpolate: numbers of the two images whose noise is taken."
    flags.DEFINE(parsers.ListParser(int, 2), "numbers", "0,0", text)
    for name, flag in AFTER.items():
        flags.DEFINE_string(flag, "", f"invert: like --{name}, for the image that is drawn again.")
    most = ranges.MAX_PICTURE_IMAGES
    flags.DEFINE_integer("num", 4, "Number of images; invert draws one.", 1, most)
    cli.define_path("out", "edited.png", "PNG: what is given, then what is drawn, in a row.")
    cli.run(main, "TASK")
