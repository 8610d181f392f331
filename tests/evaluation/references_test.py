"""References: what is kept of real images, and what is refused."""

import dataclasses

import numpy as np
import pytest
from helpers.close import assert_close

from dit_jax.evaluation import batch_cache, extractors, image_sets, metrics, references


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (130, 8, 8, 1), np.uint8)


@pytest.fixture
def images(tmp_path, pixels):
    np.savez(tmp_path / "real.npz", arr_0=pixels, label=np.arange(130) % 7)
    return image_sets.open_npz(tmp_path / "real.npz")


def _features(extractor, pixels):
    return {k: np.asarray(a) for k, a in extractor.apply(extractor.params, pixels).items()}


def test_moments_are_of_all_images_and_features_of_some(images, pixels, toy_extractor, monkeypatch):
    monkeypatch.setattr(references, "MAX_FEATURES", 26)
    reference = references.from_images(images, toy_extractor)
    expected = _features(toy_extractor, pixels)
    for kind in ("features", "spatial"):
        gaussian = reference.gaussians[kind]
        assert_close(gaussian.mean, expected[kind].mean(0, np.float64), 1e-5)
        assert_close(gaussian.covariance, np.cov(expected[kind].T), 1e-5)
        assert gaussian.n == 130
    assert_close(reference.features, expected["features"][::5], 1e-6)
    assert reference.labels.tolist() == [i % 7 for i in range(0, 130, 5)]
    assert reference.source["num_images"] == 130
    assert reference.source["image_size"] == 8


def test_moments_do_not_depend_on_the_batches(images, toy_extractor, monkeypatch):
    whole = references.from_images(images, toy_extractor)
    monkeypatch.setattr(references, "BATCH_PER_DEVICE", 1)
    monkeypatch.setattr(metrics, "BLOCK_SIZE", 40)
    parts = references.from_images(images, toy_extractor)
    for kind in ("features", "spatial"):
        assert parts.gaussians[kind].n == whole.gaussians[kind].n == 130
        assert_close(parts.gaussians[kind].mean, whole.gaussians[kind].mean, 1e-6)
        assert_close(parts.gaussians[kind].covariance, whole.gaussians[kind].covariance, 1e-5)


def test_saved_reference_is_read_back(images, toy_extractor, tmp_path):
    reference = references.from_images(images, toy_extractor)
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
    saved = batch_cache.BatchCache(tmp_path / "kept", "abc")
    saved.prepare(0)
    saved.add(range(len(pixels)), {"image": pixels, "label": np.zeros(len(pixels), np.int32)})
    saved.write_npz(tmp_path / "samples.npz", "40-abc")
    reference = references.load(str(tmp_path / "samples.npz"), toy_extractor)
    assert reference.gaussians["features"].n == len(reference.labels) == len(pixels)


@pytest.fixture
def adm_arrays(pixels, toy_extractor):
    """Moments of some more images than the 130 that the file holds."""
    others = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 1), np.uint8)
    features = _features(toy_extractor, np.concatenate([pixels, others]))
    arrays = {"arr_0": pixels}
    for kind, (mean, covariance) in references.MOMENTS.items():
        arrays[mean] = features[kind].mean(0, np.float64)
        arrays[covariance] = np.cov(features[kind].T.astype(np.float64))
    return arrays


def test_reference_of_the_adm_evaluator(images, adm_arrays, toy_extractor, tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(path, **adm_arrays)
    assert references.default_extractor(str(path)) == "inception"
    reference = references.load(str(path), toy_extractor)
    np.testing.assert_array_equal(reference.gaussians["features"].mean, adm_arrays["mu"])
    covariance = reference.gaussians["spatial"].covariance
    np.testing.assert_array_equal(covariance, adm_arrays["sigma_s"])
    assert reference.gaussians["features"].n is None
    np.testing.assert_array_equal(
        reference.features, references.from_images(images, toy_extractor).features
    )
    assert reference.source["num_images"] is None
    for other in (dataclasses.replace(toy_extractor, dtype="bfloat16"), extractors.load("pixels")):
        with pytest.raises(ValueError, match="has the ADM evaluator's moments, of inception in f"):
            references.load(str(path), other)


def test_digest_of_an_adm_reference_is_of_its_moments_too(adm_arrays, toy_extractor, tmp_path):
    def digest(**changes):
        np.savez(tmp_path / "adm.npz", **(adm_arrays | changes))
        return references.load(str(tmp_path / "adm.npz"), toy_extractor).source["digest"]

    assert digest() == digest() != digest(mu=adm_arrays["mu"] * 1.01)


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("mu", "sigma", "arr_0"), ("features",)])
def test_files_with_other_keys_are_refused(toy_extractor, adm_arrays, tmp_path, keys):
    arrays = adm_arrays | {"features": np.zeros((4, 5))}
    np.savez(tmp_path / "other.npz", **{key: arrays[key] for key in keys})
    with pytest.raises(ValueError, match=f"other.npz holds {', '.join(sorted(keys))}. A reference"):
        references.load(str(tmp_path / "other.npz"), toy_extractor)


