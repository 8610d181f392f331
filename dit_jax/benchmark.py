"""Measures the speed of training, its loop, sampling, a VAE, Inception and the metrics.

  python -m dit_jax.benchmark train  --config configs/imagenet256.py:DiT-XL/2 --steps 20 --json
  python -m dit_jax.benchmark loop   --config configs/digits.py --steps 200
  python -m dit_jax.benchmark sample --config configs/digits.py --steps 20
  python -m dit_jax.benchmark vae    --config configs/vae_imagenet256.py --batch_size 16
  python -m dit_jax.benchmark inception --batch_size 64 --dtype float32
  python -m dit_jax.benchmark metrics --num 50000

The result is printed as lines of text, or as JSON with --json. A window is a number of steps that
are timed together. A time is the median of three windows, after a warm-up. The batch is synthetic
and stays in device memory; with --data, `train` reads the config's data instead. TFLOP/s and MFU
use the multiply-adds that `dit_jax.flops` counts.

`loop` compares the bare step with `train_and_evaluate` on the config's data, without evaluation,
pictures and checkpoints. Its result is the median of 11 windows. `metrics` times each measure once,
on random features, by default for as many images as FID-50K has.
"""

import functools
import itertools
import json
import math
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
from dit_jax.evaluation import measures, metrics, references
from dit_jax.sampling import generate
from dit_jax.system import stopping
from dit_jax.training import initial_state, programs

FLAGS = flags.FLAGS
NUM_WINDOWS = 3  # the median of their times is reported
NUM_LOOP_WINDOWS = 11  # more, because the loop's overhead is small and machines drift
MODEL_FIELDS = ("block", "dtype", "attention", "scan_unroll", "remat")  # reported if a model has it
MAX_REFERENCE_FEATURES = 10_000  # of the ADM evaluator, for precision and recall

# Dense bf16 peak in TFLOP/s by device_kind, from the vendors' data sheets. Other form factors
# (PCIe, NVL) have other names and other peaks. For an unknown name, no MFU is reported.
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
    """Times the jitted step in windows of `steps`, on the config's data or on synthetic data."""
    program = programs.make_program(config)
    time_window, compile_seconds = _make_window_timer(program, steps, data)
    time_window()  # warm-up
    seconds = statistics.median(time_window() for _ in range(NUM_WINDOWS)) / steps
    gflops_per_image = models.count(config)["train_gflops_per_image"]
    return {
        **_speed(seconds, config.batch_size, gflops_per_image, "step", program.model.dtype),
        "data": "real" if data else "synthetic",
        **_describe_run(program.mesh, program.model, config, compile_seconds),
    }


def bench_loop(config: ConfigDict, steps: int) -> dict:
    """Measures how much longer a step in the loop takes than the bare jitted step, in percent.

    Windows of the loop and of the bare step alternate, so that a drift in the machine's speed
    affects both. The time of a loop window is divided by the mean of the bare windows before and
    after it. The result is the median of these ratios.
    """
    # Without evaluation, pictures and checkpoints. The learning rate must be constant, because
    # total_steps grows with each window below.
    with config.unlocked():
        config.update(log_every_steps=steps, checkpoint_every_steps=10**9)
        config.update(eval_every_steps=0, sample_every_steps=0)
        config.optim.update(schedule="constant", warmup_steps=0)
    program = programs.make_program(config)
    time_window, compile_seconds = _make_window_timer(program, steps, real_data=False)
    time_window()  # warm-up
    bare_ms, loop_ms = [1e3 * time_window() / steps], []
    with tempfile.TemporaryDirectory() as workdir:
        workdir = pathlib.Path(workdir)
        for i in range(NUM_LOOP_WINDOWS):
            # The run resumes for two windows: a warm-up, and a measured one.
            config.total_steps = 2 * steps * (i + 1)
            try:
                train.train_and_evaluate(config, workdir)
            except stopping.Stopped as stopped:
                # The loop's message names the workdir, which is removed here. So it is dropped.
                raise stopping.Stopped(stopped.number) from None
            report = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
            loop_ms.append(1e3 * config.batch_size / report["img_per_s"])
            bare_ms.append(1e3 * time_window() / steps)
    neighbours_ms = [statistics.mean(pair) for pair in itertools.pairwise(bare_ms)]
    ratios = [loop / bare for loop, bare in zip(loop_ms, neighbours_ms, strict=True)]
    return {
        "loop_overhead_percent": 100 * (statistics.median(ratios) - 1),
        "loop_ms_per_step": loop_ms,
        "bare_ms_per_step": bare_ms,
        **_describe_run(program.mesh, program.model, config, compile_seconds),
    }


