"""Bits per dimension of a run's held-out images, and the command that measures them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from conftest import random_params

from dit_jax import (
    bits,
    checkpoint,
    data,
    diffusion,
    models,
    rows,
    runs,
    sharding,
    sources,
)


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
    make = bits.make_bits_fn

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
        row = bits.evaluate(trained, tmp_path, num, batch_size=batch_size, **options)
        return row, np.concatenate(collected)[:num]

    monkeypatch.setattr(bits, "make_bits_fn", spy)
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
    row, found = bits_of_images(some_model(config), 12, steps=2)
    name = "bits_per_latent_dim" if kind == "latents" else "bits_per_dim"
    assert {key for key in row if key.startswith("bits")} - {f"{name}_prior"} == (
        {name, f"{name}_standard_error"} | ({f"{name}_first_level"} if kind == "vlb" else set())
    )
    assert_close(row[name], found.mean(), 1e-5)
    assert_close(row[f"{name}_standard_error"], found.std(ddof=1) / 12**0.5, 1e-5)
    assert len(np.unique(found)) == 12
    _, in_batches = bits_of_images(some_model(config, 1), 12, 5, steps=2)
    assert_close(in_batches, found, 2e-5)
    _, other_seed = bits_of_images(some_model(config, 1), 12, 5, seed=1, steps=2)
    assert (np.abs(other_seed - found) > 1e-4 * np.abs(found)).all()


def test_images_are_spread_over_the_split_and_no_more_than_there_are(smoke_config, bits_of_images):
    trained = some_model(flow_config(smoke_config), 1)
    trained.config.data.eval_split = "test[:10]"
    row, found = bits_of_images(trained, 1000, steps=1)
    assert row["likelihood"]["num"] == len(found) == 10
    _, half = bits_of_images(trained, 5, steps=1)
    assert_close(half, found[::2], 1e-5)


def test_what_cannot_be_measured_is_said(smoke_config, tmp_path):
    trained = some_model(smoke_config)
    with pytest.raises(ValueError, match=r"cannot take 1 sampling steps"):
        bits.evaluate(trained, tmp_path, steps=1)
    trained.params["x_embedder"]["bias"] *= np.nan
    with pytest.raises(FloatingPointError, match="bits_per_dim of 3 of 3 images is NaN"):
        bits.evaluate(trained, tmp_path, num=3, steps=2)
    trained.config.data.eval_split = "test[:1]"
    with pytest.raises(ValueError, match="1 of 1 held-out images have no standard error"):
        bits.evaluate(trained, tmp_path)
    trained.config.data.eval_split = ""
    with pytest.raises(ValueError, match=r"data.eval_split of .* is empty"):
        bits.evaluate(trained, tmp_path)
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_command_measures_a_chain_once(run_command, workdir, monkeypatch):
    flags = "--workdir", workdir, "--bpd", "--num", 6, "--seed", 1
    out = run_command("evaluate", *flags)
    row = json.loads((workdir / "evaluations.jsonl").read_text())
    assert row["likelihood"] == dict(
        kind="vlb", steps=1000, num=6, seed=1, variance="learned", raw=False
    )
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
    monkeypatch.setattr(bits.data, "gather", None)  # not needed again
    again = bits.evaluate(runs.load(workdir), workdir, num=6, seed=1)
    assert again == row | here


@pytest.mark.slow
def test_flags_that_say_nothing_are_refused(run_command, workdir):
    def error(*flags):
        return run_command("evaluate", "--workdir", workdir, *flags, fails=True)

    message = error("--bpd", "--cfg_scale", 2, "--guide_step", 20)
    assert "so it takes no --cfg_scale, --guide or --guide_step." in message
    assert "--bpd_steps=3 goes with --bpd" in error("--bpd_steps", 3)


@pytest.mark.slow
def test_command_measures_a_flow(run_command, smoke_config, tmp_path):
    config = flow_config(smoke_config)
    checkpoint.save_params(tmp_path / "run", config, some_model(config, 1).params)
    flags = "--workdir", tmp_path / "run", "--bpd", "--num", 6, "--bpd_steps", 5
    out = run_command("evaluate", *flags)
    row = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert row["likelihood"] == dict(kind="ode", steps=5, num=6, seed=0, raw=False)
    assert f"bits_per_dim {row['bits_per_dim']:.4f}" in out
    assert "kind ode  steps 5  num 6  seed 0" in out


def test_flow_without_a_word_of_the_data_has_the_bits_of_its_prior(smoke_config, bits_of_images):
    config = flow_config(smoke_config)
    config.diffusion.sigma_data = 1.0
    trained = some_model(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, trained.params["final_layer"])
    trained.params["final_layer"] = zeros  # u = 0: x_t stands still, from N(0, 1)
    row, found = bits_of_images(trained, 12, steps=20)
    images = data.gather(sources.open_split(config, "eval"), np.arange(12) * 180 // 12)["image"]
    nats = 0.5 * np.log(2 * np.pi) + 0.5 * (images / 127.5 - 1) ** 2  # of N(0, 1)
    expected = nats.mean() / math.log(2) + math.log2(255 / 2)
    assert row["bits_per_dim"] == pytest.approx(expected, abs=0.02)
    _, other_seed = bits_of_images(trained, 12, steps=20, seed=1)
    assert (np.abs(other_seed - found) > 1e-6).all()  # another place in the bins; no probe matters
