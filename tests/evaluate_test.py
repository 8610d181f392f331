"""The measures on images with known answers; a row is measured once."""

import json

import numpy as np
import pytest

from dit_jax import evaluate, generate


@pytest.fixture(scope="module")
def real():
    """Three classes of 60 images around a pixel pattern each."""
    rng = np.random.default_rng(0)
    labels = np.arange(180) % 3
    patterns = rng.integers(60, 200, (3, 4, 4, 1))
    noise = rng.integers(-20, 21, (180, 4, 4, 1))
    return (patterns[labels] + noise).astype(np.uint8), labels


def test_label_accuracy_counts_what_the_neighbours_say(real):
    images, labels = real
    assert evaluate.label_accuracy(images, labels, images, labels) == 1.0
    wrong = labels.copy()
    wrong[:45] = (wrong[:45] + 1) % 3
    assert evaluate.label_accuracy(images, wrong, images, labels) == pytest.approx(135 / 180)


def test_fd_pixels_is_zero_for_the_real_images_and_grows_with_a_shift(real):
    images, _ = real
    same = evaluate.fd_pixels(images, images)
    assert same["fd_pixels"] == pytest.approx(0, abs=1e-9)
    assert same["fd_pixels_real_halves"] > 0
    shifted = evaluate.fd_pixels(images + np.uint8(10), images)
    # 16 pixels, each 10 / 127.5 further on; covariances are equal
    assert shifted["fd_pixels"] == pytest.approx(16 * (10 / 127.5) ** 2, rel=1e-6)


def _evaluate(workdir, settings=None, **options):
    return evaluate.evaluate(generate.load(workdir, settings=settings), workdir, **options)


def test_row_is_measured_once_and_read_back(workdir, monkeypatch):
    monkeypatch.setattr(evaluate, "_git_revision", lambda: "abc")
    row = _evaluate(workdir, {"steps": 4}, num=40)
    assert row["step"] == 40
    assert row["images_seen"] == 40 * 16
    assert row["sample"]["steps"] == 4
    assert 0 <= row["label_accuracy"] <= 1
    assert row["fd_pixels"] > row["fd_pixels_real_halves"] > 0
    assert row["picture"].startswith("evaluations/40-")
    assert (workdir / row["picture"]).is_file()
    monkeypatch.setattr(evaluate.data, "open_images", None)  # not needed again
    assert _evaluate(workdir, {"steps": 4}, num=40) == row
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "_git_revision", lambda: "abc")
    path = workdir / "evaluations.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row]
    other = _evaluate(workdir, {"steps": 4}, num=40, seed=1)
    assert other["fd_pixels"] != row["fd_pixels"]
    assert other["picture"] != row["picture"]
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text()[:-20])  # the disk was full
    assert _evaluate(workdir, {"steps": 4}, num=40, seed=1) == other
    assert json.loads(path.read_text().splitlines()[-1]) == other


@pytest.mark.parametrize("change", ["other code", "changed code", "picture lost"])
def test_row_is_measured_again_when_it_may_have_changed(workdir, monkeypatch, change):
    before = "abc-dirty" if change == "changed code" else "abc"
    monkeypatch.setattr(evaluate, "_git_revision", lambda: before)
    row = _evaluate(workdir, {"steps": 2}, num=10)
    if change == "other code":
        monkeypatch.setattr(evaluate, "_git_revision", lambda: "def")
    if change == "picture lost":
        (workdir / row["picture"]).unlink()
    again = _evaluate(workdir, {"steps": 2}, num=10)
    assert len((workdir / "evaluations.jsonl").read_text().splitlines()) == 2
    assert again == row | {"git_revision": again["git_revision"]}
    assert (workdir / row["picture"]).is_file()


def test_large_images_are_refused_and_few_samples_told(workdir, real, caplog):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["data"].update(image_size=64, image_channels=3)
    config["model"].update(input_size=64)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="at most 4096 values; these have 12288"):
        _evaluate(workdir)
    evaluate.fd_pixels(real[0][:16], real[0])
    assert "16 samples and 90 real images in each half are too few" in caplog.text


def test_evaluate_prints_the_line_and_the_picture(run_command, workdir):
    out = run_command("evaluate", "--workdir", workdir, "--num", 20, "--steps", 2)
    assert f"picture: {workdir}/evaluations/40-" in out
    for name in ("label_accuracy", "fd_pixels", "img_per_s", "steps 40", "seconds"):
        assert name in out