DAMAGE = {
    "NaN": (lambda mu, sigma: (mu * np.nan, sigma), "they have values that are NaN or infinite"),
    "infinite": (
        lambda mu, sigma: (mu, sigma * np.inf),
        "they have values that are NaN or infinite",
    ),
    "complex": (
        lambda mu, sigma: (mu, sigma + 0j),
        r"are float64 \[5\] and complex128 \[5, 5\], not",
    ),
    "integers": (
        lambda mu, sigma: (mu.astype(int), sigma),
        r"are int64 \[5\] and float64 .* not real",
    ),
    "text": (
        lambda mu, sigma: (mu.astype(str), sigma),
        r"are <U32 \[5\] and float64 .* not real num",
    ),
    "a dimension less": (
        lambda mu, sigma: (mu[1:], sigma),
        r"\[4\] and float64 \[5, 5\], not real",
    ),
    "two less": (
        lambda mu, sigma: (mu[1:], sigma[1:, 1:]),
        r"\[4\] and float64 \[4, 4\], not real numbers \[5\] and \[5, 5\]",
    ),
    "half": (
        lambda mu, sigma: (mu, sigma[:3]),
        r"\[5\] and float64 \[3, 5\], not real numbers \[5",
    ),
    "a number": (lambda mu, sigma: (mu, sigma[0, 0]), r"\[5\] and float64 \[\], not real numbers"),
    "no mean": (
        lambda mu, sigma: (mu[0], sigma),
        r"float64 \[\] and float64 \[5, 5\], not real num",
    ),
    "a triangle": (lambda mu, sigma: (mu, np.triu(sigma)), "inception: the covariance is not symm"),
    "negated": (
        lambda mu, sigma: (mu, -sigma),
        "inception: the covariance has eigenvalues from -",
    ),
    "not positive": (
        lambda mu, sigma: (mu, sigma + 2 * sigma.max() * np.eye(5)[::-1]),
        "inception: the covariance has eigenvalues from -",
    ),
    "a negated mean": (lambda mu, sigma: (-mu, sigma), "deviations from the mean of 130 of its im"),
    "another mean": (lambda mu, sigma: (mu[::-1], sigma), "deviations from the mean of 130 of its"),
}


@pytest.mark.parametrize("layout", ["adm", "ours"])
@pytest.mark.parametrize("name", DAMAGE)
def test_moments_that_are_none_are_refused(
    images, adm_arrays, toy_extractor, tmp_path, layout, name
):
    path = tmp_path / "reference.npz"
    if layout == "adm":
        arrays = adm_arrays
    else:
        references.from_images(images, toy_extractor).save(path)
        with np.load(path) as file:
            arrays = dict(file)
    damage, message = DAMAGE[name]
    mean, covariance = damage(arrays["mu"], arrays["sigma"])
    np.savez(path, **(arrays | {"mu": mean, "sigma": covariance}))
    with pytest.raises(ValueError, match=message) as error:
        references.load(str(path), toy_extractor)
    assert "mu" in str(error.value)
    assert "reference.npz" in str(error.value)


def test_moments_of_the_second_kind_are_checked_too(adm_arrays, toy_extractor, tmp_path):
    np.savez(tmp_path / "adm.npz", **(adm_arrays | {"sigma_s": np.eye(4)}))
    message = r"mu_s and sigma_s in .* no moments of spatial of inception.* not real numbers \[3\]"
    with pytest.raises(ValueError, match=message):
        references.load(str(tmp_path / "adm.npz"), toy_extractor)


def test_damaged_moments_are_refused_before_images_are_extracted(
    adm_arrays, toy_extractor, tmp_path, monkeypatch
):
    np.savez(tmp_path / "adm.npz", **(adm_arrays | {"sigma_s": -adm_arrays["sigma_s"]}))
    monkeypatch.setattr(references, "from_images", None)
    with pytest.raises(ValueError, match=r"mu_s and sigma_s in .* are no moments"):
        references.load(str(tmp_path / "adm.npz"), toy_extractor)


