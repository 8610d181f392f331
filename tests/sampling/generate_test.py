"""A sample depends on parameters, seed, index and label, not on batches or devices."""

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


def _make_settings(**changes):
    config = default.get_config().sample
    config.update(dict(steps=5, cfg_channels=3) | changes)
    return config


def _make_mesh(num_devices):
    devices = jax.devices()[:num_devices]
    return sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), devices)


LABELS = np.array([0, 3, 6, 1, 2, 5, 4, 0, 1, 6])
REQUEST = conditions.from_labels(LABELS, 7)


def _sample(
    model,
    process,
    params,
    num_devices=1,
    batch_size=None,
    seed=0,
    labels=LABELS,
    prediction="eps",
    **changes,
):
    """Samples x_0 of these labels, with changed settings."""
    mesh, request = _make_mesh(num_devices), conditions.from_labels(labels, 7)
    sample = generate.make_sample_fn(model, _make_settings(**changes), process, prediction, mesh)
    return generate.generate(
        sample, params, request, seed, mesh, to_image=lambda x_0: x_0, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def expected(model, process, golden_params):
    return _sample(model, process, golden_params)


def test_guided_samples_equal_the_published_ones(model, process, golden, golden_params):
    """The labels are guided away from the null class; x_T is that of the published samples."""
    settings = _make_settings(sampler="ddim", steps=10, cfg_scale=1.5)
    arguments = model, settings, process, "eps", _make_mesh(1)
    sample = generate.make_sample_fn(*arguments, edit=edits.FromNoise)
    request = conditions.from_labels(golden["y"], 7)
    index = np.arange(len(golden["y"]), dtype=np.int32)
    x_T = jnp.asarray(golden["x_0"])
    x_0, _ = sample(golden_params, jax.random.key(0), index, **request.rows(index), x_T=x_T)
    expected = golden["ddim_cfg1.5_sample"]
    assert_close(x_0, expected, 2e-5)
    without_edit = generate.make_sample_fn(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x_T'"):
        without_edit(golden_params, jax.random.key(0), index, **request.rows(index), x_T=x_T)


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 4), (8, 8), (4, 3)])
def test_samples_do_not_depend_on_batches_or_devices(
    model, process, golden_params, expected, num_devices, batch_size
):
    x_0 = _sample(model, process, golden_params, num_devices, batch_size)
    assert x_0.shape == (10, 8, 8, 4)
    assert_close(x_0, expected, 1e-5)


def test_equal_shapes_per_device_give_equal_bits(model, process, golden_params):
    """Two images on each device, of one device or four."""
    one = _sample(model, process, golden_params, num_devices=1, batch_size=2)
    four = _sample(model, process, golden_params, num_devices=4, batch_size=8)
    np.testing.assert_array_equal(one, four)


def test_noise_of_the_first_step_differs_from_that_of_the_start(model, process, golden_params):
    """With a network of zeros and two steps, x_0 is a sum of x_T and the noise of one step."""
    zeros = jax.tree.map(jnp.zeros_like, golden_params)
    x_0 = _sample(model, process, zeros, sampler="ddpm", steps=2, cfg_scale=1.0)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(len(LABELS))]
    x_T = np.stack([jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]) for key in keys])
    grid = grids.build(process, 2)
    alpha, to_next = process.alpha(grid), process.posterior(grid[:-1], grid[1:])
    start_coef = (to_next.x_0_coef[0] / alpha[0] + to_next.x_t_coef[0]) / alpha[1]
    noise = x_0 - start_coef * x_T
    assert np.std(noise) > 0.1
    assert abs(np.corrcoef(noise.ravel(), x_T.ravel())[0, 1]) < 0.1


def test_sampling_starts_with_the_deviation_of_the_process(model, build_process, golden_params):
    """A network of zeros keeps the x_T of edm, which is 80 times as large as N(0, I)."""
    zeros, process = jax.tree.map(jnp.zeros_like, golden_params), build_process("edm")
    x_0 = _sample(model, process, zeros, sampler="euler", grid="karras", cfg_scale=1.0)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(len(LABELS))]
    x_T = np.stack([jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]) for key in keys])
    assert_close(x_0, 80 * x_T, 1e-5)


