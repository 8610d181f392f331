"""Edits keep the known parts, interpolations end at their ends, and inversions lead back."""

import dataclasses
import itertools
import pathlib

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close
from helpers.mixture import Mixture
from PIL import Image

from configs import default, smoke
from dit_jax import conditions, latents
from dit_jax.diffusion import edits, grids, samplers, solvers
from dit_jax.sampling import editing, runs

NORMAL = Mixture((1.0,), (0.7,), (0.5,))
DDIM = dict(sampler="ddim", steps=10, cfg_scale=1.0)


@pytest.fixture(scope="module")
def trained(trained_workdir):
    return runs.load(trained_workdir, settings=DDIM)


def _draw_x_0(trained):
    """Returns a model that draws x_0 instead of images."""
    return dataclasses.replace(trained, to_image=lambda x_0: x_0)


@pytest.fixture
def image():
    """Grey, darker to the right, [1, 8, 8, 1] uint8."""
    row = np.linspace(255, 0, 8).astype(np.uint8)
    return np.broadcast_to(row, (8, 8)).reshape(1, 8, 8, 1)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        ("ddpm", "ddpm"),
        ("ddpm", "ddim"),
        ("ddpm", "dpmpp2m"),
        ("vp", "dpmpp2m_sde"),
        ("vp", "euler"),
        ("flow", "ab4"),
        ("edm", "heun"),
    ],
)
def test_inpainting_keeps_known_values_and_draws_the_others_from_the_data(
    build_process, process, sampler
):
    process = build_process(process)
    config = default.get_config().sample
    config.update(sampler=sampler, steps=40, grid="karras" if sampler == "heun" else "uniform")
    built = samplers.build(config, process, "eps")
    x_0 = jnp.linspace(-3, 3, 4000).reshape(1, 1000, 4)
    mask = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0, 0.0]), x_0.shape)

    def noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x_0.shape)

    denoise = NORMAL.denoise(process, built.times)
    denoise = edits.Inpaint(x_0, mask).wrap(denoise, process, built.times)
    problem = solvers.Problem(process, built.grid, [(denoise, 40)], noise)
    x, _ = built.solve(problem, process.x_T_std * noise(100))
    known = np.asarray(mask) == 0
    assert_close(np.asarray(x)[known], np.asarray(x_0)[known], 5e-4)
    new = np.asarray(x)[~known]
    assert new.mean() == pytest.approx(0.7, abs=0.1)
    assert new.std() == pytest.approx(0.5, abs=0.1)


@pytest.fixture(scope="module")
def latent(vae_dir, tmp_path_factory):
    """A model of the tiny VAE's latents, with random parameters."""
    config = smoke.get_config()
    config.model.update(input_size=4, in_channels=2)
    config.latents.update(source="moments", vae=str(vae_dir), scale=(0.5, 2.0), shift=(0.1, -0.3))
    workdir = conftest.save_random(tmp_path_factory.mktemp("runs") / "latent", config)
    return runs.load(workdir, settings=DDIM | dict(steps=4))


def test_latents_of_an_image_are_its_scaled_posterior_mean(latent, image):
    """Decoding them gives the reconstruction of the VAE."""
    x_0 = editing.encode(latent, image)
    mean, _ = latents.posterior(jax.jit(latents.encode)(latent.vae, image))
    assert x_0.shape == (1, 4, 4, 2)
    expected = (np.asarray(mean) - [0.1, -0.3]) * [0.5, 2.0]
    assert_close(x_0, expected, 7e-6)
    decoded = latent.to_image(jnp.asarray(x_0.repeat(8, 0)))[:1]
    difference = np.asarray(decoded).astype(int) - latents.reconstruct(latent.vae, image)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddim_level1"])
