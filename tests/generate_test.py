"""Samples belong to (parameters, seed, image number, label), not to batches or devices."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import generate, models, sharding


@pytest.fixture(scope="module")
def model(golden_model_config):
    return models.build(golden_model_config)


def _settings(**changes):
    settings = dict(sampler="ddpm", steps=5, eta=0.0, cfg_scale=1.5, cfg_channels=3)
    return ConfigDict(settings | changes)


def _mesh(num_devices):
    devices = jax.devices()[:num_devices]
    return sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), devices)


LABELS = np.array([0, 3, 6, 1, 2, 5, 4, 0, 1, 6])


def _x_0(model, process, params, num_devices=1, batch_size=None, seed=0, labels=LABELS, **changes):
    mesh = _mesh(num_devices)
    sample = generate.make_sample_fn(_settings(**changes), model, process, mesh)
    return generate.generate(
        sample, params, labels, seed, mesh, to_image=lambda x_0: x_0, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def expected(model, process, golden_params):
    return _x_0(model, process, golden_params)


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 4), (8, 8), (4, 3)])
def test_samples_do_not_depend_on_batches_or_devices(
    model, process, golden_params, expected, num_devices, batch_size
):
    x_0 = _x_0(model, process, golden_params, num_devices, batch_size)
    assert x_0.shape == (10, 8, 8, 4)
    np.testing.assert_allclose(x_0, expected, atol=1e-5 * np.abs(expected).max())


def test_equal_shapes_per_device_give_equal_bits(model, process, golden_params):
    """Two images to a device, on one device or on four."""
    one = _x_0(model, process, golden_params, num_devices=1, batch_size=2)
    four = _x_0(model, process, golden_params, num_devices=4, batch_size=8)
    np.testing.assert_array_equal(one, four)


def test_an_image_is_the_same_in_a_shorter_list(model, process, golden_params, expected):
    x_0 = _x_0(model, process, golden_params, labels=LABELS[:3])
    np.testing.assert_allclose(x_0, expected[:3], atol=1e-5 * np.abs(expected).max())


def test_seed_number_and_label_each_change_the_image(model, process, golden_params, expected):
    def differ(a, b):
        return np.abs(a - b).max() > 1e-3

    assert differ(_x_0(model, process, golden_params, seed=1)[0], expected[0])
    assert differ(expected[0], expected[7])  # the same label
    assert differ(
        _x_0(model, process, golden_params, labels=LABELS + 1 - 1 * (LABELS > 0))[0], expected[0]
    )


def test_ddim_is_deterministic_and_differs_from_ddpm(model, process, golden_params, expected):
    ddim = _x_0(model, process, golden_params, sampler="ddim")
    np.testing.assert_array_equal(ddim, _x_0(model, process, golden_params, sampler="ddim"))
    assert np.abs(ddim - expected).max() > 1e-3
    noisy = _x_0(model, process, golden_params, sampler="ddim", eta=1.0)
    assert np.abs(ddim - noisy).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampler="heun"), "unknown sampler 'heun'; choose one of ddpm, ddim"),
        (dict(steps=1001), "cannot take 1001 sampling steps"),
        (dict(eta=0.5), "eta=0.5 is DDIM's"),
        (dict(sampler="ddim", eta=1.5), r"eta=1.5 must lie in \[0, 1\]"),
        (dict(cfg_scale=0.5), "cfg_scale=0.5 must be at least 1"),
        (dict(cfg_channels=5), r"cfg_channels=5 must lie in 0 \(all\) .. 4"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(model, process, change, message):
    with pytest.raises(ValueError, match=message):
        generate.make_sample_fn(_settings(**change), model, process, _mesh(1))


def test_guidance_without_a_null_class_is_refused(model, process):
    model = model.clone(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="trained with class_dropout_prob=0"):
        generate.make_sample_fn(_settings(), model, process, _mesh(1))
    generate.make_sample_fn(_settings(cfg_scale=1.0), model, process, _mesh(1))


def test_models_of_pixels_take_no_vae(workdir):
    with pytest.raises(ValueError, match="a model of pixels, which takes no --vae=runs/vae"):
        generate.load(workdir, vae_workdir="runs/vae")


def test_models_of_latents_are_refused_without_their_vae(workdir):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(
        config.replace('"source": "pixels"', '"source": "moments"')
    )
    with pytest.raises(ValueError, match="holds a model of latents: give --vae"):
        generate.load(workdir)


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (10, 20, 30)])
    grid = generate.image_grid(images, columns=2, cell=4, gap=1)
    assert grid.shape == (9, 9, 3)
    assert (grid[:4, :4] == 10).all()
    assert (grid[:4, 5:] == 20).all()
    assert (grid[5:, :4] == 30).all()
    assert (grid[5:, 5:] == 128).all()  # no fourth image
    assert (grid[4] == 128).all()
