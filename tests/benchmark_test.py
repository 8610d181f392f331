"""The rows are consistent in themselves; how fast it is no test asks."""

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import default
from dit_jax import benchmark
from dit_jax.training import programs


@pytest.mark.slow
def test_benchmarks_say_what_they_measured(run_command):
    flags = ["--config", "configs/smoke.py", "--json"]
    row = json.loads(run_command("benchmark", "train", *flags, "--steps", 2))
    assert row["img_per_s"] == pytest.approx(16e3 / row["ms_per_step"])
    assert row["tflop_per_s"] > 0
    assert (row["device"], row["data"], row["attention"]) == ("cpu", "synthetic", "xla")
    row = json.loads(run_command("benchmark", "sample", *flags, "--steps", 3, "--batch_size", 8))
    assert row["ms_per_batch"] == pytest.approx(3 * row["ms_per_sampler_step"])
    assert row["batch_size"] == 8


@pytest.mark.slow
def test_config_whose_scale_the_moments_record_is_timed(run_command):
    flags = ["--config", "configs/digits_latents.py", "--json", "--steps", 2]
    row = json.loads(run_command("benchmark", "train", *flags, "--config.batch_size=8"))
    assert row["batch_size"] == 8


@pytest.mark.parametrize("condition", ["tokens", "context", "stored"])
def test_synthetic_batches_have_captions(captioned_config, clip_dir, condition):
    """As the model reads them: a step on one has a loss."""
    config = captioned_config
    config.model.condition = "tokens" if condition == "tokens" else "context"
    config.text.update(encoder=str(clip_dir), stored=condition == "stored")
    if condition == "stored":
        config.latents.update(source="moments", scale=(1.0,), shift=(0.0,))
        config.sample_every_steps = 0
    program = programs.make_program(config, jax.devices()[:1])
    batch = next(benchmark._synthetic_batches(program))
    if condition == "stored":
        assert batch["context"].shape == (16, 12, 16)
    _, frozen = program.task.load_frozen(config, program.mesh, {})
    arguments = program.state, batch, jax.random.key(0), frozen
    step = functools.partial(programs.train_step, program=program)
    _, scalars = jax.eval_shape(step, *arguments)
    assert scalars["loss"].shape == ()


def test_models_without_classes_are_timed(smoke_config):
    config = smoke_config
    config.model = default.get_config("unet").model
    config.model.update(input_size=8, in_channels=1, base_channels=8, norm_groups=4, head_dim=8)
    config.model.update(channel_mult=(1,), blocks_per_level=1, attention_levels=())
    config.model.update(num_classes=0, null_condition=False)
    config.sample.cfg_scale = 1.0
    program = programs.make_program(config)
    batch = next(benchmark._synthetic_batches(program))
    assert not np.any(batch["label"])
    row = benchmark.bench_sample(config, 2, 8)
    assert (row["batch_size"], row["img_per_s"] > 0) == (8, True)


@pytest.mark.slow
def test_benchmark_of_a_vae_times_both_halves(run_command):
    flags = ["--config", "configs/vae_digits.py", "--json", "--steps", 2, "--batch_size", 8]
    rows = json.loads(run_command("benchmark", "vae", *flags))
    for row, gmacs in ((rows["encode"], 0.00119808), (rows["decode"], 0.002567424)):
        assert row["img_per_s"] == pytest.approx(8e3 / row["ms_per_batch"])
        assert row["tflop_per_s"] == pytest.approx(2e-3 * gmacs * row["img_per_s"])
        assert (row["image_size"], row["batch_size"], row["params"]) == (8, 8, 158_805)
    error = run_command("benchmark", "vae", "--config", "configs/smoke.py", fails=True)
    assert "error: vae does not measure the model 'dit'" in error


@pytest.mark.slow
def test_benchmark_of_inception_needs_no_config(run_command):
    flags = ["--batch_size", 2, "--steps", 1, "--image_size", 20, "--json"]
    row = json.loads(run_command("benchmark", "inception", *flags))
    assert row["img_per_s"] == pytest.approx(2e3 / row["ms_per_batch"])
    assert row["tflop_per_s"] == pytest.approx(2e-3 * 5.71323248 * row["img_per_s"])
    assert (row["dtype"], row["precision"], row["image_size"]) == ("float32", "highest", 20)
    assert (row["device"], row["batch_size"], row["params"]) == ("cpu", 2, 23_832_736)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae"], "--config is missing: vae measures the model of --config FILE[:ARG]."),
        (["inception", "--config", "configs/smoke.py"], "inception takes no --config. See --help."),
        (
            ["train", "--config", "configs/smoke.py", "--batch_size=8", "--dtype=bfloat16"],
            "train takes no --batch_size, --dtype. Set --config.KEY instead.",
        ),
        (
            ["dit"],
            "say what to measure: one of train, loop, sample, vae, inception, metrics, not ['dit']",
        ),
    ],
)
def test_wrong_benchmarks_end_in_a_message(run_command, arguments, message):
    error = run_command("benchmark", *arguments, fails=True)
    assert error.startswith(f"error: {message}")


@pytest.mark.slow
def test_benchmark_of_metrics_needs_no_config(run_command):
    row = json.loads(run_command("benchmark", "metrics", "--num", 1000, "--json"))
    assert (row["num"], row["reference"], row["device"]) == (1000, 1000, "cpu")
    names = ("fid", "sfid", "inception_score", "precision", "kid")  # recall comes with precision
    assert all(row[f"{name}_seconds"] > 0 for name in names)
    assert len([name for name in row if name.endswith("_seconds")]) == len(names)
    assert 0.1 < row["peak_host_memory_gib"] < 4


def test_mfu_is_of_the_peak_of_this_card_in_bfloat16_alone(monkeypatch):
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(benchmark.jax, "devices", lambda: [device])
    monkeypatch.setattr(benchmark.jax, "device_count", lambda: 2)
    row = benchmark._speed(1.0, 100, 989.0, "step", "bfloat16")
    assert row["tflop_per_s"] == pytest.approx(98.9)
    assert row["mfu"] == pytest.approx(0.05)
    assert benchmark._speed(1.0, 100, 989.0, "step", "float32")["mfu"] is None
    device.device_kind = "NVIDIA H100 PCIe"
    assert benchmark._speed(1.0, 100, 989.0, "step", "bfloat16")["mfu"] is None


@pytest.mark.slow
def test_benchmarks_of_real_data_and_of_the_loop(run_command, digits_dir):
    flags = ["--config", "configs/smoke.py", f"--config.data.data_dir={digits_dir}", "--json"]
    assert (
        json.loads(run_command("benchmark", "train", *flags, "--steps", 5, "--data"))["data"]
        == "real"
    )
    row = json.loads(run_command("benchmark", "loop", *flags, "--steps", 5))
    bare = np.array(row["bare_ms_per_step"])
    ratios = np.array(row["loop_ms_per_step"]) / ((bare[:-1] + bare[1:]) / 2)
    assert len(ratios) == 11
    assert row["loop_overhead_percent"] == pytest.approx(100 * (np.median(ratios) - 1))
