"""Bits per dimension of a run's held-out images, and the command that measures them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from helpers.close import assert_close

from dit_jax import diffusion, latents, models, sharding
from dit_jax.data import loader
from dit_jax.diffusion import samplers
from dit_jax.evaluation import bits_per_dim, rows
from dit_jax.sampling import runs
from dit_jax.workdirs import checkpoint


def make_model(config, num_devices=8):
    """Returns a `Trained` with random parameters, which predict other values than 0."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
    model = models.build(config.model)
    params = jax.device_put(random_params(model, spread=0.1), sharding.replicated(mesh))
    process = diffusion.build(config.diffusion)
    return runs.Trained(config, 0, False, mesh, model, process, params, to_image=None)


def set_flow(config):
    """Changes a config to process flow, and returns it."""
    config.diffusion.process = "flow"
    config.objective.prediction = "u"
    config.model.learn_sigma = False
    return config


@pytest.fixture
def bits_of_images(monkeypatch, tmp_path):
    """A function (trained, num, batch_size, ...) that returns a row and the bits of each image."""
    collected = []
    make = bits_per_dim.make_bits_fn

    def spy(*arguments):
        bits_fn = make(*arguments)

        def collect(*arguments):
            values = bits_fn(*arguments)
            collected.append(np.asarray(values[""]))
            return values

        return collect

    def measure(trained, num, batch_size=None, **options):
        collected.clear()
        monkeypatch.setattr(rows, "get_git_revision", lambda: "-dirty")  # always measured again
        row = bits_per_dim.evaluate(trained, tmp_path, num, batch_size=batch_size, **options)
        return row, np.concatenate(collected)[:num]

    monkeypatch.setattr(bits_per_dim, "make_bits_fn", spy)
    return measure


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vlb", "latents"])
def test_bits_of_an_image_do_not_depend_on_its_batch(
    smoke_config, bits_of_images, moments_dir, vae_dir, kind
):
    config = smoke_config if kind == "vlb" else set_flow(smoke_config)
    config.model.depth = 1
    if kind == "latents":
        config.latents.update(source="moments", moments=str(moments_dir), vae=str(vae_dir))
        config.latents.update(scale=(1.0,), shift=(0.0,))
        config.model.update(input_size=4, in_channels=2)
    row, actual = bits_of_images(make_model(config), 12, steps=2)
    name = "bits_per_latent_dim" if kind == "latents" else "bits_per_dim"
    assert {key for key in row if key.startswith("bits")} - {f"{name}_prior"} == (
        {name, f"{name}_standard_error"} | ({f"{name}_first_level"} if kind == "vlb" else set())
    )
    assert_close(row[name], actual.mean(), 1e-5)
    assert_close(row[f"{name}_standard_error"], actual.std(ddof=1) / 12**0.5, 1e-5)
    assert len(np.unique(actual)) == 12
    _, in_batches = bits_of_images(make_model(config, 1), 12, 5, steps=2)
    assert_close(in_batches, actual, 2e-5)
    _, other_seed = bits_of_images(make_model(config, 1), 12, 5, seed=1, steps=2)
    assert (np.abs(other_seed - actual) > 1e-4 * np.abs(actual)).all()


def test_images_are_spread_over_a_split_that_may_be_small(smoke_config, bits_of_images):
    trained = make_model(set_flow(smoke_config), 1)
    trained.config.data.eval_split = "test[:10]"
    row, actual = bits_of_images(trained, 1000, steps=1)
    assert row["likelihood"]["num"] == len(actual) == 10
    error = actual.std(ddof=1, dtype=np.float64) / 10**0.5
    assert row["bits_per_dim_standard_error"] == pytest.approx(error, rel=1e-6)
    _, half = bits_of_images(trained, 5, steps=1)
    assert_close(half, actual[::2], 1e-5)


