"""Comparison of samplers by steps and quality, for three processes on latents of the digits.

  make demo
  python -m experiments.samplers.compare    # writes results.jsonl beside this file
  python -m experiments.samplers.compare --measure speed    # measures only the speeds again
  python -m experiments.samplers.page       # writes docs/samplers.md from results.jsonl

Each process is trained in DEMO/samplers/<process>. Existing runs and measurements are reused. A
line of the results has the settings of a sampler, and the measures of its samples by
`dit_jax.evaluate`. A line with guidance also has 'passes', the forward passes per image, and
'img_per_s', the speed of sampling a batch.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

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
GUIDANCE = (1.5, 1.0)  # guidance scales; speeds are measured with the first one
# (process, sampler, grid, steps, other settings); page.py compares all rows with the first one.
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
    """Trains a model of the process, unless a finished run exists; returns its workdir."""
    config = digits_latents.get_config(process)
    config.latents.update(moments=str(demo / "moments"), vae=str(demo / "vae"))
    workdir = demo / "samplers" / process
    train.train_and_evaluate(config, workdir)
    return workdir


def list_settings() -> Iterator[tuple[str, dict]]:
    """Yields the process and the keys of `config.sample` of every row at every guidance scale."""
    for (process, sampler, grid, steps, others), scale in itertools.product(ROWS, GUIDANCE):
        settings = {"sampler": sampler, "grid": grid, "steps": steps, "cfg_scale": scale}
        yield process, settings | others


def measure_speed(process: str, settings: dict) -> dict:
    """Measures 'passes', 'img_per_s' and 'speed_device' of a sampler, with random weights."""
    config = digits_latents.get_config(process)
    # Without moments there are no recorded values. Any others will do: the speed is the same.
    config.latents.update(scale=(1.0,), shift=(0.0,))
    config.sample.update(settings)
    measured = benchmark.bench_sample(config, config.sample.steps, SPEED_BATCH_SIZE)
    prediction = config.objective.prediction
    passes = generate.count_forward_passes(
        config.sample, diffusion.build(config.diffusion), prediction
    )
    speed, device = measured["img_per_s"], measured["device"]
    return {"passes": passes, "img_per_s": speed, "speed_device": device}


def measure_quality(workdir: pathlib.Path, settings: dict, num: int) -> dict:
    """Measures `num` samples by `samples.evaluate`; the result also has num and the device."""
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
    """Measures every row of ROWS at every guidance scale; yields the results.

    Raises: ValueError if the demo's VAE or moments are missing.
    """
    if not (demo / "vae").is_dir() or not (demo / "moments").is_dir():
        raise UserError(f"--demo={demo} has no vae and moments: `make demo` writes them.")
    workdirs = {process: train_process(demo, process) for process in ("ddpm", "flow", "edm")}
    for process, settings in list_settings():
        quality = measure_quality(workdirs[process], settings, num)
        result = {"process": process, **settings, **quality}
        if settings["cfg_scale"] == GUIDANCE[0]:
            result |= measure_speed(process, settings)
        yield result


def measure_speeds(results: list[dict]) -> Iterator[dict]:
    """Measures the speeds of earlier results again on this machine; yields the results.

    Raises: ValueError if the results are not of ROWS, in its order.
    """
    for result, (process, settings) in zip(results, list_settings(), strict=True):
        # A speed must not be written beside the settings of another sampler.
        if result != result | {"process": process, **settings}:
            raise UserError(f"--out has {result} where {process}, {settings} is expected.")
        if settings["cfg_scale"] == GUIDANCE[0]:
            result = result | measure_speed(process, settings)
        yield result


def write_results(out: pathlib.Path, results: Iterable[dict]) -> None:
    """Prints each result when it is measured, and writes the file when all are done."""
    lines = []
    for result in results:
        lines.append(json.dumps(result))
        print(lines[-1], flush=True)
    files.replace_text(out, "\n".join(lines) + "\n")


def read_results(path: pathlib.Path) -> list[dict]:
    """Reads the results that `write_results` has written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(_):
    out = FLAGS.out
    cli.check_out(out, (".jsonl",))
    if FLAGS.measure == "speed":
        write_results(out, measure_speeds(read_results(out)))
    else:
        write_results(out, measure(FLAGS.demo, FLAGS.num))


if __name__ == "__main__":
    cli.define_path("demo", "runs/digits", "Workdir of `make demo`.")
    cli.define_path("out", str(pathlib.Path(__file__).parent / "results.jsonl"), "The results.")
    flags.DEFINE_enum(
        "measure", "all", ["all", "speed"], "speed: only measure the speeds in --out again."
    )
    flags.DEFINE_integer("num", 5_000, "Samples per row.", 2, ranges.MAX_COUNT)
    cli.run(main)
