"""Measures of features with known answers, and the distance measured while training."""

import dataclasses

import numpy as np
import pytest
from helpers.close import assert_close

from dit_jax import train
from dit_jax.evaluation import (
    extractors,
    image_sets,
    measures,
    metrics,
    precision_recall,
    references,
)
from dit_jax.sampling import generate, requests
from dit_jax.training import initial_state, programs, sample_distance, tasks


@pytest.fixture(scope="module")
def real():
    """Three classes of 60 images; each class is a pixel pattern with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(180) % 3
    patterns = rng.integers(60, 200, (3, 4, 4, 1))
    noise = rng.integers(-20, 21, (180, 4, 4, 1))
    return (patterns[labels] + noise).astype(np.uint8), labels


@pytest.fixture(scope="module")
def reference(real, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, arr_0=real[0], label=real[1])
    return references.from_images(image_sets.open_npz(path), extractors.load("pixels"))


def _measure(pixels, labels, reference, class_names=None):
    features = pixels.reshape(len(pixels), -1).astype(np.float32) / 127.5 - 1
    inputs = measures.Inputs({"features": features}, reference, labels, class_names)
    return measures.measure_features(inputs)


def test_label_accuracy_is_the_share_of_labels_like_the_neighbours(real, reference):
    pixels, labels = real
    assert _measure(pixels, labels, reference)["label_accuracy"] == 1.0
    changed = labels.copy()
    changed[:45] = (changed[:45] + 1) % 3
    row = _measure(pixels, changed, reference)
    assert row["label_accuracy"] == pytest.approx(135 / 180)
    assert "label_accuracy" not in _measure(pixels, None, reference)


def test_labels_are_compared_by_name_where_both_have_names(real, reference, caplog):
    """The samples number the classes in another order, or have a class that the reference lacks."""
    pixels, labels = real
    named = dataclasses.replace(reference, class_names=("ant", "b\u00e9e", "cat"))
    reordered = np.array([2, 0, 1])[labels]

    def measure_accuracy(labels, names, reference):
        return _measure(pixels, labels, reference, names)["label_accuracy"]

    names = ("be\u0301e", "cat", "ant")  # é of two characters
    assert measure_accuracy(reordered, names, named) == 1.0
    assert measure_accuracy(reordered, None, named) == 0.0
    assert measure_accuracy(reordered, names, reference) == 0.0
    assert measure_accuracy(labels, None, named) == 1.0
    assert "has no classes" not in caplog.text
    assert measure_accuracy(reordered, ("b\u00e9e", "cow", "ant"), named) == pytest.approx(2 / 3)
    assert "has no classes cow: label_accuracy counts samples of them as wrong" in caplog.text


def test_fd_pixels_is_zero_for_the_real_images_and_grows_with_a_shift(real, reference):
    pixels, labels = real
    same = _measure(pixels, labels, reference)
    assert abs(same["fd_pixels"]) < 1e-9
    assert same["precision_pixels"] == same["recall_pixels"] == 1
    assert same["fd_pixels_real_halves"] > 0
    shifted = _measure(pixels + np.uint8(10), labels, reference)
    # Each of 16 pixels has shifted by 10 / 127.5; the covariances are equal.
    assert_close(shifted["fd_pixels"], 16 * (10 / 127.5) ** 2, 1e-5)


def test_measures_of_inception_have_the_published_names(toy_extractor, tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pixels[:70])
    reference = references.from_images(image_sets.open_npz(tmp_path / "real.npz"), toy_extractor)
    extracted = toy_extractor.apply(toy_extractor.params, pixels[70:])
    extracted = {name: np.asarray(array) for name, array in extracted.items()}
    row = measures.measure_features(measures.Inputs(extracted, reference))
    names = "fid sfid inception_score inception_score_std precision recall kid kid_std"
    assert list(row) == names.split()
    for name, kind in (("fid", "features"), ("sfid", "spatial")):
        gaussian = metrics.fit_gaussian(extracted[kind])
        expected = metrics.frechet_distance(gaussian, reference.gaussians[kind])
        assert_close(row[name], expected, 1e-9)
    assert row["fid"] != row["sfid"]
    score = metrics.inception_score(extracted["probabilities"])
    assert (row["inception_score"], row["inception_score_std"]) == score
    # Precision is the share of the samples, which are the first argument.
    features = extracted["features"], reference.features
    assert (row["precision"], row["recall"]) == precision_recall.compute(*features, half=True)
    assert "KID takes subsets of 70, not of the usual 1000" in caplog.text


def test_names_in_rows_belong_to_measures():
    bases = {"fid": "fid", "fd_pixels": "fd", "kid_dinov2_std": "kid", "recall_pixels": "recall"}
    bases |= {"fd_pixels_real_halves": "fd", "bits_per_latent_dim_prior": "bits_per_latent_dim"}
    for name, base in bases.items():
        assert measures.find(name) is measures.MEASURES[base]
    assert measures.find("fidelity") is measures.find("cfg_scale") is None


def test_names_of_distances():
    assert measures.distance_name("inception", "spatial") == "sfid"
    assert measures.distance_name("dinov2") == "fd_dinov2"


def test_distance_while_training_equals_that_of_its_samples(smoke_config):
    smoke_config.sample.cfg_scale = 2.0  # the distance uses config.fid.cfg_scale instead
    smoke_config.fid.update(every_steps=10, num_images=90, steps=3)
    program = programs.make_program(smoke_config)
    state = initial_state.new_state(program, train.jax.random.key(0))
    distance, settings = sample_distance.compile_distance(program.task, tasks.Frozen())
    row = distance(state.params)
    assert row == distance(state.params)
    assert list(row) == ["fd_pixels_90"] == [sample_distance.training_name(smoke_config)]

    smoke_config.sample.update(cfg_scale=1.0, steps=3)
    sample = generate.make_sample_fn(
        program.model, smoke_config.sample, program.task.process, "eps", program.mesh
    )
    request = requests.draw(smoke_config, "random", 90, smoke_config.seed)
    drawn = generate.generate(
        sample,
        state.params,
        request,
        smoke_config.seed,
        program.mesh,
        program.task.to_image(tasks.Frozen()),
    )
    real = references.load_for_run(smoke_config, "", extractors.load("pixels"))
    assert_close(row["fd_pixels_90"], _measure(drawn, None, real)["fd_pixels"], 1e-6)
    assert settings["reference"] == real.source["digest"]
    assert settings["extractor"] == real.extractor
    smoke_config.sample.update(cfg_scale=2.0, steps=250)  # the distance does not use these
    _, other_settings = sample_distance.compile_distance(program.task, tasks.Frozen())
    assert other_settings == settings


@pytest.mark.parametrize(("num", "name"), [(5_000, "fid5k"), (500, "fid500"), (1_500, "fid1500")])
def test_name_has_the_number_of_images(smoke_config, num, name):
    smoke_config.fid.update(extractor="inception", num_images=num)
    assert sample_distance.training_name(smoke_config) == name


def test_model_of_latents_needs_its_vae_for_the_distance(smoke_config):
    smoke_config.latents.source = "moments"
    smoke_config.fid.every_steps = 1
    smoke_config.sample_every_steps = 0
    with pytest.raises(ValueError, match=r"fid\.every_steps=1 needs latents\.vae"):
        tasks.Denoising.build(smoke_config, None)
