"""LPIPS against distances recorded from its authors' code, and as a term of a VAE's loss."""

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict

from configs import default
from dit_jax import convert, models
from dit_jax.convert import lpips, parameters
from dit_jax.training import frozen_networks, initial_state, programs
from dit_jax.workdirs import checkpoint

CONFIG = ConfigDict(dict(name="lpips", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    """The random parameters of the recording, by their published names."""
    shapes = parameters.list_published(lpips.make_table(CONFIG))
    rng, params = np.random.RandomState(0), {}
    for name in sorted(shapes):
        if name.startswith("lin"):
            params[name] = rng.rand(*shapes[name])
        elif name.endswith("weight"):
            params[name] = rng.randn(*shapes[name]) * np.sqrt(2 / np.prod(shapes[name][1:]))
        else:
            params[name] = 0.1 * rng.randn(*shapes[name])
    return {name: array.astype(np.float32) for name, array in params.items()}


@pytest.fixture(scope="module")
def params(published):
    return convert.load("lpips", published, CONFIG)


def test_published_names_equal_the_files(published):
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = {f"features.{i}.{leaf}" for i in convolutions for leaf in ("weight", "bias")}
    assert published.keys() == names | {f"lin{i}.model.1.weight" for i in range(5)}


def test_distances_equal_the_published_code_s(params):
    with np.load(conftest.GOLDENS / "lpips_reference.npz") as golden:
        x, y, expected = (golden[name] for name in ("x", "y", "distance"))
    apply = jax.jit(models.build(CONFIG).apply)
    distance = apply({"params": params}, x, y)
    assert_close(distance, expected, 1e-5)
    assert distance[2] == expected[2] == 0  # the third pair are equal images
    grey = apply({"params": params}, x[..., :1], y[..., :1])
    rgb = apply({"params": params}, x[..., :1].repeat(3, -1), y[..., :1].repeat(3, -1))
    assert_close(grey, rgb, 1e-5)


@pytest.mark.slow
def test_gradient_is_finite_where_all_features_are_0(params):
    dead = jax.tree.map(lambda a: -jnp.abs(a), params)
    x, y = jnp.ones((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))
    distance = models.build(CONFIG).apply
    grad = jax.jit(jax.grad(lambda x: distance({"params": dead}, x, y).sum()))(x)
    assert np.isfinite(grad).all()


@pytest.mark.slow
def test_vae_loss_includes_lpips_times_lpips_weight(params, tmp_path):
    checkpoint.save_params(tmp_path / "lpips", ConfigDict({"model": CONFIG}), params)
    config = default.get_config("vae")
    config.update(batch_size=2)
    config.data.update(image_size=16)
    config.model.update(block_channels=(8, 8), norm_groups=4, layers_per_block=1)
    config.autoencoder.update(lpips_weight=0.5, lpips=str(tmp_path / "lpips"))
    program = programs.make_program(config, jax.devices()[:1])
    _, frozen = frozen_networks.load(config, program.mesh)
    state = initial_state.new_state(program, jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch = {"image": image, "label": np.zeros(2, np.int32)}
    step = programs.compile_train_step(program)
    _, scalars = step(state, batch, jax.random.key(0), frozen)
    kl = config.autoencoder.kl_weight * scalars["kl"] / image[0].size
    assert scalars["lpips"] > 0.01
    assert_close(scalars["loss"], scalars["reconstruction"] + kl + 0.5 * scalars["lpips"], 1e-5)
