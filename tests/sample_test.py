"""Labels as text, and the files that the command writes."""

import conftest
import numpy as np
import pytest
from PIL import Image

from configs import smoke
from dit_jax import conditions
from dit_jax.sampling import requests


def test_labels_are_given_in_equal_blocks():
    assert conditions.parse_labels("0,3,9", 6, 10).tolist() == [0, 0, 3, 3, 9, 9]
    assert conditions.parse_labels("", 4, 2).tolist() == [0, 0, 1, 1]
    assert conditions.parse_labels("7", 2, 10).tolist() == [7, 7]


def test_random_labels_are_the_seed_s_and_uniform():
    labels = conditions.parse_labels("random", 10_000, 10, seed=3)
    assert np.abs(np.bincount(labels, minlength=10) - 1_000).max() < 150
    np.testing.assert_array_equal(labels, conditions.parse_labels("random", 10_000, 10, seed=3))
    assert np.any(labels != conditions.parse_labels("random", 10_000, 10, seed=4))


def test_labels_are_guided_away_from_the_null_class():
    """Whose index is the number of classes; whether they are listed, drawn or of a picture."""
    config = smoke.get_config()
    drawn = (
        requests.draw(config, "balanced", 3),
        conditions.build(config).from_flags(3, labels="1,2,3"),
    )
    for request in (
        *drawn,
        requests.draw_for_picture(config, 3),
        conditions.from_labels([0, 4, 9], 10),
    ):
        assert request.null.tolist() == [10, 10, 10]
    assert request.cond.tolist() == [0, 4, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,10", "'10' is no class; the model's are 0 to 9. Give classes with commas, or random"),
        ("-1", "'-1' is no class"),
        ("cat", "'cat' is no class"),
        ("1,", "'' is no class"),
        ("1.0", "'1.0' is no class"),
        ("9" * 5000, "is no class"),
        ("a\x1b[31m", r"'a\\x1b\[31m' is no class"),
    ],
)
def test_labels_that_are_no_class_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        conditions.parse_labels(text, 4, 10)


def test_names_stand_for_their_classes():
    names = ["ant", "bee", "2", "number:1", "ämeise"]
    parsed = conditions.parse_labels("bee,0,ämeise,number:1,2", 5, 5, class_names=names)
    assert parsed.tolist() == [1, 0, 4, 3, 2]  # class 2 is named "2"
    with pytest.raises(ValueError, match=r"'cat' is no class; .* 0 to 4, named ant, bee, 2, "):
        conditions.parse_labels("cat", 1, 5, class_names=names)


def test_a_name_that_is_another_class_s_number_must_say_which_it_is():
    """As folders named 0 to 10 are, in the order of their names."""
    names = sorted(map(str, range(11)))
    assert names[2] == "10"
    with pytest.raises(ValueError, match=r"2 is the name of class 3, .*'10'. Write name:2 or numb"):
        conditions.parse_label("2", 11, names)
    assert conditions.parse_label("name:2", 11, names) == 3
    assert conditions.parse_label("number:2", 11, names) == 2
    assert conditions.parse_label("0", 11, names) == 0


def test_names_with_commas_and_a_class_named_random():
    names = ["a,b", "random", "c"]
    assert conditions.parse_labels("a,b", 2, 3, class_names=names).tolist() == [0, 0]
    assert conditions.parse_labels("name:a,b", 1, 3, class_names=names).tolist() == [0]
    assert conditions.parse_labels("name:random,c", 2, 3, class_names=names).tolist() == [1, 2]
    with pytest.raises(
        ValueError, match=r"random is the name of class 1\. For .* write name:random"
    ):
        conditions.parse_labels("random", 2, 3, class_names=names)


def test_columns_of_an_npz_are_refused(run_command, workdir, tmp_path):
    flags = ["--workdir", workdir, "--columns", 3, "--out", tmp_path / "x.npz"]
    assert "needs --out to be a .png" in run_command("sample", *flags, fails=True)


