"""A row is measured once, in pieces, of samples and of images that exist; and the command."""

import dataclasses
import json
import os
import shutil
import warnings

import conftest
import numpy as np
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import conditions, models, workdirs
from dit_jax.evaluation import (
    batch_cache,
    extractors,
    image_sets,
    measures,
    metrics,
    references,
    rows,
    samples,
)
from dit_jax.sampling import generate, runs
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


@pytest.fixture
def clean(monkeypatch):
    """As if all of the code were committed."""
    monkeypatch.setattr(rows, "get_git_revision", lambda: "abc")


def _evaluate(workdir, settings=None, loading=None, **options):
    trained = runs.load(workdir, settings={"steps": 2} | (settings or {}), **(loading or {}))
    extractor = extractors.load("pixels")
    reference = references.load_for_run(trained.config, None, extractor)
    return samples.evaluate(trained, workdir, extractor, reference, **options)


def test_classes_of_a_run_are_those_of_the_same_name(workdir):
    """A reference may number them otherwise."""
    trained, extractor = runs.load(workdir, settings={"steps": 2}), extractors.load("pixels")
    names = [f"digit {i}" for i in range(10)]
    trained = dataclasses.replace(trained, data={"train": {"classes": names}})
    real = references.load_for_run(trained.config, None, extractor)
    other = dataclasses.replace(
        real,
        source=real.source | {"name": "other"},
        labels=9 - real.labels,
        class_names=tuple(names[::-1]),
    )
    one, two = (
        samples.evaluate(trained, workdir, extractor, r, num=40)["label_accuracy"]
        for r in (real, other)
    )
    assert one == two > 0


def test_row_is_measured_once_and_read_back(workdir, monkeypatch, clean):
    row = _evaluate(workdir, {"steps": 4}, num=40)
    assert row["step"] == 40
    assert row["images_seen"] == 40 * 16
    assert row["sample"]["steps"] == 4
    assert row["sample"]["labels"] == "random"
    assert row["extractor"] == {"name": "pixels", "dtype": "float32", "digest": ""}
    assert row["reference"]["name"] == "digits:train"
    assert row["reference"]["num_images"] == 1617
    assert 0 <= row["label_accuracy"] <= 1
    assert 0 <= row["precision_pixels"] <= 1
    assert row["fd_pixels"] > row["fd_pixels_real_halves"] > 0
    assert row["picture"].startswith("evaluations/40-")
    assert [path.name for path in (workdir / "evaluations").iterdir()] == [row["picture"][12:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "batches", None)  # not needed again
        assert _evaluate(workdir, {"steps": 4}, num=40) == row
    path = workdir / "evaluations.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row]
    other = _evaluate(workdir, {"steps": 4}, num=40, seed=1)
    assert other["fd_pixels"] != row["fd_pixels"]
    assert other["picture"] != row["picture"]
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text()[:-20])  # the disk was full
    assert _evaluate(workdir, {"steps": 4}, num=40, seed=1) == other
    assert json.loads(path.read_text().splitlines()[-1]) == other


def test_row_is_measured_again_when_it_may_have_changed(workdir, monkeypatch):
    """Of other code, of code that is not committed, and when its picture is lost."""
    row = None
    for count, revision in enumerate(["abc", "def", "def-dirty", "def-dirty", "def"], 1):
        monkeypatch.setattr(rows, "get_git_revision", lambda revision=revision: revision)
        if count == 5:
            (workdir / row["picture"]).unlink()
        again = _evaluate(workdir, num=10)
        assert len((workdir / "evaluations.jsonl").read_text().splitlines()) == count
        assert again == (row or again) | {"git_revision": revision}
        assert (workdir / again["picture"]).is_file()
        row = again


