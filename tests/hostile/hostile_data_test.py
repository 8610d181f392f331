"""Hostile datasets, images, arrays and weights are refused; see helpers/hostile.py."""

import json
import pickle
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy
from helpers import hostile
from PIL import Image


def _add_feature(directory, **feature):
    path = directory / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["x"] = feature
    path.write_text(json.dumps(features))


def test_dataset_that_names_code_is_refused(refuse, tfds_directory, vae_dir, tmp_path):
    _add_feature(tfds_directory, pythonClassName="evil.Evil", text={})
    data = f"--config.data.name={tfds_directory}"
    config = ["--config", "configs/smoke.py", data]
    for command in (
        ["train", *config, "--workdir", tmp_path / "run"],
        ["encode", *config, "--vae", vae_dir, "--out", tmp_path / "out"],
        ["reconstruct", *config, "--vae", vae_dir],
    ):
        assert "names the class evil.Evil" in refuse(*command)
    latents = ["--config.latents.source=moments", f"--config.latents.moments={tfds_directory}"]
    message = refuse("train", "--config", "configs/smoke.py", *latents, "--workdir", tmp_path / "r")
    assert "names the class evil.Evil" in message


# Contents of a file whose name ends in .png.
IMAGES = {
    "eps": lambda: hostile.EPS,
    "tiff": hostile.make_tiff,
    "empty": lambda: b"",
    "large": lambda: hostile.make_png(20_000, 20_000),
    "text": lambda: b"\x89PNG\r\n\x1a\n" + b"\x00" * 100,
}


@pytest.mark.parametrize("kind", hostile.mark_slow(IMAGES, quick=["eps"]))
def test_image_that_is_no_png_of_the_right_size_is_refused(
    refuse, image_folder, folder_flags, vae_dir, trained_workdir, tmp_path, kind
):
    path = image_folder / "train" / "ant" / "0.png"
    path.write_bytes(IMAGES[kind]())
    encode = ["encode", *folder_flags, "--vae", vae_dir, "--out", tmp_path / "out"]
    assert f"{path}" in refuse(*encode)
    edit = ["edit", "image-to-image", "--workdir", trained_workdir, "--image", path]
    assert f"{path}" in refuse(*edit, "--out", tmp_path / "edited.png")
    evaluate = ["evaluate", "--samples", image_folder / "train", "--reference", image_folder]
    assert f"{path}" in refuse(*evaluate, "--extractor=pixels", "--image_size=8")


def _use_captions(train_flags):
    """Returns the flags of a run that reads captions instead of labels."""
    flags = [flag for flag in train_flags if "num_classes" not in str(flag)]
    flags += ["--config.data.caption_feature=text", "--config.model.num_classes=0"]
    return [*flags, "--config.model.null_condition=false", "--config.sample.cfg_scale=1"]


def test_links_and_paths_out_of_an_image_folder_are_refused(
    refuse, image_folder, folder_flags, tmp_path
):
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8)).save(secret)
    train = ["train", *folder_flags, "--workdir", tmp_path / "run"]
    link = image_folder / "train" / "ant" / "link.png"
    link.symlink_to(secret)
    assert "link.png" in refuse(*train)
    link.unlink()
    for name in ("../../secret.png", str(secret), "..\\..\\secret.png"):
        line = json.dumps({"file_name": name, "text": "a"})
        (image_folder / "train" / "metadata.jsonl").write_text(line + "\n")
        assert "metadata.jsonl" in refuse(*_use_captions(train))


@pytest.mark.slow
def test_metadata_without_a_line_end_is_refused(refuse, image_folder, folder_flags, tmp_path):
    hostile.make_sparse_file(image_folder / "train" / "metadata.jsonl")
    train = ["train", *_use_captions(folder_flags), "--workdir", tmp_path / "run"]
    assert "metadata.jsonl" in refuse(*train)


def test_names_with_control_characters_are_escaped(refuse, image_folder, folder_flags, tmp_path):
    strange = image_folder / "train" / "cow\x1b[31m\nerror: all is well"
    strange.mkdir()
    (strange / "\x1b]0;title\x07.png").write_bytes(b"")
    message = refuse("train", *folder_flags, "--workdir", tmp_path / "run")
    assert "\\x1b[31m\\n" in message
    assert "\nerror: all is well" not in message


METADATA = {
    "scale": hostile.make_setter("std", value=[0.0] * 4),
    "mean": hostile.make_setter("mean", value="\x1b[31m"),
    "channels": hostile.make_setter("mean", value=[0.0] * 5),
    "digest": hostile.make_setter("vae_digest", value={"\x1b[31m": 1}),
    "classes": hostile.make_setter("dataset", "train", "classes", value=[["\x1b[31m"]] * 10),
    "published": hostile.make_setter("published", value="\x1b[31m"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_moments_with_wrong_metadata_are_refused(refuse, moments_dir, tmp_path, kind):
    directory = shutil.copytree(moments_dir, tmp_path / "moments")
    metadata = json.loads((directory / "metadata.json").read_text())
    METADATA[kind](metadata)
    (directory / "metadata.json").write_text(json.dumps(metadata))
    config = ["--config=configs/digits_latents.py", "--config.model.in_channels=2"]
    config += [f"--config.latents.moments={directory}"]
    assert f"{directory}" in refuse("train", *config, "--workdir", tmp_path / "run")


@pytest.mark.parametrize("kind", hostile.mark_slow(hostile.ARRAYS, quick=["pickle", "huge"]))
def test_hostile_arrays_of_samples_and_references_are_refused(refuse, marker, tmp_path, kind):
    path = tmp_path / "x.npz"
    hostile.ARRAYS[kind](path, marker)
    good = tmp_path / "good.npz"
    np.savez(good, arr_0=np.zeros((10, 8, 8, 3), np.uint8))
    for samples, reference in ((path, good), (good, path)):
        flags = ["--samples", samples, "--reference", reference, "--extractor=pixels"]
        refuse("evaluate", *flags)


def _make_safetensors_header(header):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text


WEIGHTS = {
    "pickle.npz": lambda path, marker: np.savez(
        path, **{"x_embedder.proj.weight": np.array(hostile.Touch(marker), object)}
    ),
    "huge.npz": lambda path, _: hostile.write_zip(
        path, {"x.npy": hostile.make_npy((10**6, 10**6, 10**3), "<f4")}
    ),
    "length.safetensors": lambda path, _: path.write_bytes(struct.pack("<Q", 2**62)),
    "deep.safetensors": lambda path, _: path.write_bytes(_make_safetensors_header(b"[" * 10**6)),
    "shape.safetensors": lambda path, _: path.write_bytes(
        _make_safetensors_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}})
    ),
    "names.safetensors": lambda path, _: safetensors.numpy.save_file(
        {"\x1b[31m\nerror: well": np.ones(1, np.float32)}, path
    ),
    "config.safetensors": lambda path, _: safetensors.numpy.save_file(
        {"a": np.ones(1, np.float32)}, path, {"dit_jax.config": "[" * 10**6}
    ),
    "text.npz": lambda path, _: path.write_text("\x1b[31m"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused(refuse, marker, tmp_path, name):
    path = tmp_path / name
    WEIGHTS[name](path, marker)
    refuse("convert", "dit", path, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()


@pytest.mark.skipif("not __import__('importlib').util.find_spec('torch')", reason="needs torch")
@pytest.mark.parametrize("kind", ["dit", "inception"])
def test_hostile_pickles_are_refused(refuse, marker, tmp_path, kind):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"model": hostile.Touch(marker)}))
    refuse("convert", kind, path, tmp_path / "run")