def test_inpainting_keeps_the_latents_outside_the_mask(latent, image, sampler):
    """Sampler ddim_level1 leaves noise in what it draws, but not in the latents that are kept."""
    config = latent.config.copy_and_resolve_references()
    config.sample.update(sampler=sampler, grid="leading")
    latent = dataclasses.replace(latent, config=config)
    mask = np.zeros((1, 4, 4, 1), np.float32)
    mask[:, 1:3, 2:] = 1
    x_0 = editing.encode(latent, image)
    request = editing.EditRequest(conditions.from_labels([3, 5], 10), edits.Inpaint(x_0, mask))
    drawn = editing.draw(_draw_x_0(latent), request)
    known_error = np.abs(drawn - x_0)[np.broadcast_to(mask == 0, drawn.shape)]
    assert known_error.max() < 1e-6 * np.abs(x_0).max()
    new_difference = np.abs(drawn - x_0)[np.broadcast_to(mask == 1, drawn.shape)]
    assert np.median(new_difference) > 1e-2
    assert editing.draw(latent, request).shape == (2, 8, 8, 1)


def test_strength_is_the_share_of_the_steps():
    grid = np.linspace(1, 0, 11)
    np.testing.assert_array_equal(grids.take_last(grid, 1.0), grid)
    assert_close(grids.take_last(grid, 0.3), [0.3, 0.2, 0.1, 0.0], 1e-12)
    assert_close(grids.take_last(grid, 0.01), [0.1, 0.0], 1e-12)
    for strength in (0.0, 1.1, -0.5):
        with pytest.raises(ValueError, match=rf"strength={strength} must be in \(0, 1\]"):
            grids.take_last(grid, strength)


def test_edit_with_less_strength_is_nearer_to_the_image(trained, image):
    x_0 = editing.encode(trained, image)
    assert_close(x_0, image / 127.5 - 1, 1e-6)
    request, edit = conditions.from_labels([3, 3, 5], 10), edits.ImageToImage(x_0)

    def measure_distance(strength):
        drawn = editing.draw(trained, editing.EditRequest(request, edit), 0, strength)
        assert drawn.shape == (3, 8, 8, 1)
        assert not np.array_equal(drawn[0], drawn[1])  # the noise differs
        return np.abs(drawn.astype(float) - image).mean()

    distances = [measure_distance(strength) for strength in (0.1, 0.5, 1.0)]
    assert distances[0] < 15
    assert distances == sorted(distances)
    assert distances[2] > 3 * distances[0]


def test_inpainting_keeps_the_image_outside_the_mask(trained, image):
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, 2:5, 2:5] = 1
    request = conditions.from_labels([3, 5], 10)
    edit = edits.Inpaint(editing.encode(trained, image), mask)
    drawn = editing.draw(trained, editing.EditRequest(request, edit))
    known = np.broadcast_to(mask == 0, drawn.shape)
    difference = np.abs(drawn.astype(int) - image)
    assert difference[known].max() <= 1  # truncation
    assert difference[~known].max() > 20


def test_ends_of_an_interpolation_are_images_that_sample_draws(trained):
    first, second = (conditions.from_labels(5 * [label], 10) for label in (3, 8))
    row = editing.draw(trained, editing.make_interpolation(first, second, (2, 7)))
    assert row.shape == (5, 8, 8, 1)
    request = conditions.from_labels([0, 0, 3, 0, 0, 0, 0, 8], 10)
    drawn = trained.generate(request, seed=0)
    for end, index in ((0, 2), (-1, 7)):
        assert np.abs(row[end].astype(int) - drawn[index]).max() <= 1
    assert all(np.abs(a.astype(int) - b).max() > 2 for a, b in itertools.pairwise(row))


def test_interpolation_between_equal_images_has_their_noise(trained):
    # Rounded pixels may hide a difference.
    trained = _draw_x_0(trained)
    request = conditions.from_labels(3 * [3], 10)
    row = editing.draw(trained, editing.make_interpolation(request, request, (2, 2)))
    drawn = trained.generate(request, seed=0)
    assert_close(row, np.broadcast_to(drawn[2], row.shape), 1e-5)


def test_requests_for_the_ends_of_an_interpolation(trained):
    first, last = editing.parse_ends(trained, 3, labels="3,8")
    assert [first.cond.tolist(), last.cond.tolist()] == [[3] * 3, [8] * 3]
    for labels in ("", "1,2,3", "3,"):
        with pytest.raises(
            ValueError, match=f"takes one or two values of --labels, not --labels={labels}"
        ):
            editing.parse_ends(trained, 3, labels=labels)
    with pytest.raises(ValueError, match="--prompt=a three: this model takes --labels"):
        editing.parse_ends(trained, 3, labels="3", prompt=["a three"])
    config = trained.config.copy_and_resolve_references()
    config.model.num_classes = 0
    without_classes = editing.parse_ends(dataclasses.replace(trained, config=config), 3)
    assert [end.cond.tolist() for end in without_classes] == [[0] * 3] * 2