def compute_bound(images, x_ts, outputs, alpha_bars, clip):
    """Returns bits per dimension [B] as guided-diffusion computes them, with a learned variance.

    Args: x_ts [B, 8, 8, 1], outputs of the network [B, 8, 8, 2] and alpha_bars of all steps, with
      the noisiest step first.
    """
    x_0, nats = images / 127.5 - 1, np.zeros(len(images))
    following = np.append(alpha_bars[1:], 1.0)
    betas = 1 - alpha_bars / following
    variances = betas * (1 - following) / (1 - alpha_bars)
    variances[-1] = variances[-2]
    for x_t, output, alpha_bar, next_alpha_bar, beta, variance in zip(
        x_ts, outputs, alpha_bars, following, betas, variances, strict=True
    ):
        eps, learned = output[..., :1], (output[..., 1:] + 1) / 2
        x_0_hat = (x_t - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
        if clip:
            x_0_hat = np.clip(x_0_hat, -1, 1)
        x_0_coef = np.sqrt(next_alpha_bar) * beta / (1 - alpha_bar)
        x_t_coef = np.sqrt(alpha_bar / next_alpha_bar) * (1 - next_alpha_bar) / (1 - alpha_bar)
        mean, mean_hat = (x_0_coef * x + x_t_coef * x_t for x in (x_0, x_0_hat))
        log_hat = learned * np.log(beta) + (1 - learned) * np.log(variance)
        if next_alpha_bar < 1:
            error = (mean - mean_hat) ** 2 * np.exp(-log_hat)
            ratio = np.log(variance) - log_hat
            loss = 0.5 * (-1 - ratio + np.exp(ratio) + error)
        else:
            z = [(x_0 - mean_hat + side / 255) * np.exp(-log_hat / 2) for side in (-1, 1)]
            low, high = (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)) for a in z)
            low, high = np.where(x_0 < -0.999, 0, low), np.where(x_0 > 0.999, 1, high)
            loss = -np.log(np.maximum(high - low, 1e-12))
        nats += loss.mean(axis=(1, 2, 3))
    noise = 1 - alpha_bars[0]
    prior = 0.5 * (-1 - np.log(noise) + noise + alpha_bars[0] * x_0**2)
    return (nats + prior.mean(axis=(1, 2, 3))) / np.log(2)


@pytest.mark.parametrize("clip", [True, False])
def test_bound_equals_guided_diffusion_s_and_follows_clip_x_0(smoke_config, clip):
    smoke_config.sample.clip_x_0 = clip
    trained = make_model(smoke_config, 1)
    source = latents.open_split(smoke_config, "eval")
    batch = loader.gather(source, [0, 1, 2]) | {"index": np.arange(3, dtype=np.int32)}
    key = jax.random.key(5)
    times = samplers.grids.build(trained.process, 4)
    alpha_bars = trained.process.alpha(times[:-1]) ** 2
    x_0, x_ts, outputs = batch["image"] / 127.5 - 1, [], []
    apply = jax.jit(trained.model.apply)
    for i, t in enumerate(times[:-1]):
        keys = [jax.random.fold_in(jax.random.fold_in(key, n), i + 1) for n in range(3)]
        noise = np.stack([jax.random.normal(k, x_0.shape[1:]) for k in keys])
        x_t = np.sqrt(alpha_bars[i]) * x_0 + np.sqrt(1 - alpha_bars[i]) * noise
        time = jnp.full(3, 1000 * t - 1, jnp.float32)
        arguments = jnp.asarray(x_t, jnp.float32), time, jnp.asarray(batch["label"])
        outputs.append(np.asarray(apply({"params": trained.params}, *arguments)))
        x_ts.append(x_t)
    expected = compute_bound(batch["image"], x_ts, outputs, alpha_bars, clip)
    other = compute_bound(batch["image"], x_ts, outputs, alpha_bars, not clip)
    assert (np.abs(other - expected) > 0.01 * expected).all()
    batch = sharding.put_batch(trained.mesh, batch)
    bits_fn = bits_per_dim.make_bits_fn(trained, 4)
    assert_close(bits_fn(trained.params, {}, key, batch)[""], expected, 1e-4)


@pytest.fixture
def latent_config(smoke_config):
    """A config for a model of latents."""
    smoke_config.latents.update(source="moments", scale=(1.0,), shift=(0.0,))
    smoke_config.model.update(input_size=4, in_channels=2)
    return smoke_config


def measure_latents(trained, seed=0):
    """Returns the bits of three latents whose posterior has no deviation, and their x_0."""
    mean = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float16)
    moments = np.concatenate([mean, np.full_like(mean, -30)], axis=-1)
    batch = {"moments": moments, "label": np.arange(3, dtype=np.int32)}
    batch = sharding.put_batch(trained.mesh, batch | {"index": np.arange(3, dtype=np.int32)})
    actual = bits_per_dim.make_bits_fn(trained, 2)(trained.params, {}, jax.random.key(seed), batch)
    return {name: np.asarray(value) for name, value in actual.items()}, mean.astype(np.float64)


