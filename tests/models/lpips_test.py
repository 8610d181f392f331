"""LPIPS against recorded distances of its authors' code, and as part of a VAE's loss."""

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
from dit_jax.training import initial_state, programs
from dit_jax.workdirs import checkpoint

CONFIG = ConfigDict(dict(name="lpips", dtype="float32"))


@pytest.fixture(scope="module")
def published():
    """The random parameters that the golden was recorded with, by their published names."""
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


def test_distances_are_the_published_code_s(params):
    with np.load(conftest.GOLDENS / "lpips_reference.npz") as golden:
        x, y, expected = (golden[name] for name in ("x", "y", "distance"))
    apply = jax.jit(models.build(CONFIG).apply)
    distance = apply({"params": params}, x, y)
    assert_close(distance, expected, 1e-5)
    assert distance[2] == expected[2] == 0  # of equal images
    grey = apply({"params": params}, x[..., :1], y[..., :1])
    three = apply({"params": params}, x[..., :1].repeat(3, -1), y[..., :1].repeat(3, -1))
    assert_close(grey, three, 1e-5)


@pytest.mark.slow
def test_gradient_is_finite_where_no_feature_fires(params):
    dead = jax.tree.map(lambda a: -jnp.abs(a), params)
    x, y = jnp.ones((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))
    distance = models.build(CONFIG).apply
    grad = jax.jit(jax.grad(lambda x: distance({"params": dead}, x, y).sum()))(x)
    assert np.isfinite(grad).all()


@pytest.mark.slow
def test_vae_s_loss_takes_it_in_with_its_weight(params, tmp_path):
    checkpoint.save_params(tmp_path / "lpips", ConfigDict({"model": CONFIG}), params)
    config = default.get_config("vae")
    config.update(batch_size=2)
    config.data.update(image_size=16)
    config.model.update(block_channels=(8, 8), norm_groups=4, layers_per_block=1)
    config.autoencoder.update(lpips_weight=0.5, lpips=str(tmp_path / "lpips"))
    program = programs.make_program(config, jax.devices()[:1])
    _, frozen = program.task.load_frozen(config, program.mesh, {})
    state = initial_state.new_state(program, jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch = {"image": image, "label": np.zeros(2, np.int32)}
    step = programs.compile_train_step(program)
    _, scalars = step(state, batch, jax.random.key(0), frozen)
    kl = config.autoencoder.kl_weight * scalars["kl"] / image[0].size
    assert scalars["lpips"] > 0.01
    assert_close(scalars["loss"], scalars["reconstruction"] + kl + 0.5 * scalars["lpips"], 1e-5)