def _make_window_timer(program, steps, real_data):
    """Returns (time_window, compile seconds); time_window() times `steps` steps, in seconds."""
    config, mesh = program.config.copy_and_resolve_references(), program.mesh
    key = jax.random.key(config.seed)
    state = initial_state.new_state(program, key)
    source = latents.open_split(config, "train") if real_data else None
    batches = _real_batches(program, source) if real_data else _synthetic_batches(program)
    latent_kind = latents.build(config)
    if latent_kind.uses_vae and not latent_kind.encodes:
        config.latents.vae = ""  # no step uses the VAE, so its workdir need not exist
    _, frozen = program.task.load_frozen(config, mesh, {})
    frozen = frozen.with_records(program.config, mesh, source) if source else frozen
    step_arguments = state, next(batches), key, frozen
    step, compile_seconds = _compile(programs.compile_train_step(program), *step_arguments)

    def run_window():
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, next(batches), key, frozen)
        return state

    return functools.partial(_time_call, run_window), compile_seconds


def bench_sample(config: ConfigDict, steps: int, batch_size: int) -> dict:
    """Times the sampling of one batch in `steps` steps; other settings are in config.sample."""
    with config.unlocked():
        config.sample.steps = steps
    program = programs.make_program(config)
    sharding.check_batch_size(program.mesh, batch_size)
    # Sampling needs parameters, but no optimizer state and no EMA.
    params = jax.jit(
        program.task.init_params,
        out_shardings=program.shardings.params,
    )(jax.random.key(config.seed))
    sampler_arguments = config.sample, program.task.process, config.objective.prediction
    sample = generate.make_sample_fn(program.model, *sampler_arguments, program.mesh)
    index = np.arange(batch_size, dtype=np.int32)
    condition = conditions.build(config)
    host_batch = {"index": index, **condition.make_example(batch_size).rows(index)}
    batch = sharding.put_batch(program.mesh, host_batch)
    encoder = condition.load_encoder(program.mesh)
    arguments = params, jax.random.key(0), batch["index"], batch["cond"], batch["null"], encoder
    seconds, compile_seconds = _time_function(sample, arguments)
    # A guided step is two passes through the network.
    num_passes = generate.count_forward_passes(*sampler_arguments)
    gflops_per_image = models.count(config)["gflops"] * num_passes
    return {
        "ms_per_sampler_step": 1e3 * seconds / steps,
        **_speed(seconds, batch_size, gflops_per_image, "batch", program.model.dtype),
        **_describe_run(program.mesh, program.model, config, compile_seconds),
        "batch_size": batch_size,
        "sample": config.sample.to_dict(),
    }


def bench_vae(config: ConfigDict, steps: int, batch_size: int) -> dict[str, dict]:
    """Times the encoding and the decoding of one batch, in windows of `steps` batches."""
    program = programs.make_program(config)
    model, mesh = program.model, program.mesh
    vae = latents.Vae(_init_params(model, mesh), model, digest="")
    image_shape = sizes.image_shape(config.data)
    images = _random_batch(mesh, (batch_size, *image_shape), np.uint8)
    x_0 = _random_batch(mesh, (batch_size, *model.latent_shape(image_shape)), np.float32)
    unscaled = ConfigDict(dict(scale=(1.0,), shift=(0.0,)))
    functions = {
        "encode": (jax.jit(lambda vae, x: latents.encode_in_groups(vae, x, mesh)), images),
        "decode": (latents.make_decode_fn(unscaled, mesh), x_0),
    }
    counts, results = models.count(config), {}
    for name, (function, x) in functions.items():
        seconds, compile_seconds = _time_function(function, (vae, x), steps)
        results[name] = {
            # A multiply-add is two FLOPs.
            **_speed(seconds, batch_size, 2 * counts[f"{name}_gmacs"], "batch", model.dtype),
            **_describe_run(mesh, model, config, compile_seconds),
            "batch_size": batch_size,
            "image_size": sizes.simplify(config.data.image_size),
        }
    return results