def test_interpolated_noise_has_unit_variance():
    noise = jax.random.normal(jax.random.key(0), (2, 3, 10_000))
    share = jnp.array([0.0, 0.3, 1.0])
    mixed = edits.interpolate(noise[0], noise[1], share)
    assert np.abs(mixed.std(axis=1) - 1).max() < 0.03
    assert_close(mixed[0], noise[0, 0], 2.5e-7)
    assert_close(mixed[2], noise[1, 2], 2.5e-7)


def test_predictions_are_mixed_by_the_share_of_the_second():
    predict = edits.mix(lambda x, t: x, lambda x, t: 5 * x, jnp.array([0.0, 0.25, 1.0]))
    mixed = predict(jnp.ones((3, 2, 2, 1)), jnp.zeros(3))
    assert_close(mixed[:, 0, 0, 0], [1, 2, 5], 1e-7)


def test_inverted_noise_leads_to_the_image_only_with_its_class(trained_workdir):
    trained = _draw_x_0(runs.load(trained_workdir, settings=DDIM | dict(steps=100)))
    request = conditions.from_labels([3], 10)
    x_0 = trained.generate(request, seed=0)
    x_T = editing.invert(trained, request, x_0)
    assert x_T.shape == x_0.shape

    def draw_again(label):
        edit = edits.FromNoise(x_T)
        request = editing.EditRequest(conditions.from_labels([label], 10), edit)
        return editing.draw(trained, request)

    assert np.abs(draw_again(3) - x_0).mean() < 0.1 * np.abs(x_0).mean()
    assert np.abs(draw_again(8) - draw_again(3)).max() > 1e-3


def test_inversion_clips_x_0_if_samples_are_clipped(smoke_config, tmp_path):
    """Random weights lead far beyond the range of pixels, so an unclipped inversion would fail."""
    workdir = conftest.save_random(tmp_path / "run", smoke_config)
    settings = DDIM | dict(steps=100, cfg_scale=1.0, clip_x_0=True)
    trained = _draw_x_0(runs.load(workdir, settings=settings))
    request = conditions.from_labels([3], 10)
    x_0 = trained.generate(request, seed=0)
    edit = edits.FromNoise(editing.invert(trained, request, x_0))
    drawn_again = editing.draw(trained, editing.EditRequest(request, edit))
    assert np.abs(drawn_again - x_0).mean() < 0.1 * np.abs(x_0).mean()


def test_only_ddim_is_inverted(trained_workdir):
    trained = runs.load(trained_workdir, settings=DDIM | dict(sampler="dpmpp2m"))
    with pytest.raises(ValueError, match=r"sampler='dpmpp2m' with eta=0.0 cannot be inverted. Set"):
        editing.invert(trained, conditions.from_labels([3], 10), np.zeros((1, 8, 8, 1)))


def _save(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def test_value_of_x_0_is_new_if_one_of_its_pixels_is(trained, tmp_path):
    config = trained.config.copy_and_resolve_references()
    config.model.input_size = 4
    pixels = np.zeros((8, 8))
    pixels[2, 5] = 255
    path = _save(tmp_path / "m.png", pixels)
    mask = editing.read_mask(path, _save(tmp_path / "a.png", pixels), config)
    assert mask.shape == (1, 4, 4, 1)
    assert np.argwhere(mask[0, ..., 0]).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((8, 8)), "m.png is black all over the crop of 8 x 8 pixels"),
        (np.full((8, 8), 255), "m.png is white all over"),
        (np.zeros((6, 8)), r"m.png has 8 x 6 pixels, but --image=\S+a.png has 8 x 8. Give both"),
    ],
    ids=["black", "white", "another size"],
)
def test_useless_masks_are_refused(trained, tmp_path, pixels, message):
    path = _save(tmp_path / "m.png", pixels)
    with pytest.raises(ValueError, match=message):
        editing.read_mask(path, _save(tmp_path / "a.png", np.zeros((8, 8))), trained.config)