def test_interrupted_evaluation_continues(workdir, monkeypatch, clean):
    """Interrupted in its third batch, and again when the row was there but not all cleared."""
    whole = _evaluate(workdir, num=30, batch_size=8)
    (workdir / "evaluations.jsonl").unlink()
    drawn, batches = [], generate.batches

    def interrupted(*arguments):
        for numbers, batch in batches(*arguments):
            if numbers.start == 16:
                raise KeyboardInterrupt
            drawn.append(numbers)
            yield numbers, batch

    monkeypatch.setattr(generate, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(workdir, num=30, batch_size=8)
    assert drawn == [range(0, 8), range(8, 16)]
    assert not (workdir / "evaluations.jsonl").exists()

    def remember(*arguments):
        for numbers, batch in batches(*arguments):
            drawn.append(numbers)
            yield numbers, batch

    monkeypatch.setattr(generate, "batches", remember)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_cache.BatchCache, "remove", lambda _: None)
        assert _evaluate(workdir, num=30, batch_size=8) == whole
    assert drawn[2:] == [range(16, 24), range(24, 30)]
    assert len(list((workdir / "evaluations").iterdir())) == 2
    assert _evaluate(workdir, num=30, batch_size=8) == whole
    assert len(list((workdir / "evaluations").iterdir())) == 1
    assert len(drawn) == 4


def test_models_without_classes_have_no_label_accuracy(smoke_config, tmp_path):
    """Though the reference has labels: theirs are none."""
    smoke_config.model.update(num_classes=0, null_condition=False)
    smoke_config.sample.cfg_scale = 1.0
    row = _evaluate(conftest.save_random(tmp_path, smoke_config), {"steps": 2}, num=16)
    assert "label_accuracy" not in row
    assert row["fd_pixels"] > 0


def test_row_does_not_depend_on_the_batch_size(workdir, clean):
    whole, parts = (_evaluate(workdir, num=30, batch_size=size) for size in (30, 8))
    assert parts == whole  # found again: it is no part of what is measured
    (workdir / "evaluations.jsonl").unlink()
    parts = _evaluate(workdir, num=30, batch_size=8)
    for name in ("fd_pixels", "precision_pixels", "recall_pixels", "label_accuracy"):
        assert_close(parts[name], whole[name], 1e-6)


def test_saved_samples_are_those_that_were_measured(workdir, tmp_path, clean):
    out = tmp_path / "samples.npz"
    row = _evaluate(workdir, num=21, batch_size=8, save_npz=out)
    with np.load(out) as file:
        assert file["arr_0"].shape == (21, 8, 8, 1)
        request = conditions.from_labels(conditions.draw_labels("random", 21, 10), 10)
        np.testing.assert_array_equal(file["label"], request.cond)
        trained = runs.load(workdir, settings={"steps": 2})
        drawn = generate.generate(
            trained.make_sample_fn(),
            trained.params,
            request,
            0,
            trained.mesh,
            trained.to_image,
        )
        np.testing.assert_array_equal(file["arr_0"], drawn)
    extractor = extractors.load("pixels")
    reference = references.load_for_run(trained.config, None, extractor)
    again = samples.evaluate_images(image_sets.open_npz(out), extractor, reference)
    for name in ("fd_pixels", "precision_pixels", "recall_pixels", "label_accuracy"):
        assert_close(again[name], row[name], 1e-6)
    # The row is there, but beside it others.
    _evaluate(workdir, num=21, batch_size=8, save_npz=out, seed=1)
    assert _evaluate(workdir, num=21, batch_size=8, save_npz=out)["fd_pixels"] == row["fd_pixels"]
    with np.load(out) as file:
        np.testing.assert_array_equal(file["arr_0"], drawn)


