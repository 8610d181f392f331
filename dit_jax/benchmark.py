"""Measured speed of training, its loop, sampling, a VAE, Inception and the metrics, as JSON.

  python -m dit_jax.benchmark train  --config configs/imagenet256.py:DiT-XL/2 --steps 20 --json
  python -m dit_jax.benchmark loop   --config configs/digits.py --steps 200
  python -m dit_jax.benchmark sample --config configs/digits.py --steps 20
  python -m dit_jax.benchmark vae    --config configs/vae_imagenet256.py --batch_size 16
  python -m dit_jax.benchmark inception --batch_size 64 --dtype float32
  python -m dit_jax.benchmark metrics --num 50000

A time is the median of three windows, after a warm-up. The batch is synthetic and stays in device
memory; with --data `train` reads the config's data. `loop` compares the bare step with all of
`train_and_evaluate`. TFLOP/s and MFU use the multiply-adds that `dit_jax.flops` counts. `metrics`
times each measure once, from ready features, as many as FID-50K takes.
"""

import functools
import itertools
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import flax
import jax
import jaxlib
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, conditions, latents, models, sharding, train
from dit_jax.config import parsers, sizes
from dit_jax.data import loader
from dit_jax.errors import UserError
from dit_jax.evaluation import metrics, precision_recall
from dit_jax.sampling import generate
from dit_jax.system import stopping
from dit_jax.training import frozen_networks, initial_state, programs

FLAGS = flags.FLAGS
WINDOWS = 3  # the median of them counts
MODEL_SETTINGS = ("block", "dtype", "attention", "scan_unroll", "remat")  # not every model has all
LOOP_WINDOWS = 11  # of each kind, many because the difference is small and machines drift
REFERENCE_FEATURES = 10_000  # at most, as the ADM evaluator uses for precision and recall

# Dense bf16 peak by device_kind, TFLOP/s, from the vendors' sheets. Cards of other forms (PCIe,
# NVL) have other peaks and other names: no MFU is better than a wrong one.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def bench_train(config: ConfigDict, steps: int, data: bool = False) -> dict:
    """Returns the time of the jitted step on synthetic or real data, over windows of `steps`."""
    program = programs.make_program(config)
    window, compile_seconds = _step_window(program, steps, data)
    window()  # warm-up
    seconds = statistics.median(window() for _ in range(WINDOWS)) / steps
    work = models.count(config)["train_gflops_per_image"]
    return {
        **_speed(seconds, config.batch_size, work, "step", program.model.dtype),
        "data": "real" if data else "synthetic",
        **_identity(program.mesh, program.model, config, compile_seconds),
    }


def bench_loop(config: ConfigDict, steps: int) -> dict:
    """Returns the loop's time per step beyond that of the bare jitted step, in percent.

    Windows of both alternate, so that a machine whose speed drifts slows both. Each window of the
    loop is divided by the mean of the bare windows around it; the median of these ratios counts.
    """
    # Evaluation, pictures and checkpoints are left out. total_steps grows with each window below,
    # so the schedule must not depend on it.
    with config.unlocked():
        config.update(log_every_steps=steps, checkpoint_every_steps=10**9)
        config.update(eval_every_steps=0, sample_every_steps=0)
        config.optim.update(schedule="constant", warmup_steps=0)
    program = programs.make_program(config)
    window, compile_seconds = _step_window(program, steps, real_data=False)
    window()  # warm-up
    bare_ms, loop_ms = [1e3 * window() / steps], []
    with tempfile.TemporaryDirectory() as workdir:
        workdir = pathlib.Path(workdir)
        for i in range(LOOP_WINDOWS):
            # The run resumes, warms up with one window, and is measured in the second.
            config.total_steps = 2 * steps * (i + 1)
            try:
                train.train_and_evaluate(config, workdir)
            except stopping.Stopped as stopped:
                # Without the loop's message: the workdir that it names is removed.
                raise stopping.Stopped(stopped.number) from None
            report = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
            loop_ms.append(1e3 * config.batch_size / report["img_per_s"])
            bare_ms.append(1e3 * window() / steps)
    around = [statistics.mean(pair) for pair in itertools.pairwise(bare_ms)]
    ratios = [loop / bare for loop, bare in zip(loop_ms, around, strict=True)]
    return {
        "loop_overhead_percent": 100 * (statistics.median(ratios) - 1),
        "loop_ms_per_step": loop_ms,
        "bare_ms_per_step": bare_ms,
        **_identity(program.mesh, program.model, config, compile_seconds),
    }


