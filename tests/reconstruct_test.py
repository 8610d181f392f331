"""Images through a VAE and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close
from PIL import Image

from dit_jax import conditions, latents, reconstruct
from dit_jax.data import loader


@pytest.mark.slow
def test_means_are_of_the_images_asked_for(smoke_config, vae_dir):
    """Of 21 images in batches of 8 and, alone, by the definition."""
    row, picture = reconstruct.reconstruct(smoke_config, vae_dir, num=21, batch_size=1)
    source = conditions.open_images(smoke_config, "test")
    image = jnp.asarray(loader.gather(source, range(21))["image"])
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    vae = latents.load_vae(vae_dir, mesh, "float32")
    mean, log_variance = latents.posterior(jax.jit(latents.encode)(vae, image))
    decode = functools.partial(vae.model.apply, method="decode")
    decoded = jax.jit(decode)({"params": vae.params}, mean)
    error = np.asarray(latents.pixels_from_image(image) - np.clip(decoded, -1, 1))
    psnr = np.mean(20 * np.log10(2) - 10 * np.log10(np.mean(error**2, axis=(1, 2, 3))))
    kl = 0.5 * np.mean(np.sum(mean**2 + np.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3)))
    assert row["num_images"] == 21
    assert_close(row["psnr"], psnr, 1e-5)
    assert_close(row["kl"], kl, 1e-4)
    assert picture.shape == (4 * 50 - 2, 4 * 98 - 2, 3)  # 16 pairs of 8 px, enlarged to 48
    np.testing.assert_array_equal(picture[:48:6, :48:6, 0], image[0, ..., 0])


@pytest.mark.slow
def test_command_writes_the_picture(run_command, digits_dir, vae_dir, tmp_path):
    out = tmp_path / "new" / "x.png"
    flags = ["--config", "configs/smoke.py", f"--config.data.data_dir={digits_dir}"]
    flags += ["--vae", vae_dir, "--num", 5]
    printed = run_command("reconstruct", *flags, "--out", out)
    assert printed.startswith("5 images: PSNR ")
    assert Image.open(out).size == (3 * 98 - 2, 2 * 50 - 2)
    error = run_command("reconstruct", *flags, "--out", tmp_path / "x.jpg", fails=True)
    assert "x.jpg must end in .png" in error
