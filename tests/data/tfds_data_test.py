"""TFDS directories from elsewhere: what they name is refused before TFDS imports or reads it."""

import json
import shutil
import sys

import pytest

from dit_jax import latents
from dit_jax.data import tfds_data

EVIL = "evil_module.Evil"


@pytest.fixture
def directory(digits_dir, tmp_path):
    """A copy of the digits, to change."""
    return shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "digits")


@pytest.fixture
def marker(directory, tmp_path, monkeypatch):
    """A file that appears if the module in the directory is imported."""
    path = tmp_path / "marker"
    (directory / "evil_module.py").write_text(
        "import pathlib, tensorflow_datasets as tfds\n"
        f"pathlib.Path({str(path)!r}).touch()\n"
        "class Evil(tfds.features.Text): pass\n"
    )
    monkeypatch.syspath_prepend(str(directory))
    yield path
    sys.modules.pop("evil_module", None)


def _edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def _open(directory):
    return tfds_data.open_builder(str(directory), "", "image", "the command")


def _as_feature(form, name):
    if form == "older":
        return {"type": name, "content": {}, "proto_cls": ""}
    return {{"camel": "pythonClassName", "snake": "python_class_name"}[form]: name, "text": {}}


@pytest.mark.parametrize("form", ["camel", "snake", "older"])
@pytest.mark.parametrize("place", ["features.json", "dataset_info.json", "nested", "top"])
def test_code_beside_the_data_is_not_run(directory, marker, form, place):
    def add(value):
        evil, features = _as_feature(form, EVIL), value["featuresDict"]["features"]
        if place == "top":
            return evil
        if place == "nested":
            name = "tensorflow_datasets.core.features.sequence_feature.Sequence"
            evil = {"pythonClassName": name, "sequence": {"feature": evil}}
        features["extra"] = evil
        return None

    if place == "dataset_info.json":
        features = json.loads((directory / "features.json").read_text())
        add(features)
        (directory / "features.json").unlink()
        _edit(directory / "dataset_info.json", lambda info: info | {"features": features})
    else:
        _edit(directory / "features.json", add)
    with pytest.raises(ValueError, match=r"names the class evil_module\.Evil, which is not one of"):
        _open(directory)
    assert not marker.exists()


def test_a_dataset_found_by_name_is_looked_at_too(digits_dir, marker, directory, tmp_path):
    prepared = tmp_path / "data" / "strange_digits" / "1.0.0"
    shutil.copytree(directory, prepared)
    _edit(prepared / "dataset_info.json", lambda info: info | {"name": "strange_digits"})
    features = json.loads((prepared / "features.json").read_text())
    features["featuresDict"]["features"]["extra"] = _as_feature("camel", EVIL)
    (prepared / "features.json").write_text(json.dumps(features))
    for name in ("strange_digits", "strange_digits:1.0.0"):
        with pytest.raises(ValueError, match="which is not one of TFDS's features"):
            tfds_data.open_builder(name, str(tmp_path / "data"), "image", "")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["huggingface:mnist", "kaggle:a", "../digits", "a/../../b", "digits/x/a=1", "a\x1b[2J"],
)
def test_names_that_reach_elsewhere_are_unknown(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared TFDS dataset") as error:
        tfds_data.open_builder(name, str(tmp_path), "image", "")
    assert "\x1b" not in str(error.value)


def test_own_classes_are_read(directory):
    assert _open(directory).info.splits["train"].num_examples == 1617


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "contents", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000, b'{"splits": 3}']
)
def test_damaged_descriptions_are_named(directory, name, contents):
    (directory / name).write_bytes(contents)
    with pytest.raises(
        ValueError, match=r"cannot read .*\.json|is no TFDS dataset that can be read"
    ):
        _read(directory)


def _read(directory, split="train"):
    builder = _open(directory)
    return tfds_data.read_split(builder, split, "the command")


def _split_of(info, name="train"):
    return next(split for split in info["splits"] if split["name"] == name)


def test_files_outside_of_the_directory_are_not_read(directory, tmp_path):
    (name,) = (p.name for p in directory.glob("digits-train*"))
    shutil.move(directory / name, tmp_path / name)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    for outside in (f"../{template}", f"{tmp_path}/{template}", f"sub/../../{template}"):

        def change(info, outside=outside):
            _split_of(info)["filepathTemplate"] = outside

        _edit(directory / "dataset_info.json", change)
        with pytest.raises(ValueError, match="names, or links to, a file outside of it"):
            _read(directory)


def test_links_out_of_the_directory_are_not_read(directory, tmp_path):
    (path,) = directory.glob("digits-train*")
    link = tmp_path / "link"
    link.symlink_to(directory)
    _read(link)
    shutil.move(path, tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(ValueError, match="names, or links to, a file outside of it"):
        _read(directory)


def test_more_records_than_bytes_are_refused(directory):
    _edit(
        directory / "dataset_info.json",
        lambda info: _split_of(info).update(shardLengths=[str(10**15)]),
    )
    with pytest.raises(
        ValueError, match="counts 1,000,000,000,000,000 records, more than its files"
    ):
        _read(directory)


@pytest.mark.parametrize("count", [100, 1616, 1618])
@pytest.mark.parametrize("split", ["train", "train[:50]"])
def test_other_numbers_of_records_than_the_files_hold_are_refused(directory, count, split):
    _edit(
        directory / "dataset_info.json",
        lambda info: _split_of(info).update(shardLengths=[str(count)]),
    )
    with pytest.raises(
        ValueError, match=f"00000-of-00001 holds 1,617 records, but .* counts {count:,}, so one of"
    ):
        _read(directory, split)


def test_lost_and_cut_shards_are_named(directory, smoke_config):
    (path,) = directory.glob("digits-train*")
    path.write_bytes(path.read_bytes()[: 2**17])
    smoke_config.data.name = str(directory)
    with pytest.raises(ValueError, match=r"cannot read .*/digits-train.*If it was cut, remove it"):
        latents.open_split(smoke_config, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 files of .* are missing, such as digits"):
        latents.open_split(smoke_config, "train")


def test_slices_take_their_records_of_their_files(directory):
    records, _, shards = _read(directory, "train[5:9]+test[:3]")
    assert len(records) == 7
    assert shards.ranges == [(5, 4), (0, 3)]
    assert [shards.path(i).is_file() for i in range(2)] == [True, True]


def test_slice_that_ends_before_it_begins_is_empty(smoke_config):
    smoke_config.data.train_split = "train[5:2]"
    with pytest.raises(ValueError, match="is empty"):
        latents.open_split(smoke_config, "train")
