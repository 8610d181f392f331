"""The effect of captions: the loss with a wrong caption compared to the loss with the right one.

  python -m experiments.unet_vs_dit.caption_effect --workdir runs/emoji/dit --name DiT \
      --workdir runs/emoji/unet --name UNet --out caption_effect.png

The wrong caption is that of another image. The command prints the losses of the newest EMA weights,
and draws by how much the wrong caption increases them. For a model that ignores captions, the
increase is 0, however good its loss is.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dit_jax import cli, conditions, latents, models
from dit_jax.diffusion import objectives
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.sampling import runs
from experiments.unet_vs_dit import sample_sheet

FLAGS = flags.FLAGS
TIMES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # t of the noised images
CAPTIONS = ("own", "another's", "none")  # given to each image in turn
MOST_IMAGES = 128  # of a split


def measure_losses(workdir: pathlib.Path, draws: int = 4) -> dict[str, np.ndarray]:
    """Measures the loss of a model with each caption of CAPTIONS.

    Every call uses the same images, noise and wrong captions, so that models can be compared.
    Args: draws, of noise for each image and time.
    Returns: {'trained': MSE [times, 3], 'held out': MSE [times, 3]}, by TIMES and CAPTIONS.
    Raises: ValueError for a model of labels or of latents; as `runs.load`.
    """
    trained = runs.load(workdir)
    config, mesh = trained.config, trained.mesh
    if latents.build(config).uses_vae:
        raise UserError(f"{workdir} has a model of latents. Choose a model of pixels.")
    process, objective = trained.process, config.objective

    # Caption, time and key are arguments, so that the function is compiled only once.
    @jax.jit
    def compute_loss(params, x_0, cond, time, key):
        network = models.bind(trained.model, params, mesh)
        encoded = conditions.encode(trained.model, params, trained.encoder, cond, mesh)

        def predict(x_t, network_time):
            return network(x_t, network_time, encoded)

        t = jnp.full(len(x_0), time)
        eps = jax.random.normal(key, x_0.shape)
        return jnp.mean(objectives.denoising_loss(process, objective, predict, x_0, t, eps)["mse"])

    results = {}
    for name, split in (("trained", config.data.train_split), ("held out", config.data.eval_split)):
        source = conditions.open_images(config, split)
        indices = range(min(len(source), MOST_IMAGES))
        x_0 = latents.pixels_from_image(jnp.stack([source[i]["image"] for i in indices]))
        request = conditions.build(config).request([source.captions(i)[0] for i in indices])
        # In the order of CAPTIONS.
        conds = request.cond, np.roll(request.cond, 1, axis=0), request.null
        # The same keys for all captions, so that the losses differ in the captions only.
        keys = jax.random.split(jax.random.key(0), draws)
        losses = [
            np.mean([compute_loss(trained.params, x_0, cond, t, key) for key in keys])
            for t, cond in itertools.product(TIMES, conds)
        ]
        results[name] = np.reshape(losses, (len(TIMES), len(CAPTIONS)))
    return results


def draw(results: dict[str, dict[str, np.ndarray]]):
    """Draws by how many percent wrong captions increase the loss; returns the matplotlib Figure.

    Args: results, {model: result of `measure_losses`}.
    """
    matplotlib = plot_style.import_matplotlib()

    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(2 * plot_style.WIDTH, plot_style.HEIGHT), layout="constrained"
        )
        panels = figure.subplots(1, 2, sharey=True)
        for axes, split in zip(panels, ("trained", "held out"), strict=True):
            for i, (name, model_losses) in enumerate(results.items()):
                own, wrong, _ = model_losses[split].T
                look = dict(
                    color=plot_style.COLORS[i % 7], marker=plot_style.MARKERS[i % 7], label=name
                )
                axes.plot(TIMES, 100 * (wrong / own - 1), **look)
            axes.set_title(f"{split} images")
            axes.set_xlabel("time t (1 is noise)")
        panels[0].set_ylabel("more loss by another's caption (%)")
        plot_style.draw_legend(panels[0], panels[0].lines, results, frameon=False)
    return figure


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png",))
    workdirs = FLAGS.workdir
    names = sample_sheet.name_models(FLAGS.name, workdirs)
    results = {name: measure_losses(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    captions = " ".join(f"{caption:>9}" for caption in CAPTIONS)
    print(f"{'model':16} {'images':9} {'t':>5} {captions}")
    for name, model_losses in results.items():
        for split, losses in model_losses.items():
            for t, losses_at_t in zip(TIMES, losses, strict=True):
                cells = " ".join(f"{loss:9.4f}" for loss in losses_at_t)
                print(f"{name:16} {split:9} {t:5.2f} {cells}")
    plot_style.save(draw(results), out)
    print(out)


if __name__ == "__main__":
    sample_sheet.define_workdirs()
    cli.define_path("out", None, "The .png to write.", required=True)
    cli.run(main)
