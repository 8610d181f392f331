"""How many steps do samplers need? Trains three processes on the digits demo's latents, measures
samples of each sampler, and writes the table of docs/samplers.md.

  make demo
  python -m experiments.samplers.compare --demo runs/digits --out docs/samplers.md

Each run is a workdir beside the demo's, DEMO/samplers/<process>; what is there is not done again.
"""

import pathlib
import statistics
import time
from string import Template

import jax
import jax.numpy as jnp
from absl import flags

from configs import digits_latents
from dit_jax import cli, evaluate, generate, train

FLAGS = flags.FLAGS
WINDOWS = 3
BATCH_SIZE = 1_000
GUIDANCE = (1.5, 1.0)
TEXT = Template((pathlib.Path(__file__).parent / "samplers.md.template").read_text())
# Process, sampler, grid, steps, other settings; the first row is what the others are compared with.
ROWS = (
    ("ddpm", "ddpm", "uniform", 250, {}),
    ("ddpm", "ddpm", "uniform", 100, {}),
    ("ddpm", "ddpm", "uniform", 50, {}),
    ("ddpm", "ddim", "uniform", 50, {}),
    ("ddpm", "ddim", "uniform", 20, {}),
    ("ddpm", "dpmpp2m", "uniform", 20, {}),
    ("ddpm", "dpmpp2m", "karras", 20, {}),
    ("ddpm", "dpmpp2m_sde", "karras", 20, {}),
    ("ddpm", "heun", "karras", 10, {}),
    ("ddpm", "ab2", "karras", 20, {}),
    ("ddpm", "heun", "uniform", 100, {}),
    ("flow", "euler_maruyama", "uniform", 250, {}),
    ("flow", "euler", "uniform", 50, {}),
    ("flow", "euler", "uniform", 16, {}),
    ("flow", "heun", "uniform", 8, {}),
    ("flow", "ab2", "uniform", 16, {}),
    ("flow", "ab4", "uniform", 16, {}),
    ("flow", "dpmpp2m", "uniform", 16, {}),
    ("flow", "heun", "uniform", 100, {}),
    ("edm", "euler", "karras", 18, {}),
    ("edm", "heun", "karras", 9, {}),
    ("edm", "heun", "karras", 18, {"churn": 10.0}),
    ("edm", "dpmpp2m", "karras", 18, {}),
    ("edm", "heun", "karras", 100, {}),
)


def train_process(demo: pathlib.Path, process: str) -> pathlib.Path:
    """The workdir of the process's run, finished."""
    config = digits_latents.get_config(process)
    config.latents.update(moments=str(demo / "moments"), vae=str(demo / "vae"))
    workdir = demo / "samplers" / process
    train.train_and_evaluate(config, workdir)
    return workdir


def measure(workdir: pathlib.Path, settings: dict, num: int) -> dict:
    """The row of `evaluate`, with an image's 'passes' through the network, and 'img_per_s'."""
    trained = generate.load(workdir, settings=settings)
    row = evaluate.evaluate(trained, workdir, num, batch_size=BATCH_SIZE)
    sample = trained.make_sample_fn()
    index = jnp.arange(BATCH_SIZE)
    arguments = trained.params, jax.random.key(0), index, index % trained.model.num_classes
    jax.block_until_ready(sample(*arguments))  # compiles

    def window():
        began = time.perf_counter()
        jax.block_until_ready(sample(*arguments))
        return time.perf_counter() - began

    prediction = trained.config.objective.prediction
    passes = generate.forward_passes(trained.config.sample, trained.process, prediction)
    speed = BATCH_SIZE / statistics.median(window() for _ in range(WINDOWS))
    return row | {"passes": passes, "img_per_s": speed}


def table(rows: list[tuple[tuple, list[dict]]]) -> str:
    """Markdown of (what was asked for, what was measured with each guidance)."""
    guided = " | ".join(f"guidance {scale:g} | to the first row" for scale in GUIDANCE)
    lines = [
        f"| process | sampler | grid | steps | passes | {guided} | images/s |",
        "|---" * (6 + 2 * len(GUIDANCE)) + "|",
    ]
    first = [row["fd_pixels"] for row in rows[0][1]]
    for (process, sampler, grid, steps, others), measured in rows:
        grid = " ".join([grid, *(f"{key}={value:g}" for key, value in others.items())])
        distances = " | ".join(
            f"{row['fd_pixels']:.3f} | {row['fd_pixels'] / reference - 1:+.0%}"
            for row, reference in zip(measured, first, strict=True)
        )
        lines.append(
            f"| {process} | {sampler} | {grid} | {steps} | {measured[0]['passes']} | {distances} | "
            f"{measured[0]['img_per_s']:.0f} |"
        )
    return "\n".join(lines)


def main(_):
    demo, out = pathlib.Path(FLAGS.demo), pathlib.Path(FLAGS.out)
    cli.check_out(out, (".md",))
    if not (demo / "vae").is_dir() or not (demo / "moments").is_dir():
        raise ValueError(f"--demo={demo} has no vae and moments: `make demo` writes them.")
    workdirs = {process: train_process(demo, process) for process in ("ddpm", "flow", "edm")}
    rows = []
    for asked in ROWS:
        process, sampler, grid, steps, others = asked
        settings = {"sampler": sampler, "grid": grid, "steps": steps, **others}
        measured = [
            measure(workdirs[process], {"cfg_scale": scale, **settings}, FLAGS.num)
            for scale in GUIDANCE
        ]
        print(process, settings, [f"{row['fd_pixels']:.3f}" for row in measured], flush=True)
        rows.append((asked, measured))
    device = jax.devices()[0]
    text = TEXT.substitute(
        table=table(rows),
        num=f"{FLAGS.num:,}",
        halves=f"{rows[0][1][0]['fd_pixels_real_halves']:.3f}",
        device=f"{device.device_kind} ({device.platform}), JAX {jax.__version__}",
    )
    out.write_text(text)
    print(out)


if __name__ == "__main__":
    flags.DEFINE_string("demo", "runs/digits", "Workdir of `make demo`.")
    flags.DEFINE_string("out", "docs/samplers.md", "The page to write.")
    flags.DEFINE_integer("num", 5_000, "Samples of each row.", lower_bound=2)
    cli.run(main)
