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


def some_model(config, num_devices=8):
    """Parameters of no training that do not predict 0."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
    model = models.build(config.model)
    params = jax.device_put(random_params(model, spread=0.1), sharding.replicated(mesh))
    process = diffusion.build(config.diffusion)
    return runs.Trained(config, 0, False, mesh, model, process, params, to_image=None)


def flow_config(config):
    config.diffusion.process = "flow"
    config.objective.prediction = "u"
    config.model.learn_sigma = False
    return config


@pytest.fixture
def bits_of_images(monkeypatch, tmp_path):
    """bits_of_images(trained, batch_size, ...): the row, and every image's bits."""
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
        monkeypatch.setattr(rows, "git_revision", lambda: "-dirty")  # always measured again
        row = bits_per_dim.evaluate(trained, tmp_path, num, batch_size=batch_size, **options)
        return row, np.concatenate(collected)[:num]

    monkeypatch.setattr(bits_per_dim, "make_bits_fn", spy)
    return measure


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vlb", "latents"])
def test_bits_are_of_the_image_not_of_its_batch(
    smoke_config, bits_of_images, moments_dir, vae_dir, kind
):
    config = smoke_config if kind == "vlb" else flow_config(smoke_config)
    config.model.depth = 1
    if kind == "latents":
        config.latents.update(source="moments", moments=str(moments_dir), vae=str(vae_dir))
        config.latents.update(scale=(1.0,), shift=(0.0,))
        config.model.update(input_size=4, in_channels=2)
    row, actual = bits_of_images(some_model(config), 12, steps=2)
    name = "bits_per_latent_dim" if kind == "latents" else "bits_per_dim"
    assert {key for key in row if key.startswith("bits")} - {f"{name}_prior"} == (
        {name, f"{name}_standard_error"} | ({f"{name}_first_level"} if kind == "vlb" else set())
    )
    assert_close(row[name], actual.mean(), 1e-5)
    assert_close(row[f"{name}_standard_error"], actual.std(ddof=1) / 12**0.5, 1e-5)
    assert len(np.unique(actual)) == 12
    _, in_batches = bits_of_images(some_model(config, 1), 12, 5, steps=2)
    assert_close(in_batches, actual, 2e-5)
    _, other_seed = bits_of_images(some_model(config, 1), 12, 5, seed=1, steps=2)
    assert (np.abs(other_seed - actual) > 1e-4 * np.abs(actual)).all()


def test_images_are_spread_over_the_split_and_no_more_than_there_are(smoke_config, bits_of_images):
    trained = some_model(flow_config(smoke_config), 1)
    trained.config.data.eval_split = "test[:10]"
    row, actual = bits_of_images(trained, 1000, steps=1)
    assert row["likelihood"]["num"] == len(actual) == 10
    error = actual.std(ddof=1, dtype=np.float64) / 10**0.5
    assert row["bits_per_dim_standard_error"] == pytest.approx(error, rel=1e-6)
    _, half = bits_of_images(trained, 5, steps=1)
    assert_close(half, actual[::2], 1e-5)