@pytest.mark.parametrize("num", [3, 130])
def test_covariances_of_rounding_are_accepted(pixels, toy_extractor, tmp_path, num):
    """Of float32, and of fewer images than features, so that eigenvalues are 0 and just below."""
    np.savez(tmp_path / "real.npz", arr_0=pixels[:num])
    reference = references.from_images(image_sets.open_npz(tmp_path / "real.npz"), toy_extractor)
    reference.save(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as file:
        arrays = dict(file)
    for dtype in (np.float32, np.float64):
        changed = {key: arrays[key].astype(dtype) for key in ("mu", "sigma", "mu_s", "sigma_s")}
        np.savez(tmp_path / "reference.npz", **(arrays | changed))
        loaded = references.load(str(tmp_path / "reference.npz"), toy_extractor)
        assert loaded.gaussians["features"].covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": np.zeros((130, 5), int)},
            r"features in .* are int64 \[130, 5\], but must be",
        ),
        ({"features": np.full((130, 5), np.nan)}, "but must be finite numbers"),
        ({"features": np.zeros(5)}, r"are float64 \[5\], but must be finite"),
        ({"features": None}, "has lost its features: make it again"),
        ({"mu": None}, "has lost its mu: make it again"),
        ({"sigma": None}, "has lost its sigma: make it again"),
        (
            {"labels": np.zeros(129, int)},
            r"labels in .* is int64 \[129\], but labels of 130 images",
        ),
        ({"labels": np.zeros(130)}, r"labels in .* is float64 \[130\], but labels of"),
        ({"labels": np.full(130, -1)}, r"has 130 labels outside .* the first -1 of image 0"),
        (
            {"metadata": "{"},
            "cannot read the metadata in .*: it ends too early: .* what --make_refer",
        ),
        ({"metadata": "[]"}, "the metadata in .* lack values or have other"),
        ({"metadata": "{}"}, "the metadata in .* lack values or have other"),
        ({"metadata": np.zeros(3)}, "cannot read the metadata in .*make the reference again"),
        (
            {"metadata": '{"extractor": {"name": "inception"}}'},
            "the metadata in .* lack values or have other",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damaged_references_of_ours_are_refused(images, toy_extractor, tmp_path, change, message):
    path = tmp_path / "reference.npz"
    references.from_images(images, toy_extractor).save(path)
    with np.load(path) as file:
        arrays = dict(file) | change
    np.savez(path, **{key: a for key, a in arrays.items() if a is not None})
    with pytest.raises(ValueError, match=message):
        references.load(str(path), toy_extractor)


@pytest.mark.parametrize("key", ["num_images", "image_size", "image_channels", "name"])
def test_metadata_without_a_key_are_refused(images, toy_extractor, tmp_path, key):
    reference = references.from_images(images, toy_extractor)
    for value in (..., [1]):
        source = {k: value if k == key else v for k, v in reference.source.items()}
        source = {k: v for k, v in source.items() if v is not ...}
        dataclasses.replace(reference, source=source).save(tmp_path / "reference.npz")
        for read in (
            lambda path: references.load(path, toy_extractor),
            references.default_extractor,
        ):
            with pytest.raises(ValueError, match=r"the metadata in .* lack values or have other"):
                read(str(tmp_path / "reference.npz"))


def test_names_of_classes_are_kept(images, toy_extractor, tmp_path):
    names = ("b", "a", *"cdefg")
    images = dataclasses.replace(images, class_names=names)
    reference = references.from_images(images, toy_extractor)
    assert reference.class_names == names
    reference.save(tmp_path / "reference.npz")
    loaded = references.load(str(tmp_path / "reference.npz"), toy_extractor)
    assert loaded.class_names == names
    assert "class_names" not in loaded.source  # a row has the source


def test_missing_and_damaged_files(toy_extractor, tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference"):
        references.load(str(tmp_path / "none.npz"), toy_extractor)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="It is cut short"):
        references.load(str(tmp_path / "cut.npz"), toy_extractor)


def test_features_that_are_not_finite_are_named(images, toy_extractor, pixels, tmp_path):
    pixels[77] = 255

    def apply(params, image):
        white = (image == 255).reshape(len(image), -1).all(axis=1)
        values = toy_extractor.apply(params, image)
        return values | {"spatial": values["spatial"] / ~white[:, None]}

    np.savez(tmp_path / "real.npz", arr_0=pixels)
    broken = dataclasses.replace(toy_extractor, apply=apply)
    with pytest.raises(FloatingPointError, match=r"have spatial that are NaN.* first is image 77"):
        references.from_images(image_sets.open_npz(tmp_path / "real.npz"), broken)


def test_samples_of_another_size_are_refused(images, toy_extractor):
    reference = references.from_images(images, toy_extractor)
    reference.check((8, 8, 1))
    with pytest.raises(
        ValueError, match=r"are 8 x 8 x 3, but the reference .* of images 8 x 8 x 1"
    ):
        reference.check((8, 8, 3))