def _step_window(program, steps, real_data):
    """Returns (window, compile seconds); window() returns the seconds that `steps` steps take."""
    config, mesh = program.config.copy_and_resolve_references(), program.mesh
    key = jax.random.key(config.seed)
    state = initial_state.new_state(program, key)
    source = latents.open_split(config, "train") if real_data else None
    batches = _real_batches(program, source) if real_data else _synthetic_batches(program)
    x_0 = latents.build(config)
    if x_0.uses_vae and not x_0.encodes:
        config.latents.vae = ""  # no step reads it, and a benchmark needs no workdir of one
    _, frozen = frozen_networks.load(config, mesh)
    frozen = frozen.with_records(program.config, mesh, source) if source else frozen
    first = state, next(batches), key, frozen
    step, compile_seconds = _compile(programs.compile_train_step(program), *first)

    def run():
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, next(batches), key, frozen)
        return state

    return functools.partial(_seconds, run), compile_seconds


def bench_sample(config: ConfigDict, steps: int, batch_size: int) -> dict:
    """Returns the time to draw one batch in `steps` steps, with config.sample's other settings."""
    with config.unlocked():
        config.sample.steps = steps
    program = programs.make_program(config)
    sharding.check_batch_size(program.mesh, batch_size)
    # Sampling needs the parameters alone, without optimizer state and EMA.
    params = jax.jit(
        lambda key: models.init_params(program.model, key),
        out_shardings=program.shardings.params,
    )(jax.random.key(config.seed))
    settings = config.sample, program.task.process, config.objective.prediction
    sample = generate.make_sample_fn(program.model, *settings, program.mesh)
    index = np.arange(batch_size, dtype=np.int32)
    condition = conditions.build(config)
    rows = {"index": index, **condition.make_example(batch_size).rows(index)}
    batch = sharding.put_batch(program.mesh, rows)
    encoder = condition.load_encoder(program.mesh)
    arguments = params, jax.random.key(0), batch["index"], batch["cond"], batch["null"], encoder
    seconds, compile_seconds = _time(sample, arguments)
    # Guided steps pass through the network twice.
    passes = generate.forward_passes(*settings)
    work = models.count(config)["gflops"] * passes
    return {
        "ms_per_sampler_step": 1e3 * seconds / steps,
        **_speed(seconds, batch_size, work, "batch", program.model.dtype),
        **_identity(program.mesh, program.model, config, compile_seconds),
        "batch_size": batch_size,
        "sample": config.sample.to_dict(),
    }


def bench_vae(config: ConfigDict, steps: int, batch_size: int) -> dict[str, dict]:
    """Returns the times to encode and to decode one batch, measured over windows of `steps`."""
    program = programs.make_program(config)
    model, mesh = program.model, program.mesh
    vae = latents.Vae(_init_params(model, mesh), model, digest="")
    height, width, channels = sizes.image_shape(config.data)
    images = _random_batch(mesh, (batch_size, height, width, channels), np.uint8)
    shape = height // model.factor, width // model.factor, model.latent_channels
    x_0 = _random_batch(mesh, (batch_size, *shape), np.float32)
    unscaled = ConfigDict(dict(scale=(1.0,), shift=(0.0,)))
    functions = {
        "encode": (jax.jit(lambda vae, x: latents.encode_in_groups(vae, x, mesh)), images),
        "decode": (latents.make_decode_fn(unscaled, mesh), x_0),
    }
    counts, results = models.count(config), {}
    for name, (function, x) in functions.items():
        seconds, compile_seconds = _time(function, (vae, x), steps)
        results[name] = {
            # A multiply-add is two FLOPs.
            **_speed(seconds, batch_size, 2 * counts[f"{name}_gmacs"], "batch", model.dtype),
            **_identity(mesh, model, config, compile_seconds),
            "batch_size": batch_size,
            "image_size": sizes.simplify((height, width)),
        }
    return results


