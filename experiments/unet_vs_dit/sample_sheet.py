"""A sheet of samples by several models for the same prompts, beside images of the dataset.

  python -m experiments.unet_vs_dit.sample_sheet --workdir runs/emoji/dit --name DiT \
      --workdir runs/emoji/unet --name UNet --prompt "grinning face" --prompt "red heart" \
      --num 4 --cfg_scale 3 --out sheet.png

All models draw the images of a prompt from the same noise. If a prompt is a caption of the dataset,
the sheet has its image and marks it as trained on or held out. Other prompts have no image.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, conditions
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.sampling import generate, pictures, runs

FLAGS = flags.FLAGS
# Pixels: side of an image, width of a letter, height of the names at the top, gap between panels.
SIDE, LETTER, TOP, GAP = 64, 9, 40, 12


def find_real(config: ConfigDict, prompts: Sequence[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Finds the images of prompts that are captions of the dataset.

    Returns: {prompt: ('trained' or 'held out', image [H, W, 3] uint8)}.
    """
    images = {}
    for name, split in (("trained", config.data.train_split), ("held out", config.data.eval_split)):
        source = conditions.open_images(config, split) if split else ()
        for i in range(len(source)):
            for caption in set(source.captions(i)) & set(prompts):
                # A caption in both splits counts as trained on, which is the first to be read.
                images.setdefault(caption, (name, source[i]["image"]))
    return images


def sample(workdir: pathlib.Path, prompts: Sequence[str], num: int, seed: int, settings: dict):
    """Draws images with the newest EMA weights of a workdir.

    Image j of every prompt is drawn from noise j.
    Returns: config, images [prompts, num, H, W, 3] uint8.
    Raises: as `runs.load`.
    """
    trained = runs.load(workdir, settings=settings)
    sample_fn = trained.make_sample_fn()
    images = [
        generate.generate(
            sample_fn,
            trained.params,
            trained.condition.request([prompt] * num),
            seed,
            trained.mesh,
            trained.to_image,
        )
        for prompt in prompts
    ]
    return trained.config, np.stack(images)


def draw(
    prompts: Sequence[str], panels: dict[str, np.ndarray], real: dict[str, tuple[str, np.ndarray]]
):
    """Draws the sheet; returns the matplotlib Figure.

    It has a row per prompt. The columns are the dataset's images and a panel per model.
    Args:
      panels: by the model's name, [prompts, num, H, W, 3] uint8.   real: the result of `find_real`.
    """
    matplotlib = plot_style.import_matplotlib()

    # A prompt without an image in the dataset has a white one.
    image_shape = next(iter(panels.values())).shape[2:]
    missing = "in no caption", np.full(image_shape, 255, np.uint8)
    origins = {prompt: real.get(prompt, missing) for prompt in prompts}
    data = np.stack([origins[prompt][1] for prompt in prompts])[:, None]
    texts = {prompt: f"{plot_style.escape(prompt)}\n({origins[prompt][0]})" for prompt in prompts}
    # The column of prompts is as wide as the longest line of text in it.
    prompts_width = LETTER * max(len(line) for text in texts.values() for line in text.split("\n"))
    side = max(SIDE, image_shape[0])
    grids = {
        name: pictures.image_grid(images.reshape(-1, *images.shape[2:]), images.shape[1], side)
        for name, images in {"data": data, **panels}.items()
    }
    height = next(iter(grids.values())).shape[0]
    total = prompts_width + sum(GAP + grid.shape[1] for grid in grids.values()), TOP + height
    # Axes are placed by hand, so that pixels of the panels and of the figure coincide.
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(figsize=[pixels / plot_style.DPI for pixels in total])
        left = prompts_width
        for name, grid in grids.items():
            left += GAP
            box = left, 0, grid.shape[1], height
            axes = figure.add_axes([b / t for b, t in zip(box, 2 * total, strict=True)])
            axes.imshow(grid, interpolation="none", aspect="auto")
            axes.axis("off")
            x, y = (left + grid.shape[1] / 2) / total[0], 1 - TOP / 2 / total[1]
            figure.text(x, y, plot_style.escape(name), ha="center", va="center")
            left += grid.shape[1]
        for i, prompt in enumerate(prompts):
            y = (height - (i + 0.5) * height / len(prompts)) / total[1]
            x = prompts_width / total[0]
            figure.text(x, y, texts[prompt], ha="right", va="center", fontsize=6)
    return figure


def name_models(names: Sequence[str], workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Returns the names of the models; without names, those of their workdirs.

    Raises: ValueError if two names are equal, or if there are more or fewer names than workdirs.
    """
    model_names = list(names) or [workdir.name for workdir in workdirs]
    if len({*model_names}) < len(model_names) or len(model_names) != len(workdirs):
        raise UserError(
            f"{len(workdirs)} workdirs have the names {', '.join(model_names)}. Give every "
            "--workdir its own --name."
        )
    return model_names


def define_workdirs() -> None:
    """Defines the flags --workdir and --name, each of which may be repeated."""
    cli.define_paths("workdir", "Workdir of a model of captions; repeat.")
    flags.DEFINE_multi_string("name", [], "Name of each --workdir; by default the directory's.")


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png",))
    settings = {"cfg_scale": FLAGS.cfg_scale}
    workdirs = FLAGS.workdir
    drawn = {
        name: sample(workdir, FLAGS.prompt, FLAGS.num, FLAGS.seed, settings)
        for name, workdir in zip(name_models(FLAGS.name, workdirs), workdirs, strict=True)
    }
    config = next(iter(drawn.values()))[0]
    panels = {name: images for name, (_, images) in drawn.items()}
    plot_style.save(draw(FLAGS.prompt, panels, find_real(config, FLAGS.prompt)), out)
    print(out)


if __name__ == "__main__":
    define_workdirs()
    flags.DEFINE_multi_string("prompt", None, "A caption; repeat.", required=True)
    flags.DEFINE_integer("num", 4, "Images by each model of each prompt.", 1, 100)
    cli.define_seed("Seed of the noise.")
    flags.DEFINE_float("cfg_scale", 3.0, "Guidance scale.", lower_bound=1)
    cli.define_path("out", None, "The .png to write.", required=True)
    cli.run(main)
