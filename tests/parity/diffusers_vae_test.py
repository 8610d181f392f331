"""The autoencoder against diffusers', imported from files that it writes, with random weights."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from dit_jax import convert, models

STABLE_DIFFUSION = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
FREE = dict(
    block_out_channels=(32, 64),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)


def _build_reference(sizes):
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    reference = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **sizes,
    )
    with torch.no_grad():
        for parameter in reference.parameters():  # so that no scale is 1 and no bias 0
            parameter.add_(0.02 * torch.randn_like(parameter))
    return reference.eval()


def _to_nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


@pytest.mark.parametrize(
    ("sizes", "image_size"),
    [(STABLE_DIFFUSION, 64), (STABLE_DIFFUSION, 256), (FREE, 32)],
    ids=["sd-64", "sd-256", "free-32"],
)
def test_moments_and_decoded_pixels_agree_with_diffusers(sizes, image_size, tmp_path):
    reference = _build_reference(sizes)
    reference.save_pretrained(tmp_path)
    config = convert.vae.read_model_config(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    params = convert.load("vae", path, config)
    model = models.build(config)
    assert config.scale == reference.config.scaling_factor
    assert config.shift == (reference.config.shift_factor or 0)

    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, image_size, image_size, 3)).astype(np.float32)
    latent_size = image_size // model.factor
    z = rng.normal(0, 5, (1, latent_size, latent_size, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        moments = reference.encode(_to_nchw(image)).latent_dist.parameters.numpy()
        decoded = reference.decode(_to_nchw(z)).sample.numpy()
    for method, x, expected in (("encode", image, moments), ("decode", z, decoded)):
        apply = jax.jit(lambda p, x, method=method: model.apply({"params": p}, x, method=method))
        actual, expected = np.asarray(apply(params, x)), np.moveaxis(expected, 1, -1)
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        print(f"{method} {image_size} px: {error:.1e} of the largest value")
        assert error < 1e-4