@pytest.mark.slow
def test_rows_are_of_their_weights(workdir, clean):
    """Another guide, raw parameters, and other weights at the same step are measured again."""
    first = _evaluate(workdir, num=10)
    assert _evaluate(workdir, num=10, loading={"raw": True})["fd_pixels"] != first["fd_pixels"]
    guided = [
        _evaluate(workdir, {"cfg_scale": 2.0}, {"guide_step": step}, num=10) for step in (20, 30)
    ]
    assert guided[0]["fd_pixels"] != guided[1]["fd_pixels"]
    assert [row["sample"]["guide_step"] for row in guided] == [20, 30]
    config = workdirs.load_config(workdir)
    shutil.rmtree(workdir / "checkpoints")
    params = conftest.random_params(models.build(config.model), seed=7)
    checkpoint.replace_params(workdir, config, params, 40, {})
    again = _evaluate(workdir, num=10)
    assert again["params_digest"] != first["params_digest"]
    assert again["fd_pixels"] != first["fd_pixels"]


@pytest.fixture
def draws(monkeypatch):
    """Makes samples of noise, without a network; a list of the numbers that were drawn."""
    drawn = []

    def batches(sample, params, expected_message, seed, mesh, output, batch_size, wanted):
        of_pixels = len(params["x_embedder"]["kernel"]) == 4  # values of a patch
        shape = (8, 8, 1) if of_pixels else (4, 4, 2)
        for numbers in wanted:
            drawn.append(numbers)
            x_0 = np.random.default_rng(0).standard_normal((len(numbers), *shape))
            yield numbers, output(x_0.astype(np.float32))

    monkeypatch.setattr(generate, "batches", batches)
    return drawn


def test_row_says_whether_parameters_are_raw(workdir, draws, clean):
    rows = [_evaluate(workdir, loading={"raw": raw}, num=10) for raw in (False, True)]
    assert [row["sample"]["raw"] for row in rows] == [False, True]
    assert rows[0]["params_digest"] != rows[1]["params_digest"]
    assert len(draws) == 2


def test_guide_of_other_weights_is_another_measurement(workdir, tmp_path, draws, clean):
    """Trained again in the same directory, to the same step."""
    guide, config, rows = tmp_path / "guide", workdirs.load_config(workdir), []
    for seed in (0, 1):
        shutil.rmtree(guide, ignore_errors=True)
        conftest.save_random(guide, config, seed)
        for _ in range(2):  # the second time it is read back
            rows.append(_evaluate(workdir, {"cfg_scale": 2.0}, {"guide_workdir": guide}, num=10))
    assert rows[0] == rows[1]
    assert rows[2] == rows[3]
    assert len(draws) == 2
    first, second = rows[0]["sample"], rows[2]["sample"]
    assert {key for key in first if first[key] != second[key]} == {"guide_digest"}


@pytest.mark.slow
def test_another_vae_is_another_measurement(vae_dir, smoke_config, tmp_path, draws, clean):
    smoke_config.model.update(input_size=4, in_channels=2)
    smoke_config.latents.update(source="moments", scale=(1.0,), shift=(0.0,))
    run = conftest.save_random(tmp_path / "run", smoke_config)
    vae = ConfigDict({"model": conftest.VAE})
    other = conftest.save_random(tmp_path / "vae", vae, seed=1, spread=0.1)
    loadings = [{"vae_workdir": path} for path in (vae_dir, other, vae_dir)]
    first, second, again = (_evaluate(run, loading=loading, num=10) for loading in loadings)
    assert again == first
    assert len(draws) == 2
    assert first["sample"]["vae_digest"] != second["sample"]["vae_digest"]
    assert first["fd_pixels"] != second["fd_pixels"]


def test_evaluation_whose_lock_is_lost_writes_nothing_more(workdir, draws, monkeypatch):
    """Another command may measure the same by then."""
    plain = generate.batches

    def lose(*arguments):
        for numbers, batch in plain(*arguments):
            (lock,) = (workdir / "evaluations").glob("*.lock")
            lock.unlink()
            yield numbers, batch

    monkeypatch.setattr(generate, "batches", lose)
    with pytest.raises(files.LostError, match=r"\.lock was removed or replaced"):
        _evaluate(workdir, num=10)
    assert not list((workdir / "evaluations").rglob("*.npz"))
    assert not (workdir / "evaluations.jsonl").exists()