def test_first_level_of_latents_is_a_density(latent_config):
    """A network of zeros errs in x_0 by the noise of x_t; its log variance is the bounds' mean."""
    trained = make_model(latent_config, 1)
    trained = dataclasses.replace(trained, params=jax.tree.map(jnp.zeros_like, trained.params))
    actual, x_0 = measure_latents(trained)
    times = samplers.grids.build(trained.process, 2)
    alpha, sigma = trained.process.alpha(times[1]), trained.process.sigma(times[1])
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), n), 2) for n in range(3)]
    error = sigma / alpha * np.stack([jax.random.normal(k, x_0.shape[1:]) for k in keys])
    table = trained.process.posterior(times[:-1], times[1:])
    log_variance = (table.log_beta[1] + table.log_variance[1]) / 2
    nats = 0.5 * (np.log(2 * np.pi) + log_variance + error**2 / np.exp(log_variance))
    expected = nats.mean(axis=(1, 2, 3)) / np.log(2)
    assert_close(actual["_first_level"], expected, 1e-3)


def test_seed_of_a_flow_draws_its_probe(latent_config):
    """Latents without deviation have no other randomness: they have no bins."""
    trained = make_model(set_flow(latent_config), 1)
    bits, other_bits = (measure_latents(trained, seed)[0][""] for seed in (0, 1))
    assert (np.abs(bits - other_bits) > 1e-4 * np.abs(bits)).all()


def test_flow_uses_the_clipped_denoiser_if_samples_are_clipped(smoke_config, bits_of_images):
    trained = make_model(set_flow(smoke_config), 1)
    _, plain = bits_of_images(trained, 3, steps=2)
    trained.config.sample.clip_x_0 = True
    row, clipped = bits_of_images(trained, 3, steps=2)
    assert row["likelihood"]["clip_x_0"] is True
    assert (np.abs(clipped - plain) > 1e-3 * np.abs(plain)).all()


def test_rows_record_whether_x_0_is_clipped(smoke_config, tmp_path, monkeypatch):
    """Older versions did not record it and never clipped, so their rows are measured again."""
    monkeypatch.setattr(rows, "get_git_revision", lambda: "abc")
    trained = make_model(smoke_config, 1)
    trained.config.sample.clip_x_0 = True
    clipped = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    assert clipped["likelihood"]["clip_x_0"] is True
    older = clipped | {"likelihood": {k: v for k, v in clipped["likelihood"].items()}}
    del older["likelihood"]["clip_x_0"]
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(older | {"bits_per_dim": 1.0}) + "\n")
    assert bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2) == clipped
    trained.config.sample.clip_x_0 = False
    plain = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    assert plain["likelihood"]["clip_x_0"] is False
    assert plain["bits_per_dim"] > 1.01 * clipped["bits_per_dim"]


def test_bits_of_other_images_are_measured_again(smoke_config, tmp_path, monkeypatch):
    """A row tells held-out images apart even if training did not record them."""
    monkeypatch.setattr(rows, "get_git_revision", lambda: "abc")
    trained = make_model(smoke_config, 1)
    row = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    trained.config.data.eval_split = "test[:90]"
    other = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    assert row["likelihood"]["images"] != other["likelihood"]["images"]
    assert row["bits_per_dim"] != other["bits_per_dim"]
    trained.config.data.eval_split = "test"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits_per_dim, "_measure", None)  # the row is read back
        assert bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2) == row


def test_rows_record_whether_parameters_are_raw(smoke_config, bits_of_images):
    trained = make_model(smoke_config, 1)
    for raw in (False, True):
        row, _ = bits_of_images(dataclasses.replace(trained, raw=raw), 2, steps=2)
        assert row["likelihood"]["raw"] is raw