def test_images_and_masks_of_16_bits_become_8_bits(trained, tmp_path):
    pixels = 257 * np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = editing.read_image(tmp_path / "a.png", trained.config)
    np.testing.assert_array_equal(read[0, ..., 0], np.arange(64).reshape(8, 8))
    mask = np.where(pixels < 257 * 8, 32_000, 33_000).astype(np.uint16)
    Image.fromarray(mask).save(tmp_path / "m.png")
    mask = editing.read_mask(tmp_path / "m.png", tmp_path / "a.png", trained.config)
    np.testing.assert_array_equal(mask[0, ..., 0], np.arange(64).reshape(8, 8) >= 8)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "f.png", "TIFF")
    with pytest.raises(ValueError, match=r"image --image=\S*f.png: it is a TIFF image; PNG, JPEG"):
        editing.read_image(tmp_path / "f.png", trained.config)


def test_image_has_the_same_pixels_as_in_training(trained, tmp_path, caplog):
    """An EXIF orientation is not applied and gives a warning. A mask fits the stored pixels."""
    path = tmp_path / "train" / "0.jpg"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a rotation by 90 degrees
    noise = np.random.default_rng(0).integers(0, 256, (20, 31), np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    config = trained.config.copy_and_resolve_references()
    config.data.update(source="folder", name=str(tmp_path))
    example = conditions.open_images(config, "train", labels=False)[0]
    read = editing.read_image(path, trained.config)
    np.testing.assert_array_equal(read[0], example["image"])
    assert f"--image={path} has EXIF orientation 6, which is not applied, as in t" in caplog.text
    mask = np.zeros((20, 31), np.uint8)
    mask[:10] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert editing.read_mask(tmp_path / "m.png", path, trained.config)[0, :, :, 0].any()


def test_transparent_images_are_refused(trained, tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, :3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert editing.read_image(tmp_path / "a.png", trained.config)[0, :4].max() == 0
    pixels[2, 2, 3] = 254
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"--mask=\S*m.png has transparent pixels. Save"):
        editing.read_mask(tmp_path / "m.png", tmp_path / "a.png", trained.config)


def test_damaged_images_are_named(trained, tmp_path):
    path = tmp_path / "a.png"
    _save(path, np.random.default_rng(0).integers(0, 256, (64, 64)))
    path.write_bytes(path.read_bytes()[:2000])
    for text in (None, "not an image"):
        if text:
            path.write_text(text)
        with pytest.raises(ValueError, match=r"cannot read the image --image=\S*a.png: "):
            editing.read_image(path, trained.config)
    with pytest.raises(FileNotFoundError, match=r"no file --image=nowhere.png"):
        editing.read_image(pathlib.Path("nowhere.png"), trained.config)


def test_command_inverts_and_draws_again_without_guidance(
    run_command, smoke_config, image, tmp_path
):
    workdir = conftest.save_random(tmp_path / "run", smoke_config, spread=0.1)
    flags = ["--workdir", workdir, "--steps", 4, "--sampler", "ddim", "--labels", "3"]
    flags += ["--image", _save(tmp_path / "a.png", image[0, ..., 0]), "--out", tmp_path / "b.png"]
    run_command("edit", "invert", *flags)
    actual = np.asarray(Image.open(tmp_path / "b.png"))[::6, 50::6, 0].astype(int)

    def measure_difference(cfg_scale):
        trained = runs.load(workdir, settings=DDIM | dict(steps=4, cfg_scale=cfg_scale))
        request, _ = editing.parse_before_and_after(trained, labels="3")
        x_T = editing.invert(trained, request, editing.encode(trained, image))
        drawn = editing.draw(trained, editing.EditRequest(request, edits.FromNoise(x_T)))
        return np.abs(drawn[0, ..., 0] - actual).max()

    assert measure_difference(1.0) <= 1
    assert measure_difference(1.5) > 5  # the scale of the run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"invert needs the class of the image, .* Set --labels to a class in 0\.\.9"),
        (dict(labels="random"), "--labels=random: invert takes a single value"),
        (
            dict(labels="3", after=dict(labels="8,9")),
            "--labels_after=8,9: invert takes a single value",
        ),
        (
            dict(labels="3", after=dict(prompt="a cat")),
            "--prompt_after=a cat: this model takes --labels",
        ),
        (dict(labels="3", negative_prompt="a cat"), "--negative_prompt=a cat: this model takes"),
    ],
    ids=str,
)
def test_inversions_without_one_class_are_refused(trained, flags, message):
    with pytest.raises(ValueError, match=message):
        editing.parse_before_and_after(trained, **flags)


