"""Coordinate check of muP: how far a few training steps move the activations, at several widths.

  python -m dit_jax.datasets.digits
  python -m experiments.mup.coordinate_check --config configs/digits.py

The question is whether one learning rate fits all widths. DiTs of several widths, with the config's
head size, take the same training steps. Each width runs twice: with the config's learning rate, and
with `optim.mup_base_width` set to the config's hidden_size.

The check measures rms(f_t(x) - f_0(x)) over the coordinates of f, for fixed x. f is the output of a
module with a kernel, or 'stream', the output of the last block. If its movement grows with the
width, wide models learn too fast; if it shrinks, wide models stop learning.

The command prints the exponents of this growth. It writes a JSON with a row for each run and step,
and beside it a plot of the stream and of the network's output as .png. Take few steps: after many,
activations of all widths have moved as far as they can.
Source: Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466, appendix D.1.
"""

import collections
import json
import logging
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, latents, sharding
from dit_jax.config import parsers
from dit_jax.data import loader
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.system import files
from dit_jax.training import initial_state, programs, tasks

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")
KINDS = {False: "one rate", True: "rates by width"}  # key: whether mup_base_width is set
PANELS = {"stream": "last block's output", "final_layer/linear": "network's output"}


def set_width(config: ConfigDict, width: int, scaled: bool) -> ConfigDict:
    """Returns the config with another hidden_size and a constant learning rate.

    Args: scaled, whether to set mup_base_width, so that learning rates depend on the width.
    Raises: ValueError for a width that is no multiple of the config's head size.
    """
    size = config.model.hidden_size
    head_size = size // config.model.num_heads
    if width < 1 or width % head_size:
        raise UserError(f"{width=} must be a multiple of the config's head size, {head_size}.")
    config = config.copy_and_resolve_references()
    # The head size stays, so that muP scales attention scores equally at all widths.
    config.model.update(hidden_size=width, num_heads=width // head_size)
    config.optim.update(schedule="constant", warmup_steps=0, mup_base_width=size if scaled else 0)
    return config


def measure_movements(config: ConfigDict, steps: int, seeds: int) -> list[dict]:
    """Trains a config of `set_width`, and measures how far each module's output moves.

    A seed sets parameters, times, noise and dropped labels. config.seed sets the images.
    Returns: rows {'width', 'scaled', 'seed', 'step', 'moved': {name: rms}}, for each seed and step.
    Raises: ValueError or OSError as `latents.open_split` and `programs.make_program`.
    """
    source = latents.open_split(config, "train")
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(config.mesh, devices)
    config, frozen = tasks.choose(config).load_frozen(config, mesh, source.metadata)
    program = programs.make_program(config, devices)
    frozen = frozen.with_records(config, mesh, source)
    step_fn = programs.compile_train_step(program)
    iterator = loader.TrainIterator(
        source, config, sharding.local_rows(program.mesh, config.batch_size)
    )
    # Every seed trains on the same batches. The last batch is the fixed input x of f.
    *batches, fixed_batch = (
        sharding.put_batch(program.mesh, next(iterator)) for _ in range(steps + 1)
    )
    examples = program.task.draw_examples(
        fixed_batch, jax.random.key(config.seed), frozen, dropout=False
    )
    activations = compile_activations(program, frozen, examples)
    rows = []
    for seed in range(seeds):
        key = jax.random.key(seed)
        state = initial_state.new_state(program, key)
        initial = jax.device_get(activations(state.params))
        for step, batch in enumerate(batches, 1):
            state, _ = step_fn(state, batch, key, frozen)
            current = jax.device_get(activations(state.params))
            moved = {
                name: float(f"{compute_rms(current[name] - initial[name]):.4g}") for name in initial
            }
            width, scaled = config.model.hidden_size, config.optim.mup_base_width > 0
            row = {"width": width, "scaled": scaled, "seed": seed, "step": step, "moved": moved}
            rows.append(row)
    return rows


def compute_rms(values: np.ndarray) -> float:
    """Returns the root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def compile_activations(program: programs.Program, frozen: tasks.Frozen, examples):
    """Returns a jitted `activations(params) -> {name: array}` for fixed examples.

    Arrays of modules inside the blocks have a leading axis [L] over the blocks.
    """

    @jax.jit
    def activations(params):
        outputs = collections.defaultdict(list)

        def intercept(call, args, kwargs, context):
            result, module = call(*args, **kwargs), context.module
            if context.method_name == "__call__":
                if module.has_variable("params", "kernel"):
                    outputs["/".join(module.path)].append(jnp.stack(jax.tree.leaves(result)))
                if module.name == "final_layer":  # its input is the last block's output
                    outputs["stream"].append(args[0])
            return result

        # Without jit, lax.scan is a Python loop, so the interceptor gets the values of every block.
        with jax.disable_jit(), nn.intercept_methods(intercept):
            program.task.compute_losses(params, frozen, examples)
        # Flax traces the body of the scan once before the loop. These unusable tracers come first
        # in each list, so only the last `depth` values are taken.
        depth = program.model.depth
        return {
            name: jnp.stack(values[-depth:] if name.startswith("blocks/") else values)
            for name, values in outputs.items()
        }

    return activations


def average_seeds(rows: list[dict], step: int) -> pd.DataFrame:
    """Returns means over seeds of the movements after a step [(value of KINDS, width), module]."""
    moved = [
        {"kind": KINDS[row["scaled"]], "width": row["width"], **row["moved"]}
        for row in rows
        if row["step"] == step
    ]
    return pd.DataFrame(moved).groupby(["kind", "width"]).mean()


def fit_exponents(rows: list[dict], step: int) -> pd.DataFrame:
    """Fits moved = c width^p to `average_seeds`; returns p [module, kind], nan if a mean is 0."""

    def fit(moved):
        widths = moved.index.get_level_values("width")
        # A movement of 0 has no logarithm.
        return np.polyfit(np.log(widths), np.log(moved), 1)[0] if moved.all() else np.nan

    return average_seeds(rows, step).groupby("kind").agg(fit).T


def format_exponents(rows: list[dict]) -> str:
    """Returns the exponents after the last step as text, a line per module."""
    step = max(row["step"] for row in rows)
    title = f"p of width^p after {step} steps"
    lines = [f"{title:32}" + "".join(f"{kind:>16}" for kind in KINDS.values())]
    for name, exponents in fit_exponents(rows, step)[[*KINDS.values()]].iterrows():
        lines.append(f"{name:32}" + "".join(f"{p:16.2f}" for p in exponents))
    return "\n".join(lines)


def draw(rows: list[dict]):
    """Draws PANELS after the last step: means as lines, seeds as points; returns the Figure."""
    matplotlib = plot_style.import_matplotlib()

    step = max(row["step"] for row in rows)
    means, exponents = average_seeds(rows, step), fit_exponents(rows, step)
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(plot_style.WIDTH, 1.6 * plot_style.HEIGHT), layout="constrained"
        )
        panels = figure.subplots(len(PANELS), sharex=True)
        for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
            for i, (scaled, kind) in enumerate(KINDS.items()):
                last = [row for row in rows if row["scaled"] == scaled and row["step"] == step]
                points = [(row["width"], row["moved"][name]) for row in last]
                look = dict(color=plot_style.COLORS[1 - i], marker=plot_style.MARKERS[i])
                moved, p = means.loc[kind, name], exponents.loc[name, kind]
                axes.plot(moved.index, moved, label=f"{kind}, $p = {p:.2f}$", **look)
                plot_style.draw_seeds(axes, points, look["color"])
            # On log axes a power of the width is a straight line.
            plot_style.set_log_scale(axes.xaxis)
            plot_style.set_log_scale(axes.yaxis)
            axes.set_ylabel(f"moved after {step} steps (rms)")
            axes.set_title(label, loc="left", fontsize=8)
            axes.legend(frameon=False)
        widths = sorted({row["width"] for row in rows})
        axes.set_xticks(widths, map(str, widths))
        axes.set_xlabel("hidden_size")
    return figure


def write(out: pathlib.Path, config: ConfigDict, rows: list[dict]) -> None:
    """Writes the .json, with a line for each row, and the plot beside it as .png."""
    setup = {
        "base_width": config.model.hidden_size,
        "learning_rate": config.optim.learning_rate,
        "batch_size": config.batch_size,
        "depth": config.model.depth,
        "num_heads": config.model.num_heads,
        "jax": jax.__version__,
    }
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"of": {json.dumps(setup)},\n"rows": [\n{lines}\n]}}\n'
    files.replace_text(out, text)
    plot_style.save(draw(rows), out.with_suffix(".png"))


def main(_):
    config, out = FLAGS.config, FLAGS.out
    cli.check_out(out, (".json",))
    widths = sorted(set(FLAGS.widths))
    if len(widths) < 2:
        raise UserError(f"--widths={widths[0]} is one width: an exponent needs two or more.")
    rows = []
    # All configs are made before the first run, so that an invalid width raises at once.
    for wide_config in [set_width(config, width, scaled) for width in widths for scaled in KINDS]:
        rows += measure_movements(wide_config, FLAGS.steps, FLAGS.seeds)
        logger.info("width %d, %s: done", rows[-1]["width"], KINDS[rows[-1]["scaled"]])
    write(out, config, rows)
    print(format_exponents(rows))
    print(out)


if __name__ == "__main__":
    cli.define_config()
    results = pathlib.Path(__file__).parent / "results" / "coordinate_check.json"
    cli.define_path("out", str(results), "The .json to write.")
    parser = parsers.ListParser(int)
    flags.DEFINE(parser, "widths", "32,64,128,256", "Values of hidden_size.")
    flags.DEFINE_integer("steps", 5, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Runs of each width.", lower_bound=1)
    cli.run(main)