def test_impossible_requests_are_refused(smoke_config, tmp_path):
    trained = make_model(smoke_config)
    with pytest.raises(ValueError, match=r"cannot take 1 sampling steps"):
        bits_per_dim.evaluate(trained, tmp_path, steps=1)
    trained.params["x_embedder"]["bias"] *= np.nan
    with pytest.raises(FloatingPointError, match="bits_per_dim of 3 of 3 images is NaN"):
        bits_per_dim.evaluate(trained, tmp_path, num=3, steps=2)
    trained.config.data.eval_split = "test[:1]"
    with pytest.raises(ValueError, match="1 of 1 held-out images have no standard error"):
        bits_per_dim.evaluate(trained, tmp_path)
    trained.config.data.eval_split = ""
    with pytest.raises(ValueError, match=r"data.eval_split of .* is empty"):
        bits_per_dim.evaluate(trained, tmp_path)
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_command_measures_a_chain_once(run_command, workdir, monkeypatch):
    flags = "--workdir", workdir, "--bpd", "--num", 6, "--seed", 1
    out = run_command("evaluate", *flags)
    row = json.loads((workdir / "evaluations.jsonl").read_text())
    settings = dict(kind="vlb", steps=1000, num=6, seed=1, variance="learned")
    settings |= dict(clip_x_0=False, raw=False, images=row["likelihood"]["images"])
    assert row["likelihood"] == settings
    assert row["step"] == 40
    assert row["images_seen"] == 40 * 16
    assert row["gmacs"] > 0
    assert row["params"] > 0
    assert row["git_revision"]
    value, error = row["bits_per_dim"], row["bits_per_dim_standard_error"]
    assert out.startswith(f"bits_per_dim {value:.4f}  ")
    assert f"standard_error {error:.4f}" in out
    assert 0 < row["bits_per_dim_prior"] < 1e-3
    assert 0 < row["bits_per_dim_first_level"] < value
    current = {"git_revision": "abc", "matmul_precision": "highest"}  # set in conftest
    with (workdir / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(row | current) + "\n")
    monkeypatch.setattr(rows, "get_git_revision", lambda: "abc")
    monkeypatch.setattr(bits_per_dim.loader, "gather", None)  # the row is read back
    again = bits_per_dim.evaluate(runs.load(workdir), workdir, num=6, seed=1)
    assert again == row | current


def test_impossible_bits_are_not_written(workdir, monkeypatch):
    def make_bits_fn(*_):
        return lambda *_: {"": np.ones(6), "_prior": np.full(6, -1.0), "_first_level": np.ones(6)}

    monkeypatch.setattr(bits_per_dim, "make_bits_fn", make_bits_fn)
    with pytest.raises(FloatingPointError, match=r"impossible values bits_per_dim_prior -1\.0, so"):
        bits_per_dim.evaluate(runs.load(workdir), workdir, num=6, batch_size=6)
    assert not (workdir / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_flags_without_effect_are_refused(run_command, workdir):
    def error(*flags):
        return run_command("evaluate", "--workdir", workdir, *flags, fails=True)

    message = error("--bpd", "--cfg_scale", 2, "--guide_step", 20)
    assert "--bpd takes no --cfg_scale, --guide_step." in message
    assert "--bpd_steps=3 goes with --bpd" in error("--bpd_steps", 3)
    message = error("--bpd", "--variance=large")
    assert "--variance=large needs process ddpm without a learned variance." in message


@pytest.mark.slow
def test_command_measures_a_flow(run_command, smoke_config, tmp_path):
    config = set_flow(smoke_config)
    checkpoint.save_params(tmp_path / "run", config, make_model(config, 1).params)
    flags = "--workdir", tmp_path / "run", "--bpd", "--num", 6, "--bpd_steps", 5
    out = run_command("evaluate", *flags)
    row = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    settings = dict(kind="ode", steps=5, num=6, seed=0, clip_x_0=False, raw=False)
    settings["images"] = row["likelihood"]["images"]
    assert row["likelihood"] == settings
    assert f"bits_per_dim {row['bits_per_dim']:.4f}" in out
    assert "clip_x_0 True" in run_command("evaluate", *flags, "--clip_x_0", "true")
    assert "kind ode  steps 5  num 6  seed 0" in out


def test_flow_of_a_network_of_zeros_has_the_bits_of_its_prior(smoke_config, bits_of_images):
    config = set_flow(smoke_config)
    config.diffusion.sigma_data = 1.0
    trained = make_model(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, trained.params["final_layer"])
    trained.params["final_layer"] = zeros  # u = 0, so x_t stays N(0, 1)
    row, actual = bits_of_images(trained, 12, steps=20)
    images = loader.gather(latents.open_split(config, "eval"), np.arange(12) * 180 // 12)["image"]
    nats = 0.5 * np.log(2 * np.pi) + 0.5 * (images / 127.5 - 1) ** 2  # of N(0, 1)
    expected = nats.mean() / math.log(2) + math.log2(255 / 2)
    assert row["bits_per_dim"] == pytest.approx(expected, abs=0.02)
    _, other_seed = bits_of_images(trained, 12, steps=20, seed=1)
    assert (np.abs(other_seed - actual) > 1e-6).all()  # another point in the bins