def bench_inception(steps: int, batch_size: int, image_size: sizes.Size, dtype: str) -> dict:
    """Returns the time of one batch's features, measured over windows of `steps`."""
    config = ConfigDict({"model": {"name": "inception", "dtype": dtype}})
    config.update(batch_size=batch_size, grad_accumulation_steps=1)
    model = models.build(config.model)
    # Every device extracts the features of its own images.
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)))
    params = _init_params(model, mesh)
    shape = batch_size, *sizes.height_and_width(image_size), 3
    images = _random_batch(mesh, shape, np.uint8)
    extract = jax.jit(lambda params, images: model.apply({"params": params}, images))
    seconds, compile_seconds = _time(extract, (params, images), steps)
    work = models.count(config)["gflops"]
    return {
        **_speed(seconds, batch_size, work, "batch", dtype),
        **_identity(mesh, model, config, compile_seconds),
        "gflops_per_image": work,
        "image_size": image_size,
        "precision": "default" if model.precision is None else model.precision.name.lower(),
    }


def _init_params(model, mesh):
    """Returns initial parameters on all devices; they take as long as trained ones."""
    init = functools.partial(models.init_params, model)
    return jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))


def _random_batch(mesh, shape, dtype):
    """Returns a batch of random images (uint8) or latents (float32), on the devices."""
    sharding.check_batch_size(mesh, shape[0])
    rng = np.random.default_rng(0)
    shape = len(sharding.local_rows(mesh, shape[0])), *shape[1:]
    is_image = dtype == np.uint8
    x = rng.integers(0, 256, shape, dtype) if is_image else rng.standard_normal(shape, dtype)
    return sharding.put_batch(mesh, {"x": x})["x"]


