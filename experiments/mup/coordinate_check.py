"""Does one learning rate serve all widths? How far a few steps move the activations of a DiT.

  python -m dit_jax.datasets.digits
  python -m experiments.mup.coordinate_check --config configs/digits.py

DiTs of several widths, with heads as large as the config's, take the same steps at its learning
rate: the same for all widths, or with `optim.mup_base_width`, here the config's hidden_size.
Measured is rms(f_t(x) - f_0(x)) over the coordinates of the output f of every module with a kernel,
and of the last block's 'stream', for fixed x. What grows with the width learns too fast in wide
models; what shrinks stands still there. Printed are the exponents; the JSON has a row for each run
and step, and a plot of the stream and the network's output lies beside it, as .png.

The steps must be few: soon the activations are as far from their first values as they can be.
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
from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, latents, sharding
from dit_jax.data import loader
from dit_jax.errors import UserError
from dit_jax.evaluation import plot_style
from dit_jax.system import files
from dit_jax.training import initial_state, programs

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")
KINDS = {False: "one rate", True: "rates by width"}  # without and with mup_base_width
PANELS = {"stream": "last block's output", "final_layer/linear": "network's output"}


def of_width(config: ConfigDict, width: int, scaled: bool) -> ConfigDict:
    """The config with another hidden_size and a constant learning rate, by width or not.

    Raises: ValueError for a width that is no multiple of the config's head size.
    """
    size = config.model.hidden_size
    head_size = size // config.model.num_heads
    if width < 1 or width % head_size:
        raise UserError(f"{width=} must be a multiple of the config's head size, {head_size}.")
    config = config.copy_and_resolve_references()
    config.model.update(hidden_size=width, num_heads=width // head_size)
    config.optim.update(schedule="constant", warmup_steps=0, mup_base_width=size if scaled else 0)
    return config


def movements(config: ConfigDict, steps: int, seeds: int) -> list[dict]:
    """Rows {'width', 'scaled', 'seed', 'step', 'moved': {name: rms}} of a config of `of_width`.

    A seed is of parameters, times, noise and dropped labels; the images are those of config.seed.
    Raises: ValueError or OSError as `latents.open_split` and `programs.make_program`.
    """
    source = latents.open_split(config, "train")
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(config.mesh, devices)
    config, frozen = latents.load_frozen(config, mesh, source.metadata)
    program = programs.make_program(config, devices)
    frozen = frozen.with_records(config, mesh, source)
    step_fn = programs.compile_train_step(program)
    iterator = loader.TrainIterator(
        source, config, sharding.local_rows(program.mesh, config.batch_size)
    )
    *batches, fixed = (sharding.put_batch(program.mesh, next(iterator)) for _ in range(steps + 1))
    examples = program.task.examples(fixed, jax.random.key(config.seed), frozen, dropout=False)
    activations = compile_activations(program, frozen, examples)
    found = []
    for seed in range(seeds):
        key = jax.random.key(seed)
        state = initial_state.new_state(program, key)
        initial = jax.device_get(activations(state.params))
        for step, batch in enumerate(batches, 1):
            state, _ = step_fn(state, batch, key, frozen)
            now = jax.device_get(activations(state.params))
            moved = {name: float(f"{rms(now[name] - initial[name]):.4g}") for name in initial}
            width, scaled = config.model.hidden_size, config.optim.mup_base_width > 0
            row = {"width": width, "scaled": scaled, "seed": seed, "step": step, "moved": moved}
            found.append(row)
    return found


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def compile_activations(program: programs.Program, frozen: latents.Frozen, examples):
    """`activations(params) -> {name: array}` for fixed examples; of blocks [L, ...]."""

    @jax.jit
    def activations(params):
        seen = collections.defaultdict(list)

        def intercept(call, args, kwargs, context):
            result, module = call(*args, **kwargs), context.module
            if context.method_name == "__call__":
                if module.has_variable("params", "kernel"):
                    seen["/".join(module.path)].append(jnp.stack(jax.tree.leaves(result)))
                if module.name == "final_layer":
                    seen["stream"].append(args[0])
            return result

        # Without jit lax.scan is a loop in Python, whose body's values can be had.
        with jax.disable_jit(), nn.intercept_methods(intercept):
            program.task.losses(params, frozen, examples)
        depth = program.model.depth  # before the loop flax traces its body once: not of this trace
        return {
            name: jnp.stack(values[-depth:] if name.startswith("blocks/") else values)
            for name, values in seen.items()
        }

    return activations


def exponent(rows: list[dict], scaled: bool, step: int, name: str) -> float:
    """p of the fit moved = c width^p to the means over seeds; nan where something stood still."""
    moved = means(rows, scaled, step, name)
    if 0 in moved.values():
        return float("nan")
    return float(np.polyfit(np.log(list(moved)), np.log(list(moved.values())), 1)[0])


def means(rows: list[dict], scaled: bool, step: int, name: str) -> dict[int, float]:
    """By width."""
    by_width = collections.defaultdict(list)
    for row in rows:
        if (row["scaled"], row["step"]) == (scaled, step):
            by_width[row["width"]].append(row["moved"][name])
    return {width: float(np.mean(moved)) for width, moved in by_width.items()}


def table(rows: list[dict]) -> str:
    """The exponents after the last step."""
    step = max(row["step"] for row in rows)
    title = f"p of width^p after {step} steps"
    lines = [f"{title:32}" + "".join(f"{kind:>16}" for kind in KINDS.values())]
    for name in rows[0]["moved"]:
        found = [exponent(rows, scaled, step, name) for scaled in KINDS]
        lines.append(f"{name:32}" + "".join(f"{p:16.2f}" for p in found))
    return "\n".join(lines)


def draw(rows: list[dict]):
    """The matplotlib Figure of the PANELS after the last step: lines of means, points of seeds."""
    matplotlib = plot_style.import_matplotlib()

    step = max(row["step"] for row in rows)
    with matplotlib.rc_context(plot_style.STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(plot_style.WIDTH, 1.6 * plot_style.HEIGHT), layout="constrained"
        )
        panels = figure.subplots(len(PANELS), sharex=True)
        for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
            for i, (scaled, kind) in enumerate(KINDS.items()):
                of_kind = [r for r in rows if (r["scaled"], r["step"]) == (scaled, step)]
                points = [(row["width"], row["moved"][name]) for row in of_kind]
                look = dict(color=plot_style.COLORS[1 - i], marker=plot_style.MARKERS[i])
                p = exponent(rows, scaled, step, name)
                moved = means(rows, scaled, step, name)
                axes.plot(moved.keys(), moved.values(), label=f"{kind}, $p = {p:.2f}$", **look)
                plot_style.draw_seeds(axes, points, look["color"])
            plot_style.log_scale(axes.xaxis)
            plot_style.log_scale(axes.yaxis)
            axes.set_ylabel(f"moved after {step} steps (rms)")
            axes.set_title(label, loc="left", fontsize=8)
            axes.legend(frameon=False)
        widths = sorted({row["width"] for row in rows})
        axes.set_xticks(widths, map(str, widths))
        axes.set_xlabel("hidden_size")
    return figure


def write(out: pathlib.Path, config: ConfigDict, rows: list[dict]) -> None:
    """The .json, with a line for each row, and the .png beside it."""
    head = {
        "base_width": config.model.hidden_size,
        "learning_rate": config.optim.learning_rate,
        "batch_size": config.batch_size,
        "depth": config.model.depth,
        "num_heads": config.model.num_heads,
        "jax": jax.__version__,
    }
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"of": {json.dumps(head)},\n"rows": [\n{lines}\n]}}\n'
    files.replace_text(out, text)
    plot_style.save(draw(rows), out.with_suffix(".png"))


def main(_):
    config, out = FLAGS.config, FLAGS.out
    cli.check_out(out, (".json",))
    widths = sorted(set(FLAGS.widths))
    if len(widths) < 2:
        raise UserError(f"--widths={widths[0]}: an exponent needs two or more.")
    rows = []
    for changed in [of_width(config, width, scaled) for width in widths for scaled in KINDS]:
        rows += movements(changed, FLAGS.steps, FLAGS.seeds)
        logger.info("width %d, %s: done", rows[-1]["width"], KINDS[rows[-1]["scaled"]])
    write(out, config, rows)
    print(table(rows))
    print(out)


if __name__ == "__main__":
    cli.define_config()
    results = pathlib.Path(__file__).parent / "results" / "coordinate_check.json"
    cli.define_path("out", str(results), "The measurements, .json.")
    cli.define_numbers("widths", "32,64,128,256", "Values of hidden_size.", int)
    flags.DEFINE_integer("steps", 5, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Runs of each width.", lower_bound=1)
    cli.run(main)
