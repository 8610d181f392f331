"""The autoencoder against a recorded one of diffusers, and its sizes."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS, VAE
from helpers import published_configs
from helpers.close import assert_close
from jax import flatten_util
from ml_collections import ConfigDict

from dit_jax import convert, models
from dit_jax.models import vae


@pytest.fixture(scope="module")
def golden():
    """A tiny AutoencoderKL of diffusers: its parameters by name, and arrays as NHWC."""
    with np.load(GOLDENS / "vae_tiny_reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    published = {n.removeprefix("w/"): a for n, a in arrays.items() if n.startswith("w/")}
    images = {n: np.moveaxis(a, 1, -1) for n, a in arrays.items() if not n.startswith("w/")}
    return published, images


@pytest.fixture
def diffusers_dir(golden, tmp_path):
    """The files that diffusers writes."""
    safetensors.numpy.save_file(golden[0], tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published_configs.VAE))
    return tmp_path


@pytest.fixture
def config(diffusers_dir):
    return convert.vae.read_model_config(diffusers_dir)


def _apply(config, params, method, x):
    apply = functools.partial(models.build(config).apply, method=method)
    return jax.jit(apply)({"params": params}, x)


def test_moments_and_decoded_pixels_are_the_recorded_ones(golden, config):
    published, images = golden
    params = convert.load("vae", published, config)
    moments = _apply(config, params, "encode", images["image"])
    decoded = _apply(config, params, "decode", images["z"])
    for actual, name in ((moments, "moments"), (decoded, "decoded")):
        expected = images[name]
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_dtype_and_remat_change_only_the_rounding(golden, config):
    published, images = golden
    params = convert.load("vae", published, config)

    def loss_and_grads(config):
        def loss(params):
            return jnp.mean(_apply(config, params, None, images["image"]) ** 2)

        jaxpr = str(jax.make_jaxpr(loss)(params))
        # The encoder's two levels have a residual block each, the decoder's two each; each has a
        # middle of two.
        recomputed = 2 + 4 + 2 * 2 if config.remat else 0
        assert len(re.findall(r"(remat2?|checkpoint)\[", jaxpr)) == recomputed
        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = loss_and_grads(config)
    config.remat = True
    value_remat, grads_remat = loss_and_grads(config)
    assert_close(value_remat, value, 1e-6)
    # As one array: the gradients of the keys' biases are 0 but for rounding.
    ravel = flatten_util.ravel_pytree
    assert_close(ravel(grads_remat)[0], ravel(grads)[0], 5e-6)
    config.dtype = "bfloat16"
    moments = _apply(config, params, "encode", images["image"])
    assert moments.dtype == jnp.float32
    assert np.abs(moments - images["moments"]).max() < 0.05 * np.abs(images["moments"]).max()


def _sizes(**changes):
    return ConfigDict(VAE | dict(image_channels=3, norm_groups=32) | changes)


def test_stable_diffusion_s_sizes_have_its_count():
    channels = (128, 256, 512, 512)
    config = _sizes(latent_channels=4, block_channels=channels, layers_per_block=2)
    shapes = convert.parameters.get_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863


@pytest.mark.parametrize("levels", [2, 3, 6])
@pytest.mark.parametrize("latent_channels", [4, 32])
def test_free_sizes(levels, latent_channels):
    model = models.build(
        _sizes(
            block_channels=(32,) * levels,
            latent_channels=latent_channels,
            use_quant_conv=False,
            mid_attention=False,
        )
    )
    assert model.factor == 2 ** (levels - 1)
    image = jax.ShapeDtypeStruct((1, 64, 128, 3), jnp.float32)
    params = models.param_shapes(model)
    assert "quant_conv" not in params
    assert "attentions_0" not in params["encoder"]["mid_block"]
    moments = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="encode"), params, image
    )
    assert moments.shape == (1, 64 // model.factor, 128 // model.factor, 2 * latent_channels)
    assert model.latent_shape((64, 128, 3)) == (*moments.shape[1:3], latent_channels)
    assert model.image_shape((*moments.shape[1:3], latent_channels)) == (64, 128, 3)
    decoded = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, image)
    assert decoded.shape == image.shape


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"norm_groups=32 must divide .* not \[48\]"):
        models.build(_sizes(block_channels=(32, 48)))
    model = models.build(_sizes(block_channels=(32, 32, 32)))
    params = models.param_shapes(model)
    for shape in ((1, 30, 32, 3), (1, 32, 32, 1)):
        with pytest.raises(ValueError, match=r"takes images of 3 channels .* multiples of 4, not"):
            jax.eval_shape(
                lambda p, x: model.apply({"params": p}, x, method=vae.AutoencoderKL.encode),
                params,
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
