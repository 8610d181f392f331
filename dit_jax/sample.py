"""Samples of a trained model as a PNG grid or an .npz.

  python -m dit_jax.sample --workdir runs/digits --labels 0,3,9 --num 30 --out grid.png
  python -m dit_jax.sample --workdir runs/sd15 --prompt "an astronaut riding a horse" \\
      --sampler dpmpp2m --steps 20 --cfg_scale 7.5 --num 1 --out x.png
"""

import os
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from PIL import Image

from dit_jax import cli, conditions, generate

FLAGS = flags.FLAGS


def parse_labels(text: str, num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """[num] int32 labels: the comma-separated ones, repeated in blocks of equal size.

    An empty text means all classes; 'random', each uniformly drawn by the seed.
    Raises: ValueError for a label that is no class.
    """
    if text == "random":
        return conditions.draw_labels("random", num, num_classes, seed)
    try:
        labels = [int(label) for label in text.split(",")] if text else list(range(num_classes))
    except ValueError:
        raise ValueError(
            f"--labels={text!r} must be numbers with commas, such as 0,3,9, or random."
        ) from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--labels: {wrong} outside 0..{num_classes - 1}, the model's classes.")
    if num < 1 or (text and num < len(labels)):
        raise ValueError(f"--num={num} must be at least {len(labels) if text else 1}: {labels=}.")
    return np.array(labels, np.int32)[np.arange(num) * len(labels) // num]


def told(config) -> conditions.Conditions:
    """What the flags ask for: labels, or prompts in blocks of equal size.

    Raises: ValueError for labels of a model of captions and the reverse, or as `parse_labels`.
    """
    takes = config.model.condition
    if takes == "label":
        if FLAGS.prompt or FLAGS.negative_prompt:
            raise ValueError("--prompt is of a model of captions; this one takes --labels.")
        labels = parse_labels(FLAGS.labels, FLAGS.num, config.model.num_classes, FLAGS.seed)
        return conditions.of_labels(labels, config.model.num_classes)
    if FLAGS.labels:
        raise ValueError(f"--labels={FLAGS.labels}: this model takes captions, as --prompt.")
    prompts = FLAGS.prompt or [""]
    if FLAGS.num < len(prompts):
        raise ValueError(
            f"--num={FLAGS.num} must be at least {len(prompts)}, one of each --prompt."
        )
    prompts = [prompts[i * len(prompts) // FLAGS.num] for i in range(FLAGS.num)]
    return conditions.of_captions(config, prompts, FLAGS.negative_prompt)


def _write(out, images, cond):
    """To a temporary file first, so that no half-written one bears the name."""
    temporary = out.with_suffix(f".tmp{out.suffix}")
    try:
        if out.suffix == ".npz":
            labels = {"label": cond} if cond.ndim == 1 else {}
            np.savez(temporary, arr_0=images, **labels)
        else:
            columns = FLAGS.columns or generate.grid_columns(len(images))
            Image.fromarray(generate.image_grid(images, columns)).save(temporary)
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write --out={out}: {error}") from error


def main(_):
    out = pathlib.Path(FLAGS.out)
    cli.check_out(out, (".png", ".npz"))
    trained = generate.load(**cli.loading())
    asked = told(trained.config)
    images = generate.generate(
        trained.make_sample_fn(),
        trained.params,
        asked,
        FLAGS.seed,
        trained.mesh,
        trained.to_image,
        batch_size=FLAGS.batch_size,
        progress=sys.stderr.isatty(),
    )
    if jax.process_index() == 0:
        _write(out, images, asked.cond)
    print(f"{len(images)} samples of step {trained.step}: {out}")


if __name__ == "__main__":
    cli.define_sampling()
    flags.DEFINE_string(
        "labels", "", "Comma-separated classes in equal shares; empty is all; or random."
    )
    flags.DEFINE_multi_string("prompt", [], "Caption, of a model of captions; may be repeated.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
    flags.DEFINE_integer("num", 16, "Images.", lower_bound=1)
    flags.DEFINE_string("out", "samples.png", "A .png grid, or an .npz of arr_0 and label.")
    flags.DEFINE_integer("columns", 0, "Of the grid; 0 makes it about square.", lower_bound=0)
    cli.run(main)
