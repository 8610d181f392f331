"""Comparison of samplers by steps and quality, for three processes on latents of the digits.

  make demo
  python -m experiments.samplers.compare    # writes results.jsonl beside this file
  python -m experiments.samplers.compare --measure speed    # measures the speeds on this machine
  python -m experiments.samplers.page       # writes docs/samplers.md from results.jsonl

Each process is trained in DEMO/samplers/<process>. Existing runs and measurements are reused. A
line of the results has the settings of a sampler and the measures by `dit_jax.evaluate` of its
samples. A line with guidance also has 'passes', the forward passes per image, and 'img_per_s', the
speed of sampling a batch.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator

import jax
from absl import flags

from configs import digits_latents
from dit_jax import benchmark, cli, diffusion, train
from dit_jax.config import ranges
from dit_jax.errors import UserError
from dit_jax.evaluation import extractors, references, samples
from dit_jax.sampling import generate, runs
from dit_jax.system import files

FLAGS = flags.FLAGS
BATCH_SIZE = 1_000  # samples per batch, for quality
SPEED_BATCH_SIZE = 200
GUIDANCE = (1.5, 1.0)  # guidance scales; speeds are measured with the first
# (process, sampler, grid, steps, other settings); page.py compares all rows with the first.
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
    """Trains the process, unless a finished run exists, and returns the workdir of its run."""
    config = digits_latents.get_config(process)
    config.latents.update(moments=str(demo / "moments"), vae=str(demo / "vae"))
    workdir = demo / "samplers" / process
    train.train_and_evaluate(config, workdir)
    return workdir


def make_settings(row: tuple, cfg_scale: float) -> dict:
    """Returns the keys of `config.sample` that a row sets."""
    _, sampler, grid, steps, others = row
    return {"sampler": sampler, "grid": grid, "steps": steps, "cfg_scale": cfg_scale, **others}


def speed(process: str, settings: dict) -> dict:
    """Measures 'passes', 'img_per_s' and 'speed_device' of a sampler, with random weights."""
    config = digits_latents.get_config(process)
    # Without moments there are no recorded values to fill in; they do not change the speed.
    config.latents.update(scale=(1.0,), shift=(0.0,))
    config.sample.update(settings)
    measured = benchmark.bench_sample(config, config.sample.steps, SPEED_BATCH_SIZE)
    prediction = config.objective.prediction
    process = diffusion.build(config.diffusion)
    passes = generate.count_forward_passes(config.sample, process, prediction)
    return {
        "passes": passes,
        "img_per_s": measured["img_per_s"],
        "speed_device": measured["device"],
    }


def quality(workdir: pathlib.Path, settings: dict, num: int) -> dict:
    """Returns the measures by `samples.evaluate` of num samples, with num and the device."""
    trained = runs.load(workdir, settings=settings)
    extractor = extractors.load("pixels")
    reference = references.load_for_run(trained.config, None, extractor)
    row = samples.evaluate(
        trained, workdir, extractor, reference, num, labels="balanced", batch_size=BATCH_SIZE
    )
    names = ("step", "fd_pixels", "fd_pixels_real_halves", "label_accuracy")
    row = {name: row[name] for name in names}
    return {"num": num, **row, "device": jax.devices()[0].device_kind}


def measure(demo: pathlib.Path, num: int) -> Iterator[dict]:
    """Yields a result for every row of ROWS at every guidance scale.

    Raises: ValueError if the demo's VAE or moments are missing.
    """
    if not (demo / "vae").is_dir() or not (demo / "moments").is_dir():
        raise UserError(f"--demo={demo} has no vae and moments: `make demo` writes them.")
    workdirs = {process: train_process(demo, process) for process in ("ddpm", "flow", "edm")}
    for row, cfg_scale in itertools.product(ROWS, GUIDANCE):
        settings = make_settings(row, cfg_scale)
        line = {"process": row[0], **settings, **quality(workdirs[row[0]], settings, num)}
        yield line | (speed(row[0], settings) if cfg_scale == GUIDANCE[0] else {})


def measure_speeds(lines: list[dict]) -> Iterator[dict]:
    """Yields the given results with speeds measured on this machine.

    Raises: ValueError if the results are not of ROWS, in its order.
    """
    for line, (row, cfg_scale) in zip(lines, itertools.product(ROWS, GUIDANCE), strict=True):
        settings = make_settings(row, cfg_scale)
        # A speed must not be written beside the settings of another sampler.
        if line != line | {"process": row[0], **settings}:
            raise UserError(f"--out has {line} where {row[0]}, {settings} is expected.")
        yield line | (speed(row[0], settings) if cfg_scale == GUIDANCE[0] else {})


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".jsonl",))
    if FLAGS.measure == "speed":
        lines = measure_speeds([json.loads(line) for line in out.read_text().splitlines()])
    else:
        lines = measure(FLAGS.demo, FLAGS.num)
    # Lines are printed as they are measured, but the file is replaced only when all are done.
    texts = []
    for line in lines:
        texts.append(json.dumps(line))
        print(texts[-1], flush=True)
    files.replace_text(out, "\n".join(texts) + "\n")


if __name__ == "__main__":
    cli.define_path("demo", "runs/digits", "Workdir of `make demo`.")
    cli.define_path("out", str(pathlib.Path(__file__).parent / "results.jsonl"), "The results.")
    flags.DEFINE_enum("measure", "all", ["all", "speed"], "speed: of the results in --out.")
    flags.DEFINE_integer("num", 5_000, "Samples of each row.", 2, ranges.MAX_COUNT)
    cli.run(main)