def bench_inception(steps: int, batch_size: int, image_size: sizes.Size, dtype: str) -> dict:
    """Times the extraction of one batch's features, in windows of `steps` batches."""
    config = ConfigDict({"model": {"name": "inception", "dtype": dtype}})
    config.update(batch_size=batch_size, grad_accumulation_steps=1)
    model = models.build(config.model)
    # All devices share the batch, and every device has all parameters.
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)))
    params = _init_params(model, mesh)
    shape = batch_size, *sizes.sides(image_size), 3
    images = _random_batch(mesh, shape, np.uint8)
    extract = jax.jit(lambda params, images: model.apply({"params": params}, images))
    seconds, compile_seconds = _time_function(extract, (params, images), steps)
    gflops_per_image = models.count(config)["gflops"]
    return {
        **_speed(seconds, batch_size, gflops_per_image, "batch", dtype),
        **_describe_run(mesh, model, config, compile_seconds),
        "gflops_per_image": gflops_per_image,
        "image_size": image_size,
        "precision": "highest" if dtype == "float32" else "default",  # `layers.product_precision`
    }


def _init_params(model, mesh):
    """Returns initial parameters, replicated on all devices; trained ones are no faster."""
    init = functools.partial(models.init_params, model)
    return jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))


def _random_batch(mesh, shape, dtype):
    """Returns a batch of random images (uint8) or latents (float32) in device memory."""
    sharding.check_batch_size(mesh, shape[0])
    rng = np.random.default_rng(0)
    local_shape = len(sharding.local_rows(mesh, shape[0])), *shape[1:]
    is_image = dtype == np.uint8
    draw = functools.partial(rng.integers, 0, 256) if is_image else rng.standard_normal
    return sharding.put_batch(mesh, {"x": draw(local_shape, dtype)})["x"]


def bench_metrics(num: int) -> dict:
    """Times each measure once, on the synthetic features of `num` samples."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, 2048), np.float32) / 8

    def draw_features(num_images):
        """Returns features [num_images, 2048], correlated and not negative, like Inception's."""
        features = rng.standard_normal((num_images, 2048), np.float32)
        for part in np.array_split(features, math.ceil(num_images / 5000)):  # bounds the memory
            part += rng.standard_normal((len(part), 64), np.float32) @ mix
            np.maximum(part, 0, out=part)
        return features

    samples = draw_features(num)
    reference = draw_features(min(num, MAX_REFERENCE_FEATURES))
    # Only array sizes affect speed, so probabilities and spatial features are taken from `samples`.
    probabilities = np.exp(samples[:, :1000])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    extracted = {"features": samples, "spatial": samples[:, :2023], "probabilities": probabilities}
    pooled = metrics.fit_gaussian(reference)
    spatial = metrics.Gaussian(pooled.mean[:2023], pooled.covariance[:2023, :2023], pooled.n)
    gaussians = {"features": pooled, "spatial": spatial}
    extractor, source = {"name": "inception"}, {"num_images": len(reference)}
    arguments = extractor, source, gaussians, reference, None
    inputs = measures.Inputs(extracted, references.Reference(*arguments))
    seconds = {}
    for name, measure in measures.MEASURES.items():
        began = time.perf_counter()
        # A measure that Inception's features do not have computes nothing.
        if measure.compute and measure.compute(inputs):
            seconds[f"{name}_seconds"] = time.perf_counter() - began
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


def _time_function(function, arguments, num_calls=1):
    """Returns the seconds of a call, timed in windows of `num_calls`, and of the compilation."""
    compiled, compile_seconds = _compile(function, *arguments)

    def run_window():
        for _ in range(num_calls):
            result = compiled(*arguments)
        return result

    _time_call(run_window)  # warm-up
    seconds = statistics.median(_time_call(run_window) for _ in range(NUM_WINDOWS)) / num_calls
    return seconds, compile_seconds


