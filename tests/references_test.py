"""References: what is kept of real images, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dit_jax import extractors, images, references, spool


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (130, 8, 8, 1), np.uint8)


@pytest.fixture
def found(tmp_path, pixels):
    np.savez(tmp_path / "real.npz", arr_0=pixels, label=np.arange(130) % 7)
    return images.open_npz(tmp_path / "real.npz")


def _features(extractor, pixels):
    return {k: np.asarray(a) for k, a in extractor.apply(extractor.params, pixels).items()}


def test_moments_are_of_all_images_and_features_of_some(found, pixels, toy_extractor, monkeypatch):
    monkeypatch.setattr(references, "MAX_FEATURES", 26)
    reference = references.of_images(found, toy_extractor)
    expected = _features(toy_extractor, pixels)
    for kind in ("features", "spatial"):
        gaussian = reference.gaussians[kind]
        np.testing.assert_allclose(gaussian.mean, expected[kind].mean(0, np.float64), rtol=1e-5)
        np.testing.assert_allclose(gaussian.covariance, np.cov(expected[kind].T), rtol=1e-4)
        assert gaussian.n == 130
    np.testing.assert_allclose(reference.features, expected["features"][::5], atol=1e-5)
    assert reference.labels.tolist() == [i % 7 for i in range(0, 130, 5)]
    assert reference.source["num_images"] == 130
    assert reference.source["image_size"] == 8


def test_moments_do_not_depend_on_how_features_come(toy_extractor, pixels, monkeypatch):
    features = _features(toy_extractor, pixels)

    monkeypatch.setattr(references.fid, "ROWS", 40)

    def moments(sizes):
        moments = references.Moments()
        for part in np.split(np.arange(130), np.cumsum(sizes)):
            moments.add({kind: features[kind][part] for kind in ("features", "spatial")})
        return moments.gaussians()

    whole, parts = moments([]), moments([1, 50, 3, 3, 40])
    for kind in ("features", "spatial"):
        assert parts[kind].n == whole[kind].n == 130
        np.testing.assert_allclose(parts[kind].mean, whole[kind].mean, rtol=1e-12)
        np.testing.assert_allclose(parts[kind].covariance, whole[kind].covariance, rtol=1e-12)


def test_saved_reference_is_read_back(found, toy_extractor, tmp_path):
    reference = references.of_images(found, toy_extractor)
    reference.save(tmp_path / "reference.npz")
    assert references.default_extractor(str(tmp_path / "reference.npz")) == "inception"
    loaded = references.load(str(tmp_path / "reference.npz"), toy_extractor)
    assert loaded.source == reference.source
    np.testing.assert_array_equal(loaded.features, reference.features)
    np.testing.assert_array_equal(loaded.labels, reference.labels)
    for kind, gaussian in reference.gaussians.items():
        np.testing.assert_array_equal(loaded.gaussians[kind].mean, gaussian.mean)
        np.testing.assert_array_equal(loaded.gaussians[kind].covariance, gaussian.covariance)
        assert loaded.gaussians[kind].n == 130
    others = [
        dataclasses.replace(toy_extractor, digest="other"),
        dataclasses.replace(toy_extractor, dtype="bfloat16"),
        extractors.load("pixels"),
    ]
    for other in others:
        with pytest.raises(ValueError, match="of another extractor than the samples'"):
            references.load(str(tmp_path / "reference.npz"), other)


def test_samples_that_evaluate_wrote_are_a_reference(toy_extractor, pixels, tmp_path):
    kept = spool.Spool(tmp_path / "kept", "abc")
    kept.find_missing(0)
    kept.add(range(len(pixels)), {"image": pixels, "label": np.zeros(len(pixels), np.int32)})
    kept.write_npz(tmp_path / "samples.npz", "40-abc")
    reference = references.load(str(tmp_path / "samples.npz"), toy_extractor)
    assert reference.gaussians["features"].n == len(reference.labels) == len(pixels)


def _adm_arrays(pixels):
    return {
        "arr_0": pixels,
        "mu": np.arange(5.0),
        "sigma": np.eye(5),
        "mu_s": np.ones(3),
        "sigma_s": 2 * np.eye(3),
    }


def test_reference_of_the_adm_evaluator(found, pixels, toy_extractor, tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(path, **_adm_arrays(pixels))
    assert references.default_extractor(str(path)) == "inception"
    reference = references.load(str(path), toy_extractor)
    np.testing.assert_array_equal(reference.gaussians["features"].mean, np.arange(5))
    np.testing.assert_array_equal(reference.gaussians["spatial"].covariance, 2 * np.eye(3))
    assert reference.gaussians["features"].n is None
    np.testing.assert_array_equal(
        reference.features, references.of_images(found, toy_extractor).features
    )
    assert reference.source["num_images"] is None
    for other in (dataclasses.replace(toy_extractor, dtype="bfloat16"), extractors.load("pixels")):
        with pytest.raises(ValueError, match="has the ADM evaluator's moments, of inception in f"):
            references.load(str(path), other)


def test_digest_of_an_adm_reference_is_of_its_moments_too(pixels, toy_extractor, tmp_path):
    def digest(**changes):
        np.savez(tmp_path / "adm.npz", **(_adm_arrays(pixels) | changes))
        return references.load(str(tmp_path / "adm.npz"), toy_extractor).source["digest"]

    assert digest() == digest() != digest(mu=np.arange(5.0) + 1)


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("mu", "sigma", "arr_0"), ("features",)])
def test_files_with_other_keys_are_refused(toy_extractor, pixels, tmp_path, keys):
    arrays = _adm_arrays(pixels) | {"features": np.zeros((4, 5))}
    np.savez(tmp_path / "other.npz", **{key: arrays[key] for key in keys})
    with pytest.raises(ValueError, match=f"other.npz holds {', '.join(sorted(keys))}. A reference"):
        references.load(str(tmp_path / "other.npz"), toy_extractor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.full(5, np.nan)}, "mu and sigma in .* with values that are NaN or infinite"),
        ({"mu": np.zeros(4)}, r"mu and sigma in .* are \(4,\) and \(5, 5\), but features of incep"),
        ({"sigma_s": np.eye(4)}, r"mu_s and sigma_s in .* but spatial of inception have 3 dim"),
    ],
)
def test_moments_that_do_not_fit_are_refused_at_once(
    pixels, toy_extractor, tmp_path, change, message
):
    np.savez(tmp_path / "adm.npz", **(_adm_arrays(pixels) | change))
    with pytest.raises(ValueError, match=message):
        references.load(str(tmp_path / "adm.npz"), toy_extractor)


def test_missing_and_damaged_files(toy_extractor, tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference"):
        references.load(str(tmp_path / "none.npz"), toy_extractor)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is damaged"):
        references.load(str(tmp_path / "cut.npz"), toy_extractor)


def test_features_that_are_not_finite_are_named(found, toy_extractor, pixels, tmp_path):
    pixels[77] = 255

    def apply(params, image):
        white = (image == 255).reshape(len(image), -1).all(axis=1)
        values = toy_extractor.apply(params, image)
        return values | {"spatial": values["spatial"] / ~white[:, None]}

    np.savez(tmp_path / "real.npz", arr_0=pixels)
    broken = dataclasses.replace(toy_extractor, apply=apply)
    with pytest.raises(FloatingPointError, match=r"have spatial that are NaN.*first image 77"):
        references.of_images(images.open_npz(tmp_path / "real.npz"), broken)


def test_samples_of_another_size_are_refused(found, toy_extractor):
    reference = references.of_images(found, toy_extractor)
    reference.check((8, 8, 1))
    with pytest.raises(ValueError, match=r"are 8x8x3, but the reference .* of images 8x8x1"):
        reference.check((8, 8, 3))
