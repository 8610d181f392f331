"""Weights in one file or several: directories, indices, and files that must not be read."""

import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
from helpers import torch_format

from dit_jax import convert
from dit_jax.convert import weights
from dit_jax.convert.conversions import CONVERTERS

ARRAYS = {f"encoder.{i}.weight": np.full((2, 3), i, np.float32) for i in range(6)}


def _save(path, arrays):
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        torch_format.save(path, *torch_format.tensors(arrays))


def _save_shards(directory, name, arrays=ARRAYS, count=3):
    """Writes an index and its files; returns {name of an array: name of its file}."""
    stem, suffix = name.rsplit(".", 1)
    weight_map = {
        n: f"{stem}-{i % count + 1:05}-of-{count:05}.{suffix}" for i, n in enumerate(arrays)
    }
    for file in set(weight_map.values()):
        _save(directory / file, {n: array for n, array in arrays.items() if weight_map[n] == file})
    _save_index(directory, name, weight_map)
    return weight_map


def _save_index(directory, name, weight_map):
    index = {"metadata": {"total_size": 144}, "weight_map": weight_map}
    (directory / f"{name}.index.json").write_text(json.dumps(index))


def _check(tensors, arrays=ARRAYS):
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], array)


DIRECTORIES = [(kind, name) for kind, (_, names) in weights.WRITERS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), DIRECTORIES)
def test_directories_of_one_file_or_several(kind, name, tmp_path):
    _save(tmp_path / name, ARRAYS)
    _check(weights.read(tmp_path, kind))
    _check(weights.read(tmp_path / name, kind))
    (tmp_path / name).unlink()
    weight_map = _save_shards(tmp_path, name)
    _check(weights.read(tmp_path, kind))
    missing = sorted(weight_map.values())[1]
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint file at .*{missing}"):
        weights.read(tmp_path, kind)


@pytest.mark.parametrize("kind", weights.WRITERS)
def test_safetensors_are_preferred_and_missing_files_named(kind, tmp_path):
    writer, (name, torch_name) = weights.WRITERS[kind]
    message = f"no {name} or {torch_name} in {tmp_path}, where {writer} writes weights"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}\\.$"):
        weights.read(tmp_path, kind)
    stem, suffix = name.rsplit(".", 1)
    for variant, plain in (
        (f"{name}.index.fp16.json", f"{name}.index.json"),
        (f"{stem}.bf16.{suffix}", name),
    ):
        (tmp_path / variant).write_text("")
        message = f"weights; {variant} is there: give a copy named {plain}"
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            weights.read(tmp_path, kind)
    _save_shards(tmp_path, torch_name, {"a": np.zeros(1, np.float32)}, 1)
    assert weights.read(tmp_path, kind).keys() == {"a"}
    _save(tmp_path / name, ARRAYS)
    _check(weights.read(tmp_path, kind))


@pytest.mark.parametrize("kind", ["adm", "inception", "lpips"])
def test_directories_of_other_kinds_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="is a directory: give the file in it"):
        weights.read(tmp_path, kind)


NAME = "model.safetensors"
OUTSIDE = r"may only name \.safetensors files in its own directory that are no links"


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "../../etc/x.safetensors",
        "{tmp_path}/other.safetensors",
        "sub/x.safetensors",
        "link.safetensors",
        "other.bin",
        ".",
        "..",
        "",
        "a\0.safetensors",
        "a\x1b[2J\n.safetensors",
        "\ud800.safetensors",
        "x" * 10_000 + ".safetensors",
    ],
)
def test_index_that_names_files_elsewhere_is_refused(shard, tmp_path):
    directory = tmp_path / "directory"
    (directory / "sub").mkdir(parents=True)
    for path in (tmp_path / "other.safetensors", directory / "sub" / "x.safetensors"):
        _save(path, ARRAYS)
    (directory / "link.safetensors").symlink_to("../other.safetensors")
    shard = shard.replace("{tmp_path}", str(tmp_path))
    _save_index(directory, NAME, dict.fromkeys(ARRAYS, shard))
    with pytest.raises(ValueError, match=OUTSIDE) as error:
        weights.read(directory, "clip")
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000


def test_links_inside_the_directory_or_to_the_hub_s_cache_are_read(tmp_path):
    """The cache of Hugging Face's hub has a download in this layout."""
    model = tmp_path / "models--who--what"
    directory = model / "snapshots" / "1234" / "text_encoder"
    directory.mkdir(parents=True)
    (model / "blobs").mkdir()
    weight_map = _save_shards(directory, NAME)
    for i, file in enumerate(sorted({*weight_map.values()})):
        (directory / file).rename(model / "blobs" / f"{i}")
        (directory / file).symlink_to(f"../../../blobs/{i}")
    _check(weights.read(directory, "clip"))
    for i, file in enumerate(sorted({*weight_map.values()})):
        (directory / file).unlink()
        (directory / f"blob{i}.safetensors").write_bytes((model / "blobs" / f"{i}").read_bytes())
        (directory / file).symlink_to(f"blob{i}.safetensors")
    _check(weights.read(directory, "clip"))
    link = tmp_path / "link"
    link.symlink_to(directory)
    _check(weights.read(link, "clip"))


@pytest.mark.parametrize(
    ("index_json", "message"),
    [
        ("[1]", r"index.json: it holds a list instead of fields with names\. It must be the index"),
        ("{}", "has no weight_map of names to files"),
        ('{"weight_map": []}', "has no weight_map of names to files"),
        ('{"weight_map": {}}', "has no weight_map of names to files"),
        ('{"weight_map": {"a": 1}}', "has no weight_map of names to files"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is in one object tw"),
        ('{"weight_map": ' + "[" * 10**5, "nested more than 100 deep"),
    ],
)
def test_damaged_index_is_named(index_json, message, tmp_path):
    (tmp_path / f"{NAME}.index.json").write_text(index_json)
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path, "clip")


def test_tensor_in_two_files_of_an_index_is_refused(tmp_path):
    weight_map = _save_shards(tmp_path, NAME)
    for file in {*weight_map.values()}:
        _save(tmp_path / file, ARRAYS)
    with pytest.raises(ValueError, match=r"both hold encoder\.0\.weight, .* and 1 more\. Remove"):
        weights.read(tmp_path, "clip")


@pytest.mark.parametrize("kind", [*CONVERTERS, "adm"])
def test_quantised_weights_are_refused_for_every_kind(kind, tmp_path):
    _save(tmp_path / "x.pt", {name: array.astype(np.int8) for name, array in ARRAYS.items()})
    message = r"no floating-point numbers: encoder\.0\.weight \(int8\), .* and 1 more"
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path / "x.pt", kind)


def test_single_files_without_config_json_are_refused(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    _save(path, ARRAYS)
    for kind in ("vae", "unet", "clip"):
        message = r"^no .*/config\.json: it must be the config\.json that .* writes beside the we"
        with pytest.raises(FileNotFoundError, match=message):
            convert.to_workdir(kind, path, tmp_path / "workdir")
    with pytest.raises(
        FileNotFoundError, match=r"no .*model_index\.json: it must be the list of parts in the dir"
    ):
        convert.to_workdir("sd", path, tmp_path / "workdir")
    for name, message in (("x.ckpt", "no checkpoint file at"), ("x.txt", "expected")):
        if name == "x.txt":
            (tmp_path / name).touch()
        for kind in ("vae", "unet", "clip"):
            with pytest.raises((ValueError, OSError), match=message):
                convert.to_workdir(kind, tmp_path / name, tmp_path / "workdir")
    assert not os.path.lexists(tmp_path / "workdir")
