"""One sheet of what several models draw of the same prompts, beside the data's own pictures.

  python -m experiments.unet_vs_dit.sheet --workdir runs/emoji/dit --workdir runs/emoji/unet \
      --name DiT --name UNet --prompt "grinning face" --prompt "red heart" --num 4 --cfg_scale 3 \
      --out sheet.png

Every model draws a prompt's images of the same noise. A caption of the data is marked as one that
was trained on or held out; any other prompt has no picture beside it.
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
# Pixels: of an image, a prompt's letters, the names above, and between the panels.
CELL, LETTER, TOP, BETWEEN = 64, 9, 40, 12


def real(config: ConfigDict, prompts: Sequence[str]) -> dict[str, tuple[str, np.ndarray]]:
    """{prompt: ('trained' or 'held out', image [H, W, 3] uint8)} of those that the data have."""
    found = {}
    for name, split in (("trained", config.data.train_split), ("held out", config.data.eval_split)):
        source = conditions.open_images(config, split) if split else ()
        for i in range(len(source)):
            for caption in set(source.captions(i)) & set(prompts):
                found.setdefault(caption, (name, source[i]["image"]))
    return found


def draw(workdir: pathlib.Path, prompts: Sequence[str], num: int, seed: int, settings: dict):
    """(config, images [prompts, num, H, W, 3] uint8) of a workdir's newest EMA weights.

    Image j of each prompt is of the noise j.   Raises: as `runs.load`.
    """
    trained = runs.load(workdir, settings=settings)
    sample = trained.make_sample_fn()
    images = [
        generate.generate(
            sample,
            trained.params,
            trained.condition.request([prompt] * num),
            seed,
            trained.mesh,
            trained.to_image,
        )
        for prompt in prompts
    ]
    return trained.config, np.stack(images)


def sheet(
    prompts: Sequence[str], panels: dict[str, np.ndarray], real: dict[str, tuple[str, np.ndarray]]
):
    """The matplotlib Figure: prompts down, across the data's picture and then each model's panel.

    Args: panels: by the model's name [prompts, num, H, W, 3] uint8.   real: of `real`.
    """
    matplotlib = plot_style.import_matplotlib()

    cell = max(CELL, next(iter(panels.values())).shape[2])
    told = {
        p: f"{plot_style.literal(p)}\n({real[p][0] if p in real else 'in no caption'})"
        for p in prompts
    }
    names = LETTER * max(len(line) for text in told.values() for line in text.split("\n"))
    blank = np.full(next(iter(panels.values())).shape[2:], 255, np.uint8)
    data = np.stack([real[p][1] if p in real else blank for p in prompts])[:, None]
    grids = {
        name: pictures.image_grid(images.reshape(-1, *images.shape[2:]), images.shape[1], cell)
        for name, images in {"data": data, **panels}.items()
    }
    height = next(iter(grids.values())).shape[0]
    total = names + sum(BETWEEN + grid.shape[1] for grid in grids.values()), TOP + height
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(figsize=[pixels / plot_style.DPI for pixels in total])
        left = names
        for name, grid in grids.items():
            left += BETWEEN
            box = left, 0, grid.shape[1], height
            axes = figure.add_axes([b / t for b, t in zip(box, 2 * total, strict=True)])
            axes.imshow(grid, interpolation="none", aspect="auto")
            axes.axis("off")
            at = (left + grid.shape[1] / 2) / total[0], 1 - TOP / 2 / total[1]
            figure.text(*at, plot_style.literal(name), ha="center", va="center")
            left += grid.shape[1]
        for i, prompt in enumerate(prompts):
            at = names / total[0], (height - (i + 0.5) * height / len(prompts)) / total[1]
            figure.text(*at, told[prompt], ha="right", va="center", fontsize=6)
    return figure


def names(given: Sequence[str], workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Of the models, by default their directories'.   Raises: ValueError if two are the same."""
    found = list(given) or [workdir.name for workdir in workdirs]
    if len({*found}) < len(found) or len(found) != len(workdirs):
        raise UserError(
            f"give every --workdir a --name of its own: {len(workdirs)} have the names "
            f"{', '.join(found)}."
        )
    return found


def define_workdirs() -> None:
    """--workdir and --name of several models."""
    cli.define_paths("workdir", "Of a model of captions; repeat.")
    flags.DEFINE_multi_string("name", [], "Of each --workdir; by default the directory's.")


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png",))
    settings = {"cfg_scale": FLAGS.cfg_scale}
    workdirs = FLAGS.workdir
    drawn = {
        name: draw(workdir, FLAGS.prompt, FLAGS.num, FLAGS.seed, settings)
        for name, workdir in zip(names(FLAGS.name, workdirs), workdirs, strict=True)
    }
    config = next(iter(drawn.values()))[0]
    panels = {name: images for name, (_, images) in drawn.items()}
    plot_style.save(sheet(FLAGS.prompt, panels, real(config, FLAGS.prompt)), out)
    print(out)


if __name__ == "__main__":
    define_workdirs()
    flags.DEFINE_multi_string("prompt", None, "A caption; repeat.", required=True)
    flags.DEFINE_integer("num", 4, "Images of each prompt by each model.", 1, 100)
    cli.define_seed("Of the noise.")
    flags.DEFINE_float("cfg_scale", 3.0, "Guidance.", lower_bound=1)
    cli.define_path("out", None, "The .png to write.", required=True)
    cli.run(main)