def test_batches_are_kept_until_the_row_is_written(workdir, draws, monkeypatch, clean):
    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "append", fail)
        with pytest.raises(OSError, match="the disk is full"):
            _evaluate(workdir, num=10)
    assert _evaluate(workdir, num=10)["fd_pixels"] > 0
    assert draws == [range(10)]


def test_features_that_are_not_finite_end_the_evaluation(workdir, monkeypatch):
    def broken(params, image):
        return {"features": np.nan * image.reshape(len(image), -1)}

    trained, extractor = runs.load(workdir, settings={"steps": 2}), extractors.load("pixels")
    reference = references.load_for_run(trained.config, None, extractor)
    extractor = dataclasses.replace(extractor, apply=broken)
    with pytest.raises(FloatingPointError, match="images 0 to 9 have features that are NaN"):
        samples.evaluate(trained, workdir, extractor, reference, num=10)
    assert not (workdir / "evaluations.jsonl").exists()


def test_existing_images_are_measured_once_beside_them(tmp_path, toy_extractor, clean, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    actual = image_sets.open_npz(tmp_path / "samples.npz")
    reference = references.from_images(actual, toy_extractor)
    row = samples.evaluate_images(actual, toy_extractor, reference, batch_size=16)
    assert row["samples"] == dict(name=str(tmp_path / "samples.npz"), num=90, digest=actual.digest)
    assert abs(row["fid"]) < 1e-4  # batches of another size
    assert row["precision"] == row["recall"] == 1
    assert (tmp_path / row["picture"]).is_file()
    path = tmp_path / "samples.evaluations.jsonl"
    assert json.loads(path.read_text()) == row
    monkeypatch.setattr(measures, "measure_features", None)
    assert samples.evaluate_images(actual, toy_extractor, reference) == row
    with pytest.raises(ValueError, match="has 90 images, fewer than --num=91"):
        samples.evaluate_images(actual, toy_extractor, reference, num=91)


def test_measures_that_cannot_be_are_not_written(tmp_path, toy_extractor, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    actual = image_sets.open_npz(tmp_path / "samples.npz")
    reference = references.from_images(actual, toy_extractor)
    monkeypatch.setattr(measures, "measure_features", lambda *_: {"fid": -0.5, "precision": 1.0})
    with pytest.raises(FloatingPointError, match=r"impossible values fid -0\.5, so no row"):
        samples.evaluate_images(actual, toy_extractor, reference)
    assert not (tmp_path / "samples.evaluations.jsonl").exists()


def test_classes_of_folders_are_compared_by_name(tmp_path):
    """The samples lack the first of the reference's classes: their numbers differ."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("ant", "bee", "cat")):
        for j in range(12):
            pixels = (80 * i + rng.integers(0, 9, (4, 4, 1))).astype(np.uint8)
            for folder in ("real", "samples") if i else ("real",):
                path = tmp_path / folder / name / f"{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[..., 0]).save(path)
    extractor = extractors.load("pixels")
    reference = references.load(str(tmp_path / "real"), extractor, channels=1)
    actual = image_sets.open_images(str(tmp_path / "samples"), channels=1)
    row = samples.evaluate_images(actual, extractor, reference)
    assert row["label_accuracy"] == 1.0


def test_samples_replaced_by_others_of_their_size_and_time_are_measured_again(tmp_path):
    path, rng = tmp_path / "samples", np.random.default_rng(0)
    path.mkdir()

    def save(low):
        for i in range(24):
            file = path / f"{i}.bmp"
            pixels = rng.integers(low, low + 9, (4, 4)).astype(np.uint8)
            Image.fromarray(pixels).save(file)
            os.utime(file, ns=(0, 0))

    def measure():
        actual = image_sets.open_images(str(path), channels=1)
        return samples.evaluate_images(actual, extractor, reference)

    save(0)
    extractor = extractors.load("pixels")
    reference = references.load(str(path), extractor, channels=1)
    first = measure()
    assert measure() == first
    save(100)
    second = measure()
    assert second["samples"]["digest"] != first["samples"]["digest"]
    assert second["fd_pixels"] > 10 * max(first["fd_pixels"], 0.01)


def test_too_few_for_a_measure_are_refused_before_any_is_drawn(workdir, monkeypatch):
    monkeypatch.setattr(generate, "batches", None)
    with pytest.raises(ValueError, match="3 samples and 1617 images of the reference digits:train"):
        _evaluate(workdir, num=3)


@pytest.mark.parametrize("order", ["sorted", "grouped", "shuffled", "one split"])
def test_class_sorted_images_are_told(tmp_path, toy_extractor, caplog, monkeypatch, order):
    monkeypatch.setattr(metrics, "SPLIT_SIZE", 100 if order == "one split" else 20)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    labels = np.arange(60) // 10
    if order == "shuffled":
        labels = np.arange(60) % 6
    if order == "grouped":
        labels = np.array([4, 1, 5, 0, 2, 3])[labels]
    np.savez(tmp_path / "samples.npz", arr_0=pixels, label=labels)
    actual = image_sets.open_npz(tmp_path / "samples.npz")
    samples.evaluate_images(actual, toy_extractor, references.from_images(actual, toy_extractor))
    is_logged = "sorted by class, so the Inception Score is too low: it is the mean of parts of 20 "
    is_logged = is_logged in caplog.text and "of the 6 classes" in caplog.text
    assert is_logged == (order in ("sorted", "grouped"))


def test_shown_images_are_ordered_by_class(tmp_path):
    labels = np.arange(100) % 10
    image = np.broadcast_to(labels[:, None, None, None] * 20, (100, 8, 8, 1)).astype(np.uint8)
    samples._write_picture(tmp_path / "grid.png", image, labels)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (498, 498, 3)
    expected = np.arange(10)[:, None] * 20 + np.zeros((1, 10))
    np.testing.assert_array_equal(picture[24::50, 24::50, 0], expected)


def test_command_prints_the_row_the_picture_and_the_measures(run_command, workdir):
    out = run_command("evaluate", "--workdir", workdir, "--num", 20, "--steps", 2).splitlines()
    row = json.loads((workdir / "evaluations.jsonl").read_text())
    assert json.loads(out[0]) == row
    assert out[1] == f"picture: {workdir / row['picture']}"
    assert f"fd_pixels {row['fd_pixels']:.6g}  precision_pixels" in out[2]
    for name in ("label_accuracy", "img_per_s", "seconds"):
        assert name in out[2]


def test_command_makes_a_reference_and_measures_samples(run_command, digits_dir, tmp_path):
    made, flags = tmp_path / "reference.npz", ["--extractor", "pixels", "--data_dir", digits_dir]
    out = run_command(
        "evaluate", "--make_reference", made, "--reference", "digits:train", *flags,
        "--image_size", 8, "--image_channels", 1,
    )  # fmt: skip
    assert f"{made}: " in out
    pixels = next(image_sets.open_images("digits:test", 8, 1, str(digits_dir)).blocks(180))["image"]
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    run_command("evaluate", "--samples", tmp_path / "samples.npz", "--reference", made)
    row = json.loads((tmp_path / "samples.evaluations.jsonl").read_text())
    assert row["extractor"]["name"] == "pixels"  # the reference's
    assert row["reference"]["num_images"] == 1617
    assert 0 < row["fd_pixels"] < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--image_channels=2", "--image_channels=2 must be one of 1, 3"),
        ("--image_size=1000000000", "--image_size=1000000000 must be a whole number in 1..8192"),
    ],
)
def test_images_that_cannot_be_are_refused(run_command, tmp_path, flag, message):
    flags = ["--samples", tmp_path, "--reference", tmp_path, "--extractor", "pixels", flag]
    assert message in run_command("evaluate", *flags, fails=True)
    if flag == "--image_channels=2":
        with pytest.raises(ValueError, match="channels=2 must be 1"):
            image_sets.open_images(str(tmp_path), channels=2)


def test_command_says_what_is_missing(run_command, workdir, tmp_path):
    def error(*flags):
        return run_command("evaluate", *flags, fails=True)

    assert "give one of --workdir, --samples and --make_reference" in error()
    message = error("--workdir", workdir, "--reference", "digits:train", "--weights", tmp_path)
    assert "curl -LO" in message
    assert f"convert inception weights-inception-2015-12-05-6726825d.pth {tmp_path}" in message
    assert "--reference is missing" in error("--samples", tmp_path)
    assert "--samples takes no --bpd, --cfg_scale" in error(
        "--samples", "x", "--cfg_scale=2", "--bpd"
    )
    assert "--workdir takes no --image_size" in error("--workdir", workdir, "--image_size=8")
    message = error("--workdir", workdir, "--bpd", "--save_npz=x.npz", "--labels=balanced")
    assert "--bpd takes no --labels, --save_npz" in message
    message = error("--make_reference=x.npz", "--reference=digits:train", "--num=100")
    assert "--make_reference takes no --num" in message
    assert "no reference 'nowhere'" in error("--workdir", workdir, "--reference=nowhere")


DINOV2 = dict(name="dinov2", hidden_size=64, depth=1, num_heads=1, dtype="float32")
INCEPTION = dict(name="inception", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("config", [DINOV2, INCEPTION, None], ids=["dinov2", "inception", "given"])
def test_networks_measure_the_samples_of_a_run(run_command, workdir, tmp_path, config):
    """With random weights always; with the published ones where runs/inception has them."""
    directory = conftest.ROOT / "runs" / "inception"
    if config:
        directory, config = tmp_path / "weights", ConfigDict({"model": config})
        conftest.save_random(directory, config, spread=0.05)
    elif not directory.is_dir():
        reason = f"no weights in {directory}, docs/weights.md gets them: Inception is not tested"
        warnings.warn(reason, stacklevel=1)  # pytest -q does not tell why it skips
        pytest.skip(reason)
    name = config.model.name if config else "inception"
    flags = ["--workdir", workdir, "--weights", directory, "--num", 12, "--steps", 2]
    flags += ["--reference", "digits:test[:20]", "--batch_size", 4, "--extractor", name]
    run_command("evaluate", *flags)
    row = json.loads((workdir / "evaluations.jsonl").read_text())
    assert row["extractor"]["name"] == name
    assert len(row["extractor"]["digest"]) == 16
    assert row["reference"]["num_images"] == 20
    suffix = "" if name == "inception" else "_dinov2"
    for measure in ("precision", "recall", "kid"):
        assert np.isfinite(row[measure + suffix])
    assert row["fid" if name == "inception" else "fd_dinov2"] > 0
    if name == "inception":
        assert row["sfid"] > 0
        assert 1 <= row["inception_score"] < 12


@pytest.mark.slow
def test_two_processes_evaluate_as_one(run_pair, run_command, workdir):
    flags = ["--workdir", workdir, "--num", 60, "--steps", 4]
    outputs = run_pair("evaluate", *flags)
    two = json.loads((workdir / "evaluations.jsonl").read_text())
    assert [f"picture: {workdir}" in output for output in outputs] == [True, False]
    (workdir / "evaluations.jsonl").unlink()
    one = json.loads(run_command("evaluate", *flags, as_users=True).splitlines()[0])
    for name in ("fd_pixels", "precision_pixels", "recall_pixels", "label_accuracy"):
        assert_close(two[name], one[name], 1e-4)