SCRIPT = """
import dataclasses, pathlib, sys
import jax, numpy as np
from dit_jax import conditions
from dit_jax.sampling import runs
workdir, out, *cluster = sys.argv[1:]
if cluster:
    address, process_index = cluster
    jax.distributed.initialize(address, 2, int(process_index))
trained = dataclasses.replace(runs.load(pathlib.Path(workdir)), to_image=lambda x_0: x_0)
x_0 = trained.generate(conditions.from_labels(np.arange(8), 10), seed=0, batch_size=4)
if jax.process_index() == 0:
    np.save(out, x_0)
"""


@pytest.mark.slow
def test_two_processes_draw_the_same_bits_as_one(trained_workdir, tmp_path):
    """Two devices with two images each belong to two processes or to one."""

    def start(num_devices, *arguments):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
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


def test_image_does_not_depend_on_the_number_of_images(model, process, golden_params, expected):
    x_0 = _sample(model, process, golden_params, labels=LABELS[:3])
    assert_close(x_0, expected[:3], 1e-5)


def test_seed_index_and_label_each_change_the_image(model, process, golden_params, expected):
    def differ(a, b):
        return np.abs(a - b).max() > 1e-3

    assert differ(_sample(model, process, golden_params, seed=1)[0], expected[0])
    assert differ(expected[0], expected[7])  # two indices with the same label
    other_labels = np.where(LABELS == 0, 1, LABELS)
    assert differ(_sample(model, process, golden_params, labels=other_labels)[0], expected[0])


def test_ddim_is_deterministic_and_differs_from_ddpm(model, process, golden_params, expected):
    ddim = _sample(model, process, golden_params, sampler="ddim")
    np.testing.assert_array_equal(ddim, _sample(model, process, golden_params, sampler="ddim"))
    assert np.abs(ddim - expected).max() > 1e-3
    noisy = _sample(model, process, golden_params, sampler="ddim", eta=1.0)
    assert np.abs(ddim - noisy).max() > 1e-3


def test_samples_scale_with_sigma_max(model, build_process, golden_params):
    """One DDIM step of the process edm: x_0 = c_skip x_T + c_out F, with a bounded F."""

    def compute_deviation(sigma_max):
        process = build_process("edm", sigma_max=sigma_max, sigma_data=100.0)
        settings = dict(prediction="edm", sampler="ddim", steps=1, cfg_scale=1.0)
        return _sample(model, process, golden_params, **settings).std()

    c_skip = 1e4 / (10.0**2 + 1e4)
    assert compute_deviation(10.0) == pytest.approx(10 * c_skip, rel=0.3)


def _record_batch_sizes(monkeypatch, model):
    """Returns a list to which each trace of the model adds its batch size."""
    batch_sizes, apply = [], type(model).__call__

    def record(self, x_t, *arguments):
        batch_sizes.append(x_t.shape[0])
        return apply(self, x_t, *arguments)

    monkeypatch.setattr(type(model), "__call__", record)
    return batch_sizes


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
def test_unguided_steps_skip_the_unconditional_pass(
    model, process, golden_params, monkeypatch, changes, expected
):
    batch_sizes = _record_batch_sizes(monkeypatch, model)
    _sample(model, process, golden_params, **changes)
    assert set(batch_sizes) == expected


def test_interval_guides_only_its_steps(model, process, golden_params):
    """The interval 0..1 guides all steps; a late interval leaves the first steps unguided."""

    def sample(**changes):
        return _sample(model, process, golden_params, cfg_scale=3.0, sampler="ddim", **changes)

    np.testing.assert_array_equal(sample(), sample(cfg_interval=(0.0, 1.0)))
    late = sample(cfg_interval=(0.0, 0.5))
    unguided = _sample(model, process, golden_params, cfg_scale=1.0, sampler="ddim")
    assert np.abs(late - sample()).max() > 1e-3
    assert np.abs(late - unguided).max() > 1e-3


def test_forward_passes_are_counted(process):
    def count(**changes):
        return generate.count_forward_passes(_make_settings(**changes), process, "eps")

    assert count(cfg_scale=1.0, steps=10) == 10
    assert count(cfg_scale=2.0, steps=10) == 20
    assert count(cfg_scale=2.0, steps=10, cfg_interval=(0.0, 0.5)) == 15
    assert count(cfg_scale=1.0, steps=10, sampler="heun") == 19


