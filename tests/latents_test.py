"""Pixels and moments to x_0 and back: scaled once, truncated as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import latents

KEY = jax.random.key(0)


def test_every_pixel_value_survives_the_round_trip():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x_0 = latents.x_0_from_batch({"image": jnp.asarray(image)}, KEY, scale=7.0, shift=3.0)
    assert (float(x_0.min()), float(x_0.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(latents.image_from_x_0(x_0), image)


def test_image_is_clipped_and_truncated():
    x_0 = jnp.array([-2.0, -1.0, 0.0, 0.0078, 0.9999, 2.0]).reshape(1, 1, 6, 1)
    # 127.5 x + 128 truncated: 0.9999 gives 255.49 -> 255, 0.0078 gives 128.99 -> 128
    np.testing.assert_array_equal(latents.image_from_x_0(x_0).ravel(), [0, 0, 128, 128, 255, 255])


def test_posterior_sample_is_scaled_once():
    """Moments with mean 5 and std 2, shift 1, scale 0.5: x_0 has mean 2 and std 1."""
    mean = np.full((4, 64, 64, 4), 5.0)
    moments = np.concatenate([mean, np.full_like(mean, np.log(4.0))], axis=-1).astype(np.float16)
    x_0 = latents.x_0_from_batch({"moments": jnp.asarray(moments)}, KEY, scale=0.5, shift=1.0)
    assert (x_0.shape, x_0.dtype) == ((4, 64, 64, 4), jnp.float32)
    assert float(x_0.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(x_0.std()) == pytest.approx(1.0, rel=0.02)
    other = latents.x_0_from_batch({"moments": jnp.asarray(moments)}, jax.random.key(1), 0.5, 1.0)
    assert not np.array_equal(x_0, other)  # drawn afresh for every key