def _compile(function, *arguments):
    """Compiles a jitted function; returns (compiled function, seconds of the compilation)."""
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def _time_call(function):
    """Returns the seconds that function() takes."""
    began = time.perf_counter()
    jax.block_until_ready(function())  # function() returns before the devices are done
    return time.perf_counter() - began


def _synthetic_batches(program):
    """Returns an iterator that repeats one random batch, in device memory."""
    config = program.config
    rng = np.random.default_rng(0)
    num_rows = len(sharding.local_rows(program.mesh, config.batch_size))
    batch = latents.build(config).make_batch(num_rows, rng)
    batch |= conditions.build(config).make_batch(num_rows, rng)
    return itertools.repeat(sharding.put_batch(program.mesh, batch))


def _real_batches(program, source):
    """Yields the training batches of the config's data, in device memory."""
    local_rows = sharding.local_rows(program.mesh, program.config.batch_size)
    for batch in loader.TrainIterator(source, program.config, local_rows):
        yield sharding.put_batch(program.mesh, batch)


def _speed(seconds, num_images, gflops_per_image, unit, dtype):
    """Returns time, rates and MFU; MFU is None if the device's peak for `dtype` is unknown."""
    device = jax.devices()[0].device_kind
    peak = PEAK_TFLOPS.get(device) if dtype == "bfloat16" else None
    tflops = num_images * gflops_per_image / 1e3 / seconds
    return {
        f"ms_per_{unit}": 1e3 * seconds,
        "img_per_s": num_images / seconds,
        "tflop_per_s": tflops,
        "mfu": tflops / (peak * jax.device_count()) if peak else None,
    }


def _describe_run(mesh, model, config, compile_seconds):
    """Returns memory, compile time, devices, versions, and the fields that affect speed."""
    memory_stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in memory_stats if stats]
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
        **{name: getattr(model, name) for name in MODEL_FIELDS if hasattr(model, name)},
    }


# Each name on the command line has a function, and the flags that are the function's arguments.
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
    name = words[0]
    function, own_flags = BENCHMARKS[name]
    # A flag of another benchmark would have no effect.
    all_flags = {flag for _, benchmark_flags in BENCHMARKS.values() for flag in benchmark_flags}
    if unused := sorted(f"--{flag}" for flag in all_flags - {*own_flags} if FLAGS[flag].present):
        way_out = "Set --config.KEY instead" if "config" in own_flags else "See --help"
        raise UserError(f"{name} takes no {', '.join(unused)}. {way_out}.")
    if "config" in own_flags:
        _prepare(FLAGS.config, name)
    result = function(**{flag: FLAGS[flag].value for flag in own_flags})
    if FLAGS.json:
        print(json.dumps(result))
        return
    # A VAE's result has two parts, "encode" and "decode".
    if name == "vae":
        result = {f"{part} {key}": v for part, row in result.items() for key, v in row.items()}
    for key, value in result.items():
        print(f"{key:28}", f"{value:.4g}" if isinstance(value, float) else value)


def _prepare(config, name):
    """Checks the config's model, and changes the config so that no trained files are needed."""
    if config is None:
        raise UserError(f"--config is missing: {name} measures the model of --config FILE[:ARG].")
    is_vae = config.model.name == "vae"
    if (name == "vae" and not is_vae) or (name in ("loop", "sample") and is_vae):
        raise UserError(f"{name} does not measure the model {config.model.name!r} of --config.")
    # Speed does not depend on the values of scale, shift and weights.
    if not config.latents.get("scale", True):
        config.latents.update(scale=(1.0,), shift=(0.0,))
    config.init_from = ""


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer(
        "steps", 20, "Optimizer steps or batches in a window; sample: sampling steps.", 1
    )
    flags.DEFINE_integer(
        "batch_size", 64, "sample, vae, inception: images at a time, on all devices together.", 1
    )
    image_size_help = "inception: pixels before the resize, a number or HxW."
    flags.DEFINE(parsers.SizeParser(), "image_size", "256", image_size_help)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "inception: dtype of activations."
    )
    flags.DEFINE_integer("num", 50_000, "metrics: synthetic samples.", 1)
    flags.DEFINE_bool("data", False, "train: read the config's data instead of a synthetic batch.")
    flags.DEFINE_bool("json", False, "Print one line of JSON.")
    cli.run(main, "NAME")