def test_guide_has_an_effect_only_if_it_differs_from_the_model(model, process, golden_params):
    mesh, settings = _make_mesh(1), _make_settings(cfg_scale=2.0, cfg_channels=0, sampler="ddim")
    sample = generate.make_sample_fn(model, settings, process, "eps", mesh, guide=model)

    def sample_with(guide_params):
        bound = functools.partial(sample, guide_params=guide_params)
        return generate.generate(bound, golden_params, REQUEST, 0, mesh, to_image=lambda x_0: x_0)

    unguided = _sample(model, process, golden_params, cfg_scale=1.0, sampler="ddim")
    assert_close(sample_with(golden_params), unguided, 1e-5)
    worse = jax.tree.map(lambda p: 0.9 * p, golden_params)
    assert np.abs(sample_with(worse) - unguided).max() > 1e-3


def test_cfg_channels_and_cfg_rescale_apply_to_a_guide_too(model, process, golden_params):
    worse = jax.tree.map(lambda p: 0.9 * p, golden_params)

    def sample_guided(**changes):
        settings = _make_settings(steps=2, cfg_scale=2.0, sampler="ddim", **changes)
        sample = generate.make_sample_fn(
            model, settings, process, "eps", _make_mesh(1), guide=model
        )
        index = np.arange(3, dtype=np.int32)
        arguments = golden_params, jax.random.key(0), index
        return np.asarray(sample(*arguments, **REQUEST.rows(index), guide_params=worse)[0])

    three_channels, four_channels = sample_guided(), sample_guided(cfg_channels=0)
    assert np.abs(three_channels - four_channels)[..., 3].max() > 1e-3
    assert np.abs(three_channels - sample_guided(cfg_rescale=0.7)).max() > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(cfg_scale=3.0, cfg_interval=(0.5, 1.0))], ids=str)
def test_x_0_is_clipped_in_guided_and_unguided_steps(model, process, golden_params, changes):
    settings = dict(sampler="ddim", cfg_scale=1.0, labels=LABELS[:3]) | changes
    arguments = model, process, golden_params
    assert np.abs(_sample(*arguments, **settings)).max() > 1.01
    assert np.abs(_sample(*arguments, clip_x_0=True, **settings)).max() <= 1 + 1e-6


def test_error_for_nan_has_the_step_and_the_images(model, process, golden_params):
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), golden_params)
    params_of_batches = iter([golden_params, broken])
    sample_batch = generate.make_sample_fn(model, _make_settings(), process, "eps", _make_mesh(1))

    def sample(params, *arguments, **batch):
        return sample_batch(next(params_of_batches), *arguments, **batch)

    request = conditions.from_labels(LABELS[:8], 7)
    with pytest.raises(FloatingPointError, match="at step 1 of 5, among the images 4 to 7"):
        generate.generate(sample, {}, request, 0, _make_mesh(1), lambda x_0: x_0, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampler="plms"), "unknown sampler='plms'; choose one of ddpm, ddim"),
        (dict(cfg_interval=(0.61, 0.62)), "=1.5 guides no step: .* cfg_interval=0.61,0.62. .* 1, "),
        (dict(cfg_channels=5), r"cfg_channels=5 must be in 0\.\.4"),
        (dict(cfg_interval=(0.8, 0.2)), "cfg_interval=0.8,0.2 must be two numbers, low < high"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(model, process, change, message):
    with pytest.raises(ValueError, match=message):
        generate.make_sample_fn(model, _make_settings(**change), process, "eps", _make_mesh(1))


def test_guidance_without_a_null_class_is_refused(model, process):
    model = model.clone(null_condition=False)
    arguments = process, "eps", _make_mesh(1)
    with pytest.raises(ValueError, match="trained with null_condition=False"):
        generate.make_sample_fn(model, _make_settings(), *arguments)
    generate.make_sample_fn(model, _make_settings(cfg_scale=1.0), *arguments)
    generate.make_sample_fn(model, _make_settings(), *arguments, guide=model)
    with pytest.raises(ValueError, match="a guide has no effect with cfg_scale=1"):
        generate.make_sample_fn(model, _make_settings(cfg_scale=1.0), *arguments, guide=model)


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