def test_requests_before_and_after_an_inversion(trained, captioned_workdir):
    before, after = editing.parse_before_and_after(trained, {"labels": "8"}, labels="3")
    assert (before.cond.tolist(), after.cond.tolist()) == ([3], [8])
    assert editing.parse_before_and_after(trained, labels="3")[1].cond.tolist() == [3]
    captioned = runs.load(captioned_workdir)
    before, after = editing.parse_before_and_after(
        captioned, {"prompt": "two"}, prompt=["one"], negative_prompt="three"
    )
    actual = [before.cond, after.cond, after.null]
    expected = conditions.build(captioned.config).request(["one", "two", "three"]).cond
    np.testing.assert_array_equal(np.concatenate(actual), expected)
    for flags, message in (
        (dict(prompt=["one", "two"]), r"--prompt=\['one', 'two'\]: invert takes a single value"),
        (
            dict(prompt=["one"], after={"labels": "3"}),
            r"--labels_after=3: this model takes --prompt_after",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            editing.parse_before_and_after(captioned, **flags)
    captioned = runs.load(captioned_workdir, settings=DDIM)
    with pytest.raises(
        ValueError, match=r"--negative_prompt='three' has no effect with cfg_scale=1"
    ):
        editing.parse_before_and_after(captioned, prompt=["one"], negative_prompt="three")


@pytest.mark.parametrize("indices", [(-1, 2), (0, 2**31)])
def test_indices_out_of_range_are_refused(indices):
    request = conditions.from_labels([3, 3], 10)
    with pytest.raises(ValueError, match=r"--numbers=.* each be a whole number in 0\.\.21474"):
        editing.make_interpolation(request, request, indices)


@pytest.mark.parametrize("numbers", ["0,b", "1,2,3", f"{'9' * 5000},1"])
def test_numbers_flag_that_is_not_two_numbers_is_refused(
    run_command, trained_workdir, tmp_path, numbers
):
    flags = ["--workdir", trained_workdir, "--out", tmp_path / "x.png", f"--numbers={numbers}"]
    error = run_command("edit", "interpolate", *flags, fails=True)
    assert "must be 2 whole numbers with commas, such as 1,2" in error


@pytest.mark.parametrize("name", ["image", "mask"])
def test_picture_that_would_replace_the_image_is_refused(run_command, image, tmp_path, name):
    path = _save(tmp_path / "a.png", image[0, ..., 0])
    same = tmp_path / ".." / tmp_path.name / "a.png"
    flags = ["--workdir", tmp_path, "--out", same, f"--{name}", path]
    error = run_command("edit", "inpaint", *flags, fails=True)
    assert f"a.png would overwrite the file of --{name}: choose another file." in error


@pytest.mark.slow
def test_command_inpaints_or_refuses(run_command, trained_workdir, image, tmp_path):
    path, mask = tmp_path / "a.png", np.zeros((8, 8))
    _save(path, image[0, ..., 0])
    mask[2:5, 2:5] = 255
    flags = ["--workdir", trained_workdir, "--steps", 4, "--sampler", "ddim", "--labels", "3"]
    flags += ["--image", path, "--out", tmp_path / "b.png"]
    mask = ["--mask", _save(tmp_path / "m.png", mask)]
    out = run_command("edit", "inpaint", *flags, *mask, "--num", 2)
    assert "inpaint by step 40" in out
    assert Image.open(tmp_path / "b.png").size == (3 * 50 - 2, 48)
    error = run_command("edit", "invert", *flags, *mask, fails=True)
    assert "invert takes no --mask" in error
    error = run_command("edit", "inpaint", *flags, "--prompt", "a three", *mask, fails=True)
    assert ": this model takes --labels" in error
    assert "Traceback" not in error