def bound_in_numpy(images, x_ts, outputs, alpha_bars, clip):
    """Bits per dimension [B] as guided-diffusion computes them, with a learned variance.

    Args: of every step, noisiest first, x_t [B, 8, 8, 1] and the network's output [B, 8, 8, 2];
      alpha_bars of their levels.
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
        of_x_0 = np.sqrt(next_alpha_bar) * beta / (1 - alpha_bar)
        of_x_t = np.sqrt(alpha_bar / next_alpha_bar) * (1 - next_alpha_bar) / (1 - alpha_bar)
        mean, mean_hat = (of_x_0 * x + of_x_t * x_t for x in (x_0, x_0_hat))
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
def test_bound_is_guided_diffusion_s_clipped_as_the_config_says(smoke_config, clip):
    smoke_config.sample.clip_x_0 = clip
    trained = some_model(smoke_config, 1)
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
    expected = bound_in_numpy(batch["image"], x_ts, outputs, alpha_bars, clip)
    other = bound_in_numpy(batch["image"], x_ts, outputs, alpha_bars, not clip)
    assert (np.abs(other - expected) > 0.01 * expected).all()
    batch = sharding.put_batch(trained.mesh, batch)
    bits_fn = bits_per_dim.make_bits_fn(trained, 4)
    assert_close(bits_fn(trained.params, {}, key, batch)[""], expected, 1e-4)


@pytest.fixture
def latent_config(smoke_config):
    """Of a model of latents."""
    smoke_config.latents.update(source="moments", scale=(1.0,), shift=(0.0,))
    smoke_config.model.update(input_size=4, in_channels=2)
    return smoke_config


def latent_bits(trained, seed=0):
    """(what `make_bits_fn` says of three latents without deviation, x_0) under a seed."""
    mean = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float16)
    moments = np.concatenate([mean, np.full_like(mean, -30)], axis=-1)
    batch = {"moments": moments, "label": np.arange(3, dtype=np.int32)}
    batch = sharding.put_batch(trained.mesh, batch | {"index": np.arange(3, dtype=np.int32)})
    actual = bits_per_dim.make_bits_fn(trained, 2)(trained.params, {}, jax.random.key(seed), batch)
    return {name: np.asarray(value) for name, value in actual.items()}, mean.astype(np.float64)


def test_first_level_of_latents_is_a_density(latent_config):
    """Of a network that says 0: x_0 is off by the noise of x_t, its variance the bounds' mean."""
    trained = some_model(latent_config, 1)
    trained = dataclasses.replace(trained, params=jax.tree.map(jnp.zeros_like, trained.params))
    actual, x_0 = latent_bits(trained)
    times = samplers.grids.build(trained.process, 2)
    alpha, sigma = trained.process.alpha(times[1]), trained.process.sigma(times[1])
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), n), 2) for n in range(3)]
    error = sigma / alpha * np.stack([jax.random.normal(k, x_0.shape[1:]) for k in keys])
    table = trained.process.posterior(times[:-1], times[1:])
    log_variance = (table.log_beta[1] + table.log_variance[1]) / 2
    nats = 0.5 * (np.log(2 * np.pi) + log_variance + error**2 / np.exp(log_variance))
    expected = nats.mean(axis=(1, 2, 3)) / np.log(2)
    assert_close(actual["_first_level"], expected, 1e-3)


def test_flow_s_probe_is_drawn_by_the_seed(latent_config):
    """Without deviation and bins nothing else is."""
    trained = some_model(flow_config(latent_config), 1)
    one, other = (latent_bits(trained, seed)[0][""] for seed in (0, 1))
    assert (np.abs(one - other) > 1e-4 * np.abs(one)).all()


def test_flow_is_of_the_clipped_denoiser_where_samples_are(smoke_config, bits_of_images):
    trained = some_model(flow_config(smoke_config), 1)
    _, plain = bits_of_images(trained, 3, steps=2)
    trained.config.sample.clip_x_0 = True
    row, clipped = bits_of_images(trained, 3, steps=2)
    assert row["likelihood"]["clip_x_0"] is True
    assert (np.abs(clipped - plain) > 1e-3 * np.abs(plain)).all()


def test_rows_say_whether_x_0_is_clipped(smoke_config, tmp_path, monkeypatch):
    """A row that does not say so is of an older version, which never clipped: measured again."""
    monkeypatch.setattr(rows, "git_revision", lambda: "abc")
    trained = some_model(smoke_config, 1)
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
    """Where training never recorded the held-out ones."""
    monkeypatch.setattr(rows, "git_revision", lambda: "abc")
    trained = some_model(smoke_config, 1)
    row = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    trained.config.data.eval_split = "test[:90]"
    other = bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2)
    assert row["likelihood"]["images"] != other["likelihood"]["images"]
    assert row["bits_per_dim"] != other["bits_per_dim"]
    trained.config.data.eval_split = "test"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits_per_dim, "_measure", None)  # not needed again
        assert bits_per_dim.evaluate(trained, tmp_path, num=2, steps=2) == row