def test_pictures_that_cannot_be_are_refused_before_anything_is_drawn(
    run_command, workdir, tmp_path
):
    flags = ["--workdir", workdir, "--out", tmp_path / "x.png"]
    error = run_command("sample", *flags, "--columns=1000000000", fails=True)
    assert error == "error: --columns=1000000000 must be at most 16, the number of images.\n"
    error = run_command("sample", *flags, "--num=1000000", fails=True)
    assert error.startswith(
        "error: a picture of 1,000,000 images of 8 x 8 pixels would have 50,000 x "
    )
    flags += ["--image", tmp_path, "--num=1000000000"]
    error = run_command("edit", "image-to-image", *flags, fails=True)
    assert "--num=1000000000 must be an integer in the range [1, 10000]" in error


def test_fewer_images_than_labels_are_refused():
    with pytest.raises(ValueError, match=r"--num=2 must be at least 3 with --labels='0,3,9'"):
        conditions.parse_labels("0,3,9", 2, 10)


def test_sample_writes_npz_and_grid(run_command, workdir, tmp_path):
    flags = ["--workdir", workdir, "--labels", "0,3,9", "--num", 6, "--steps", 4]
    flags += ["--sampler", "ddim", "--cfg_scale", 1.5, "--seed", 0]
    out = run_command("sample", *flags, "--out", tmp_path / "new" / "s.npz")
    assert "6 samples of step 40" in out
    with np.load(tmp_path / "new" / "s.npz") as file:
        assert file["label"].tolist() == [0, 0, 3, 3, 9, 9]
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((6, 8, 8, 1), np.uint8)
        images = file["arr_0"]
    run_command("sample", *flags, "--out", tmp_path / "grid.png", "--batch_size", 2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 50 - 2, 3 * 50 - 2, 3)
    difference = grid[:48:6, :48:6, 0].astype(int) - images[0, :, :, 0]
    assert np.abs(difference).max() <= 1  # batches of 2: the last bit may round another way
    run_command("sample", *flags, "--step", 20, "--raw", "--out", tmp_path / "old.npz")
    with np.load(tmp_path / "old.npz") as file:
        assert not np.array_equal(file["arr_0"], images)


def test_samples_of_a_model_without_classes_have_no_labels(run_command, smoke_config, tmp_path):
    smoke_config.model.update(num_classes=0, null_condition=False)
    smoke_config.sample.cfg_scale = 1.0
    workdir = conftest.save_random(tmp_path / "run", smoke_config)
    flags = ["--workdir", workdir, "--num", 2, "--steps", 2, "--out", tmp_path / "x.npz"]
    run_command("sample", *flags)
    with np.load(tmp_path / "x.npz") as actual:
        assert set(actual) == {"arr_0"}


def test_sample_refuses_other_files_and_directories(run_command, workdir, tmp_path):
    error = run_command("sample", "--workdir", tmp_path, fails=True)
    assert "must be a directory that dit_jax.train has written" in error
    assert "Traceback" not in error
    error = run_command("sample", "--workdir", workdir, "--out", "x.gif", fails=True)
    assert "must end in .png or .npz" in error
    (tmp_path / "file").write_text("")
    error = run_command(
        "sample", "--workdir", workdir, "--out", tmp_path / "file" / "x.png", fails=True
    )
    assert f"cannot write --out={tmp_path}/file/x.png" in error


def test_prompts_are_drawn_once_each(run_command, captioned_workdir, tmp_path):
    flags = ["--workdir", captioned_workdir, "--steps", 2, "--out", tmp_path / "x.npz"]
    assert "2 samples" in run_command("sample", *flags, "--prompt", "a two", "--prompt", "a one")


@pytest.mark.slow
def test_two_processes_write_what_one_does(run_command, run_pair, workdir, tmp_path):
    flags = ["--workdir", workdir, "--num", 6, "--steps", 3, "--batch_size", 4]
    run_command("sample", *flags, "--out", tmp_path / "one.npz", as_users=True)
    first, second = run_pair("sample", *flags, "--out", tmp_path / "two.npz")
    assert "6 samples of step 40" in first
    assert "samples" not in second
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(one["label"], two["label"])
        difference = one["arr_0"].astype(int) - two["arr_0"]
        assert np.abs(difference).max() <= 1  # shares of 2 and 4: the last bit may round otherwise
    first, second = run_pair("evaluate", "--workdir", workdir, "--num", 20, "--steps", 2)
    assert "label_accuracy" in first
    assert "label_accuracy" not in second
    assert len((workdir / "evaluations.jsonl").read_text().splitlines()) == 1
