"""Samples belong to (parameters, seed, image number, label), not to batches or devices."""

import functools
import os
import socket
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict

from configs import default
from dit_jax import conditions, models, sharding
from dit_jax.config import sizes
from dit_jax.diffusion import edits, grids
from dit_jax.sampling import generate, pictures


@pytest.fixture(scope="module")
def model(golden_model_config):
    return models.build(golden_model_config)


def _settings(**changes):
    config = default.get_config().sample
    config.update(dict(steps=5, cfg_channels=3) | changes)
    return config


def _mesh(num_devices):
    devices = jax.devices()[:num_devices]
    return sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), devices)


LABELS = np.array([0, 3, 6, 1, 2, 5, 4, 0, 1, 6])
REQUEST = conditions.from_labels(LABELS, 7)


def _x_0(model, process, params, num_devices=1, batch_size=None, seed=0, labels=LABELS, **changes):
    mesh = _mesh(num_devices)
    sample = generate.make_sample_fn(model, _settings(**changes), process, "eps", mesh)
    return generate.generate(
        sample,
        params,
        conditions.from_labels(labels, 7),
        seed,
        mesh,
        to_image=lambda x_0: x_0,
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def expected(model, process, golden_params):
    return _x_0(model, process, golden_params)


def test_guided_samples_are_the_published_ones(model, process, golden, golden_params):
    """From labels, which are guided away from the null class, and a given x_T."""
    settings = _settings(sampler="ddim", steps=10, cfg_scale=1.5)
    arguments = model, settings, process, "eps", _mesh(1)
    sample = generate.make_sample_fn(*arguments, edit=edits.FromNoise)
    request, index = (
        conditions.from_labels(golden["y"], 7),
        np.arange(len(golden["y"]), dtype=np.int32),
    )
    x_T = jnp.asarray(golden["x_0"])
    x_0, _ = sample(golden_params, jax.random.key(0), index, **request.rows(index), x_T=x_T)
    expected = golden["ddim_cfg1.5_sample"]
    assert_close(x_0, expected, 2e-5)
    plain = generate.make_sample_fn(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x_T'"):
        plain(golden_params, jax.random.key(0), index, **request.rows(index), x_T=x_T)


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 4), (8, 8), (4, 3)])
def test_samples_do_not_depend_on_batches_or_devices(
    model, process, golden_params, expected, num_devices, batch_size
):
    x_0 = _x_0(model, process, golden_params, num_devices, batch_size)
    assert x_0.shape == (10, 8, 8, 4)
    assert_close(x_0, expected, 1e-5)


def test_equal_shapes_per_device_give_equal_bits(model, process, golden_params):
    """Two images to a device, on one device or on four."""
    one = _x_0(model, process, golden_params, num_devices=1, batch_size=2)
    four = _x_0(model, process, golden_params, num_devices=4, batch_size=8)
    np.testing.assert_array_equal(one, four)


def test_noise_of_the_first_step_is_not_that_of_the_start(model, process, golden_params):
    """A network that says eps = 0 at both steps: x_0 is a sum of x_T and one step's noise."""
    silent = jax.tree.map(jnp.zeros_like, golden_params)
    x_0 = _x_0(model, process, silent, sampler="ddpm", steps=2, cfg_scale=1.0)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(len(LABELS))]
    x_T = np.stack([jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]) for key in keys])
    grid = grids.build(process, 2)
    alpha, to_next = process.alpha(grid), process.posterior(grid[:-1], grid[1:])
    saved = (to_next.x_0_coef[0] / alpha[0] + to_next.x_t_coef[0]) / alpha[1]
    rest = x_0 - saved * x_T
    assert np.std(rest) > 0.1
    assert abs(np.corrcoef(rest.ravel(), x_T.ravel())[0, 1]) < 0.1


def test_sampling_begins_with_the_deviation_of_the_noise(model, build_process, golden_params):
    """A network that says eps = 0 keeps the x_T of edm, which is 80 times as large as N(0, I)."""
    silent, process = jax.tree.map(jnp.zeros_like, golden_params), build_process("edm")
    x_0 = _x_0(model, process, silent, sampler="euler", grid="karras", cfg_scale=1.0)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(len(LABELS))]
    x_T = np.stack([jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]) for key in keys])
    assert_close(x_0, 80 * x_T, 1e-5)


SCRIPT = """
import pathlib, sys
import jax, numpy as np
from dit_jax import conditions
from dit_jax.sampling import generate, runs
workdir, out, *pair = sys.argv[1:]
if pair:
    jax.distributed.initialize(pair[0], 2, int(pair[1]))
trained = runs.load(pathlib.Path(workdir))
request = conditions.from_labels(np.arange(8), 10)
arguments = trained.params, request, 0, trained.mesh, lambda x_0: x_0
x_0 = generate.generate(trained.make_sample_fn(), *arguments, batch_size=4)
if jax.process_index() == 0:
    np.save(out, x_0)
"""