def test_rows_say_whether_parameters_are_raw(smoke_config, bits_of_images):
    trained = some_model(smoke_config, 1)
    for raw in (False, True):
        row, _ = bits_of_images(dataclasses.replace(trained, raw=raw), 2, steps=2)
        assert row["likelihood"]["raw"] is raw


def test_what_cannot_be_measured_is_said(smoke_config, tmp_path):
    trained = some_model(smoke_config)
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
    here = {"git_revision": "abc", "matmul_precision": "highest"}  # the tests'
    with (workdir / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(row | here) + "\n")
    monkeypatch.setattr(rows, "git_revision", lambda: "abc")
    monkeypatch.setattr(bits_per_dim.loader, "gather", None)  # not needed again
    again = bits_per_dim.evaluate(runs.load(workdir), workdir, num=6, seed=1)
    assert again == row | here


def test_bits_that_cannot_be_are_not_written(workdir, monkeypatch):
    def make_bits_fn(*_):
        return lambda *_: {"": np.ones(6), "_prior": np.full(6, -1.0), "_first_level": np.ones(6)}

    monkeypatch.setattr(bits_per_dim, "make_bits_fn", make_bits_fn)
    with pytest.raises(
        FloatingPointError, match=r"measured bits_per_dim_prior -1\.0, which cannot"
    ):
        bits_per_dim.evaluate(runs.load(workdir), workdir, num=6, batch_size=6)
    assert not (workdir / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_flags_that_say_nothing_are_refused(run_command, workdir):
    def error(*flags):
        return run_command("evaluate", "--workdir", workdir, *flags, fails=True)

    message = error("--bpd", "--cfg_scale", 2, "--guide_step", 20)
    assert "--bpd takes no --cfg_scale, --guide_step." in message
    assert "--bpd_steps=3 goes with --bpd" in error("--bpd_steps", 3)
    message = error("--bpd", "--variance=large")
    assert "--variance=large is of process ddpm without a learned variance." in message


@pytest.mark.slow
def test_command_measures_a_flow(run_command, smoke_config, tmp_path):
    config = flow_config(smoke_config)
    checkpoint.save_params(tmp_path / "run", config, some_model(config, 1).params)
    flags = "--workdir", tmp_path / "run", "--bpd", "--num", 6, "--bpd_steps", 5
    out = run_command("evaluate", *flags)
    row = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    settings = dict(kind="ode", steps=5, num=6, seed=0, clip_x_0=False, raw=False)
    settings["images"] = row["likelihood"]["images"]
    assert row["likelihood"] == settings
    assert f"bits_per_dim {row['bits_per_dim']:.4f}" in out
    assert "clip_x_0 True" in run_command("evaluate", *flags, "--clip_x_0", "true")
    assert "kind ode  steps 5  num 6  seed 0" in out


def test_flow_without_a_word_of_the_data_has_the_bits_of_its_prior(smoke_config, bits_of_images):
    config = flow_config(smoke_config)
    config.diffusion.sigma_data = 1.0
    trained = some_model(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, trained.params["final_layer"])
    trained.params["final_layer"] = zeros  # u = 0: x_t stands still, from N(0, 1)
    row, actual = bits_of_images(trained, 12, steps=20)
    images = loader.gather(latents.open_split(config, "eval"), np.arange(12) * 180 // 12)["image"]
    nats = 0.5 * np.log(2 * np.pi) + 0.5 * (images / 127.5 - 1) ** 2  # of N(0, 1)
    expected = nats.mean() / math.log(2) + math.log2(255 / 2)
    assert row["bits_per_dim"] == pytest.approx(expected, abs=0.02)
    _, other_seed = bits_of_images(trained, 12, steps=20, seed=1)
    assert (np.abs(other_seed - actual) > 1e-6).all()  # another place in the bins; no probe matters
