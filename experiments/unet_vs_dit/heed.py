"""How far models heed captions: the loss of images told another's caption, against their own.

  python -m experiments.unet_vs_dit.heed --workdir runs/emoji/dit --workdir runs/emoji/unet \
      --name DiT --name UNet --out heed.png

It prints the losses, of the newest EMA weights, and draws by how much the wrong caption makes them
larger. A model that takes no notice of captions has none of it, however good its loss is.
"""

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
from experiments.unet_vs_dit import sheet

FLAGS = flags.FLAGS
TIMES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # of the noise added
TOLD = ("own", "another's", "none")
MOST = 128  # images of a split


def losses(workdir: pathlib.Path, draws: int = 4) -> dict[str, np.ndarray]:
    """{'trained' or 'held out': MSE [times, 3] of what the network predicts, told each of TOLD}.

    Of the first images of the splits, their noise and the caption that another gives them the same
    in every call.
    Raises: ValueError for a model of labels or of latents; as `runs.load`.
    """
    trained = runs.load(workdir)
    config, mesh = trained.config, trained.mesh
    if latents.build(config).uses_vae:
        raise UserError(f"{workdir} is a model of latents; this takes models of pixels.")
    process, objective = trained.process, config.objective

    @jax.jit
    def mean_loss(params, x_0, cond, time, key):
        network = models.bind(trained.model, params, mesh)
        encoded = conditions.encode(trained.model, params, trained.encoder, cond, mesh)

        def predict(x_t, network_time):
            return network(x_t, network_time, encoded)

        t = jnp.full(len(x_0), time)
        eps = jax.random.normal(key, x_0.shape)
        return jnp.mean(objectives.denoising_loss(process, objective, predict, x_0, t, eps)["mse"])

    found = {}
    for name, split in (("trained", config.data.train_split), ("held out", config.data.eval_split)):
        source = conditions.open_images(config, split)
        numbers = range(min(len(source), MOST))
        x_0 = latents.pixels_from_image(jnp.stack([source[i]["image"] for i in numbers]))
        request = conditions.build(config).request([source.captions(i)[0] for i in numbers])
        conds = request.cond, np.roll(request.cond, 1, axis=0), request.null
        keys = jax.random.split(jax.random.key(0), draws)
        found[name] = np.array(
            [
                [
                    np.mean([mean_loss(trained.params, x_0, cond, t, k) for k in keys])
                    for cond in conds
                ]
                for t in TIMES
            ]
        )
    return found


def draw(found: dict[str, dict[str, np.ndarray]]):
    """The matplotlib Figure of {model: `losses`}: by how much another's caption is worse."""
    matplotlib = plot_style.import_matplotlib()

    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(2 * plot_style.WIDTH, plot_style.HEIGHT), layout="constrained"
        )
        panels = figure.subplots(1, 2, sharey=True)
        for axes, split in zip(panels, ("trained", "held out"), strict=True):
            for i, (name, of_model) in enumerate(found.items()):
                own, others, _ = of_model[split].T
                look = dict(
                    color=plot_style.COLORS[i % 7], marker=plot_style.MARKERS[i % 7], label=name
                )
                axes.plot(TIMES, 100 * (others / own - 1), **look)
            axes.set_title(f"{split} images")
            axes.set_xlabel("time t (1 is noise)")
        panels[0].set_ylabel("more loss by another's caption (%)")
        plot_style.legend(panels[0], panels[0].lines, found, frameon=False)
    return figure


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".png",))
    workdirs = FLAGS.workdir
    names = sheet.names(FLAGS.name, workdirs)
    found = {name: losses(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    print(f"{'model':16} {'images':9} {'t':>5} " + " ".join(f"{told:>9}" for told in TOLD))
    for name, of_model in found.items():
        for split, rows in of_model.items():
            for t, row in zip(TIMES, rows, strict=True):
                cells = " ".join(f"{loss:9.4f}" for loss in row)
                print(f"{name:16} {split:9} {t:5.2f} {cells}")
    plot_style.save(draw(found), out)
    print(out)


if __name__ == "__main__":
    sheet.define_workdirs()
    cli.define_path("out", None, "The .png to write.", required=True)
    cli.run(main)