@pytest.mark.slow
def test_two_hosts_draw_the_bits_of_one(trained_workdir, tmp_path):
    """Two images to a device, two devices, in two processes or in one."""

    def start(devices, *arguments):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", SCRIPT, trained_workdir, *arguments]
        return subprocess.Popen(command, cwd=conftest.ROOT, env=os.environ | flags)

    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    pair = [start(1, tmp_path / "two.npy", address, str(i)) for i in range(2)]
    for process in (*pair, start(2, tmp_path / "one.npy")):
        assert process.wait(timeout=300) == 0
    one, two = (np.load(tmp_path / name) for name in ("one.npy", "two.npy"))
    assert one.dtype == np.float32
    np.testing.assert_array_equal(two, one)


def test_an_image_is_the_same_in_a_shorter_list(model, process, golden_params, expected):
    x_0 = _x_0(model, process, golden_params, labels=LABELS[:3])
    assert_close(x_0, expected[:3], 1e-5)


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


def test_x_t_begins_with_the_process_s_deviation(model, build_process, golden_params):
    """One DDIM step of the process edm from sigma_max: x_0 = c_skip x_T + c_out F, F bounded."""

    def std(sigma_max):
        process = build_process("edm", sigma_max=sigma_max, sigma_data=100.0)
        settings = dict(sampler="ddim", steps=1, cfg_scale=1.0)
        sample = generate.make_sample_fn(model, _settings(**settings), process, "edm", _mesh(1))
        images = generate.generate(
            sample, golden_params, REQUEST, 0, _mesh(1), to_image=lambda x_0: x_0
        )
        return images.std()

    c_skip = 1e4 / (10.0**2 + 1e4)
    assert std(10.0) == pytest.approx(10 * c_skip, rel=0.3)


def _counted(monkeypatch, model):
    """The batch sizes with which the model is traced."""
    batches, apply = [], type(model).__call__

    def counted(self, x_t, *arguments):
        batches.append(x_t.shape[0])
        return apply(self, x_t, *arguments)

    monkeypatch.setattr(type(model), "__call__", counted)
    return batches


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(cfg_scale=1.0), {10}),
        (dict(cfg_scale=2.0), {20}),
        (dict(cfg_scale=2.0, cfg_interval=(0.3, 0.7)), {10, 20}),
        (dict(cfg_scale=1.0, cfg_interval=(0.3, 0.7)), {10}),
    ],
    ids=str,
)
def test_unguided_steps_run_no_unconditional_pass(
    model, process, golden_params, monkeypatch, changes, expected
):
    batches = _counted(monkeypatch, model)
    _x_0(model, process, golden_params, **changes)
    assert set(batches) == expected


def test_interval_guides_its_steps_alone(model, process, golden_params):
    """All of 0..1 is plain guidance; a late interval leaves the first steps unguided."""

    def x_0(**changes):
        return _x_0(model, process, golden_params, cfg_scale=3.0, sampler="ddim", **changes)

    np.testing.assert_array_equal(x_0(), x_0(cfg_interval=(0.0, 1.0)))
    late, none = (
        x_0(cfg_interval=(0.0, 0.5)),
        _x_0(model, process, golden_params, cfg_scale=1.0, sampler="ddim"),
    )
    assert np.abs(late - x_0()).max() > 1e-3
    assert np.abs(late - none).max() > 1e-3


def test_forward_passes_are_counted(process):
    def passes(**changes):
        return generate.forward_passes(_settings(**changes), process, "eps")

    assert passes(cfg_scale=1.0, steps=10) == 10
    assert passes(cfg_scale=2.0, steps=10) == 20
    assert passes(cfg_scale=2.0, steps=10, cfg_interval=(0.0, 0.5)) == 15
    assert passes(cfg_scale=1.0, steps=10, sampler="heun") == 19


def test_a_model_guided_by_itself_is_not_guided(model, process, golden_params):
    """And by another it is."""
    mesh, settings = _mesh(1), _settings(cfg_scale=2.0, cfg_channels=0, sampler="ddim")
    sample = generate.make_sample_fn(model, settings, process, "eps", mesh, guide=model)

    def x_0(guide_params):
        bound = functools.partial(sample, guide_params=guide_params)
        return generate.generate(bound, golden_params, REQUEST, 0, mesh, to_image=lambda x_0: x_0)

    plain = _x_0(model, process, golden_params, cfg_scale=1.0, sampler="ddim")
    assert_close(x_0(golden_params), plain, 1e-5)
    other = jax.tree.map(lambda p: 0.9 * p, golden_params)
    assert np.abs(x_0(other) - plain).max() > 1e-3