def bench_metrics(num: int) -> dict:
    """Returns the seconds of each measure of `num` synthetic samples, as FID-50K takes them."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, 2048), np.float32) / 8

    def draw(n):
        """Returns [n, 2048] of correlated values that are not negative, like Inception's."""
        features = rng.standard_normal((n, 2048), np.float32)
        for block in np.array_split(features, -(-n // 5000)):  # in blocks, to bound the memory
            block += rng.standard_normal((len(block), 64), np.float32) @ mix
            np.maximum(block, 0, out=block)
        return features

    samples, reference = draw(num), draw(min(num, REFERENCE_FEATURES))
    # Sizes matter here, not values: spatial features and probabilities come from the same array.
    probabilities = np.exp(samples[:, :1000])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    pool = metrics.fit_gaussian(reference)
    spatial = metrics.Gaussian(pool.mean[:2023], pool.covariance[:2023, :2023], pool.n)
    measures = {
        "fid": lambda: metrics.frechet_distance(metrics.fit_gaussian(samples), pool),
        "sfid": lambda: metrics.frechet_distance(metrics.fit_gaussian(samples[:, :2023]), spatial),
        "inception_score": lambda: metrics.inception_score(probabilities),
        "kernel_distance": lambda: metrics.kernel_distance(samples, reference),
        "precision_recall": lambda: precision_recall.compute(samples, reference, half=True),
    }
    seconds = {f"{name}_seconds": _seconds(measure) for name, measure in measures.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **seconds,
        # ru_maxrss is in bytes on macOS and in KiB on Linux.
        "peak_host_memory_gib": peak / (2**30 if sys.platform == "darwin" else 2**20),
        "num": num,
        "reference": len(reference),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _time(function, arguments, calls=1):
    """Returns the seconds of a call, the median of windows of `calls`, and of compilation."""
    compiled, compile_seconds = _compile(function, *arguments)

    def run():
        for _ in range(calls):
            result = compiled(*arguments)
        return result

    _seconds(run)  # warm-up
    return statistics.median(_seconds(run) for _ in range(WINDOWS)) / calls, compile_seconds


def _compile(function, *arguments):
    """Compiles a jitted function, so that no window includes it; returns it and the seconds."""
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def _seconds(run):
    """Returns the seconds that run() takes."""
    began = time.perf_counter()
    jax.block_until_ready(run())  # JAX returns before the devices are done
    return time.perf_counter() - began


def _synthetic_batches(program):
    """Returns an iterator that repeats one random batch, in device memory."""
    config = program.config
    rng = np.random.default_rng(0)
    rows = len(sharding.local_rows(program.mesh, config.batch_size))
    batch = latents.build(config).make_batch(rows, rng)
    batch |= conditions.build(config).make_batch(rows, rng)
    return itertools.repeat(sharding.put_batch(program.mesh, batch))


def _real_batches(program, source):
    """Yields the config's training batches, on the devices."""
    rows = sharding.local_rows(program.mesh, program.config.batch_size)
    for batch in loader.TrainIterator(source, program.config, rows):
        yield sharding.put_batch(program.mesh, batch)


def _speed(seconds, images, gflops_per_image, unit, dtype):
    """Returns time, rates and MFU; MFU is None if the device's peak in `dtype` is not known."""
    device = jax.devices()[0].device_kind
    peak = PEAK_TFLOPS.get(device) if dtype == "bfloat16" else None
    tflops = images * gflops_per_image / 1e3 / seconds
    return {
        f"ms_per_{unit}": 1e3 * seconds,
        "img_per_s": images / seconds,
        "tflop_per_s": tflops,
        "mfu": tflops / (peak * jax.device_count()) if peak else None,
    }


def _identity(mesh, model, config, compile_seconds):
    """Returns what a measured number depends on: the device, the versions, the model's settings."""
    memory = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in memory if stats]
    return {
        "peak_memory_gib": max(peaks) / 2**30 if peaks else None,  # CPUs have no such statistics
        "compile_seconds": compile_seconds,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "params": models.count(config)["params"],
        "batch_size": config.batch_size,
        "grad_accumulation_steps": config.grad_accumulation_steps,
        **{name: getattr(model, name) for name in MODEL_SETTINGS if hasattr(model, name)},
    }


# What can be measured: the function, and the flags that are its arguments.
BENCHMARKS = {
    "train": (bench_train, ("config", "steps", "data")),
    "loop": (bench_loop, ("config", "steps")),
    "sample": (bench_sample, ("config", "steps", "batch_size")),
    "vae": (bench_vae, ("config", "steps", "batch_size")),
    "inception": (bench_inception, ("steps", "batch_size", "image_size", "dtype")),
    "metrics": (bench_metrics, ("num",)),
}


def main(words):
    if not words or words[0] not in BENCHMARKS:
        raise UserError(f"say what to measure: one of {', '.join(BENCHMARKS)}, not {words}.")
    function, names = BENCHMARKS[name := words[0]]
    # A flag of another measurement would silently change nothing.
    others = {flag for _, flags_of in BENCHMARKS.values() for flag in flags_of} - {*names}
    if useless := sorted(f"--{flag}" for flag in others if FLAGS[flag].present):
        hint = "of a --config set --config.KEY instead" if "config" in names else "see --help"
        raise UserError(f"{name} takes no {', '.join(useless)}; {hint}.")
    if "config" in names:
        _prepare(FLAGS.config, name)
    row = function(**{flag: FLAGS[flag].value for flag in names})
    if FLAGS.json:
        print(json.dumps(row))
        return
    for part, values in row.items() if name == "vae" else [("", row)]:
        for key, value in values.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{f'{part} {key}'.strip():28} {shown}")


def _prepare(config, name):
    """Checks that a config has a model for the benchmark `name`, which needs no trained files."""
    if config is None:
        raise UserError(f"{name} measures the model of --config FILE[:ARG], which is missing.")
    if (config.model.name == "vae") != (name == "vae") and name != "train":
        raise UserError(f"{name} does not measure the model {config.model.name!r} of --config.")
    # Scale and shift from the data make no difference to speed, nor do the weights.
    if not config.latents.get("scale", True):
        config.latents.update(scale=(1.0,), shift=(0.0,))
    config.init_from = ""


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer(
        "steps", 20, "Optimizer steps or batches per window, or sampling steps.", 1
    )
    flags.DEFINE_integer(
        "batch_size", 64, "sample, vae, inception: images at a time, all devices.", 1
    )
    text = "inception: pixels before its resize, a number or HxW."
    flags.DEFINE(parsers.SizeParser(), "image_size", "256", text)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "inception: of the activations.")
    flags.DEFINE_integer("num", 50_000, "metrics: synthetic samples.", 1)
    flags.DEFINE_bool("data", False, "train: read the config's data instead of synthetic.")
    flags.DEFINE_bool("json", False, "Print one line of JSON.")
    cli.run(main, "NAME")