def test_another_model_guides_as_the_null_class_does(model, process, golden_params):
    """Its channels and rescaling are those of the settings."""
    worse = jax.tree.map(lambda p: 0.9 * p, golden_params)

    def x_0(**changes):
        settings = _settings(steps=2, cfg_scale=2.0, sampler="ddim", **changes)
        sample = generate.make_sample_fn(model, settings, process, "eps", _mesh(1), guide=model)
        index = np.arange(3, dtype=np.int32)
        arguments = golden_params, jax.random.key(0), index
        return np.asarray(sample(*arguments, **REQUEST.rows(index), guide_params=worse)[0])

    three, four = x_0(), x_0(cfg_channels=0)
    assert np.abs(three - four)[..., 3].max() > 1e-3
    assert np.abs(three - x_0(cfg_rescale=0.7)).max() > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(cfg_scale=3.0, cfg_interval=(0.5, 1.0))], ids=str)
def test_x_0_is_clipped_in_steps_that_are_not_guided_too(model, process, golden_params, changes):
    settings = dict(sampler="ddim", cfg_scale=1.0, labels=LABELS[:3]) | changes
    arguments = model, process, golden_params
    assert np.abs(_x_0(*arguments, **settings)).max() > 1.01
    assert np.abs(_x_0(*arguments, clip_x_0=True, **settings)).max() <= 1 + 1e-6


def test_nan_names_the_step_and_the_images(model, process, golden_params):
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), golden_params)
    turns = iter([golden_params, broken])
    healthy = generate.make_sample_fn(model, _settings(), process, "eps", _mesh(1))

    def sample(params, *arguments, **batch):
        return healthy(next(turns), *arguments, **batch)

    request = conditions.from_labels(LABELS[:8], 7)
    with pytest.raises(FloatingPointError, match="at step 1 of 5, among the images 4 to 7"):
        generate.generate(sample, {}, request, 0, _mesh(1), lambda x_0: x_0, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampler="plms"), "unknown sampler='plms'; choose one of ddpm, ddim"),
        (dict(cfg_interval=(0.61, 0.62)), "=1.5 guides no step: .* cfg_interval=0.61,0.62. .* 1, "),
        (dict(cfg_channels=5), r"cfg_channels=5 must lie in 0 \(all\) .. 4"),
        (dict(cfg_interval=(0.8, 0.2)), "cfg_interval=0.8,0.2 must be two numbers, low < high"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(model, process, change, message):
    with pytest.raises(ValueError, match=message):
        generate.make_sample_fn(model, _settings(**change), process, "eps", _mesh(1))


def test_guidance_without_a_null_class_is_refused(model, process):
    model = model.clone(null_condition=False)
    arguments = process, "eps", _mesh(1)
    with pytest.raises(ValueError, match="trained with null_condition=False"):
        generate.make_sample_fn(model, _settings(), *arguments)
    generate.make_sample_fn(model, _settings(cfg_scale=1.0), *arguments)
    generate.make_sample_fn(model, _settings(), *arguments, guide=model)
    with pytest.raises(ValueError, match="a guide without --cfg_scale above 1"):
        generate.make_sample_fn(model, _settings(cfg_scale=1.0), *arguments, guide=model)


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (10, 20, 30)])
    grid = pictures.image_grid(images, columns=2, cell=4, gap=1)
    assert grid.shape == (9, 9, 3)
    assert (grid[:4, :4] == 10).all()
    assert (grid[:4, 5:] == 20).all()
    assert (grid[5:, :4] == 30).all()
    assert (grid[5:, 5:] == 128).all()  # no fourth image
    assert (grid[4] == 128).all()


@pytest.mark.parametrize(
    ("size", "channels"), [(8, 1), (20, 3), (64, 3), ((8, 12), 1), ((64, 40), 3)]
)
def test_grid_is_split_into_its_images(size, channels):
    shape = (5, *sizes.height_and_width(size), channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    grid = pictures.image_grid(images, columns=3)
    split = pictures.split_grid(grid, size)
    assert split.shape == (6, *shape[1:3], 3)
    np.testing.assert_array_equal(split[:5], images.repeat(3 // channels, axis=-1))
    assert (split[5] == 128).all()
    with pytest.raises(ValueError, match="are no grid of images of 9 x 9 pixels"):
        pictures.split_grid(grid, 9)
