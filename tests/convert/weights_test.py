"""Weights as others write them: folders of one file or several, prefixes, other codes' files."""

import json
import logging
import os
import re

import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS
from helpers import torch_format

from dit_jax import convert
from dit_jax.convert import array_names, tensor_files, weights
from dit_jax.convert.conversions import CONVERTERS

ARRAYS = {f"encoder.{i}.weight": np.full((2, 3), i, np.float32) for i in range(6)}


@pytest.fixture
def lines(caplog, monkeypatch):
    """lines(): what the package has logged."""
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "dit_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def _save(path, arrays):
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        torch_format.save(path, *torch_format.tensors(arrays))


def _save_shards(directory, name, arrays=ARRAYS, count=3):
    """Writes an index and the files that it names; returns {name: file}."""
    stem, suffix = name.rsplit(".", 1)
    files = {n: f"{stem}-{i % count + 1:05}-of-{count:05}.{suffix}" for i, n in enumerate(arrays)}
    for file in set(files.values()):
        _save(directory / file, {n: a for n, a in arrays.items() if files[n] == file})
    _save_index(directory, name, files)
    return files


def _save_index(directory, name, files):
    index = {"metadata": {"total_size": 144}, "weight_map": files}
    (directory / f"{name}.index.json").write_text(json.dumps(index))


def _check(actual, arrays=ARRAYS):
    assert actual.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(actual[name], array)


FOLDERS = [(kind, name) for kind, (_, names) in weights.WRITERS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_folders_of_one_file_or_several(kind, name, tmp_path):
    _save(tmp_path / name, ARRAYS)
    _check(weights.read(tmp_path, kind))
    _check(weights.read(tmp_path / name, kind))
    (tmp_path / name).unlink()
    files = _save_shards(tmp_path, name)
    _check(weights.read(tmp_path, kind))
    missing = sorted(files.values())[1]
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint file at .*{missing}"):
        weights.read(tmp_path, kind)


@pytest.mark.parametrize("kind", weights.WRITERS)
def test_safetensors_are_preferred_and_missing_files_named(kind, tmp_path):
    writer, (name, old) = weights.WRITERS[kind]
    message = f"no {name} or {old} in {tmp_path}, where {writer} writes weights"
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
    _save_shards(tmp_path, old, {"old": np.zeros(1, np.float32)}, 1)
    assert weights.read(tmp_path, kind).keys() == {"old"}
    _save(tmp_path / name, ARRAYS)
    _check(weights.read(tmp_path, kind))


@pytest.mark.parametrize("kind", ["adm", "inception", "lpips"])
def test_others_are_files(kind, tmp_path):
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
def test_index_that_names_other_places_is_refused(shard, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "other.safetensors", folder / "sub" / "x.safetensors"):
        _save(place, ARRAYS)
    (folder / "link.safetensors").symlink_to("../other.safetensors")
    shard = shard.replace("{tmp_path}", str(tmp_path))
    _save_index(folder, NAME, dict.fromkeys(ARRAYS, shard))
    with pytest.raises(ValueError, match=OUTSIDE) as error:
        weights.read(folder, "clip")
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000


def test_links_inside_the_folder_or_to_the_hub_s_cache_are_read(tmp_path):
    """As the cache of Hugging Face's hub lays out a download."""
    model = tmp_path / "models--who--what"
    folder = model / "snapshots" / "1234" / "text_encoder"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    files = _save_shards(folder, NAME)
    for i, file in enumerate(sorted({*files.values()})):
        (folder / file).rename(model / "blobs" / f"{i}")
        (folder / file).symlink_to(f"../../../blobs/{i}")
    _check(weights.read(folder, "clip"))
    for i, file in enumerate(sorted({*files.values()})):
        (folder / file).unlink()
        (folder / f"blob{i}.safetensors").write_bytes((model / "blobs" / f"{i}").read_bytes())
        (folder / file).symlink_to(f"blob{i}.safetensors")
    _check(weights.read(folder, "clip"))
    link = tmp_path / "link"
    link.symlink_to(folder)
    _check(weights.read(link, "clip"))


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_damaged_index_is_named(text, message, tmp_path):
    (tmp_path / f"{NAME}.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path, "clip")


def test_tensor_in_two_files_of_an_index_is_refused(tmp_path):
    files = _save_shards(tmp_path, NAME)
    for file in {*files.values()}:
        _save(tmp_path / file, ARRAYS)
    with pytest.raises(ValueError, match=r"both hold encoder\.0\.weight, .* and 1 more\. Remove"):
        weights.read(tmp_path, "clip")


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        *(
            (kind, "module.")
            for kind in ("dit", "vae", "unet", "clip", "adm", "inception", "lpips")
        ),
        ("dinov2", "_orig_mod."),
        ("vae", "module._orig_mod.vae."),
        ("vae", "first_stage_model."),
        ("vae", "model.module."),
        ("unet", "ema_model."),
        ("unet", "_orig_mod.unet."),
        ("clip", "text_encoder."),
        ("clip", "cond_stage_model.transformer."),
        ("dit", "_fsdp_wrapped_module.model."),
    ],
)
def test_prefixes_of_all_names_are_left_out_and_said(kind, prefix, lines, tmp_path):
    path = tmp_path / "x.safetensors"
    _save(path, {prefix + name: array for name, array in ARRAYS.items()})
    _check(weights.read(path, kind))
    parts = sorted(f"{part}." for part in prefix[:-1].split("."))
    (line,) = lines()
    assert line.startswith(f"{path}: its names are read without the prefixes ")
    assert sorted(line.rpartition("prefixes ")[2].split(", ")) == parts


def test_wrappers_of_parts_are_left_out(tmp_path):
    """As where only some modules of a model are compiled or wrapped."""
    actual = {"encoder._orig_mod.0.weight" if i else "encoder.0.weight": i for i in range(1)}
    actual |= {f"encoder.module.{i}.weight": i for i in range(1, 6)}
    assert array_names.strip_prefixes(actual, "vae", tmp_path) == {
        f"encoder.{i}.weight": i for i in range(6)
    }


def test_names_without_prefixes_say_nothing(lines, tmp_path):
    _save(tmp_path / "x.safetensors", ARRAYS)
    weights.read(tmp_path / "x.safetensors", "vae")
    # The prefixes of other kinds may be a part of the model.
    other = {f"transformer.{name}": array for name, array in ARRAYS.items()}
    _save(tmp_path / "x.safetensors", other)
    assert weights.read(tmp_path / "x.safetensors", "vae").keys() == other.keys()
    assert not lines()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vae.a", "vae.b", "unet.a"], r"3 names, 2 with vae\., 1 with unet\. before them"),
        (["model.a", "ema_model.a"], r"2 names, 1 with model\., 1 with ema_model\. before"),
        (["ema_model.a", "step", "initted"], r"3 names, 1 with ema_model\. before them"),
        (["module.model.a", "model.b", "c"], r"3 names, 2 with model\. before them"),
        (["a.b", "module.a.b"], r"has 2 names, but without module only 1 differ"),
        (["a.b", "a._orig_mod.b", "a.c"], r"has 3 names, but without _orig_mod only 2 differ"),
    ],
)
def test_ambiguous_prefixes_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        array_names.strip_prefixes(dict.fromkeys(names, np.zeros(1)), "vae", tmp_path / "x.npz")


# Names of the files that the original code and others wrote.
UNET = ["input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
VAE = ["encoder.down.0.block.0.norm1.weight", "decoder.mid.attn_1.q.weight", "quant_conv.bias"]
SD1 = "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight"
SD2 = "cond_stage_model.model.transformer.resblocks.0.ln_1.weight"
UNETS = [f"model.diffusion_model.{name}" for name in UNET]
VAES = [f"first_stage_model.{name}" for name in VAE]
PIPELINE = r'diffusers\.StableDiffusionPipeline\.from_single_file\("FILE"\)\.save_pretrained\("SD_D'
AUTOENCODER = r'diffusers\.AutoencoderKL\.from_single_file\("FILE"\)\.save_pretrained\("VAE_DIR"\)'
CODE = r"names of the original code of latent diffusion, such as"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("names", "what", "way_out"),
    [
        ([*UNETS, *VAES, SD1, "betas"], "a Stable Diffusion, its UNet, VAE and text", PIPELINE),
        ([*VAES, *UNETS, SD2], "a Stable Diffusion, its UNet, VAE and text model", PIPELINE),
        ([*UNETS, *VAES, "cond_stage_model.embedding.weight"], "a latent diffusion", AUTOENCODER),
        (
            [*UNETS, "conditioner.embedders.0.weight"],
            "a Stable Diffusion XL",
            "Stable Diffusion 1 and 2 are",
        ),
        (VAE, "a VAE", AUTOENCODER),
        (VAES, "a VAE", AUTOENCODER),
        (UNET, "a UNet alone", "guided-diffusion's, run `convert adm`"),
    ],
)
def test_original_codes_files_are_named_with_the_way_out(tmp_path, names, what, way_out, suffix):
    path = tmp_path / f"model{suffix}"
    actual = dict.fromkeys(names, np.zeros(1, np.float32))
    if suffix == ".ckpt":
        by_name, records = torch_format.tensors(actual)
        other = torch_format.Call(torch_format.Global("pytorch_lightning", "Callback"), ())
        contents = {"epoch": 3, "state_dict": by_name, "callbacks": {"a": other}}
        torch_format.save(path, contents, records)
    else:
        _save(path, actual)
    for kind in ("vae", "unet", "sd", "clip"):
        with pytest.raises(ValueError, match=f"(?s){CODE}.*: {what}.*{way_out}") as error:
            convert.to_workdir(kind, path, tmp_path / "workdir")
        assert str(error.value).startswith(f"{path} has {len(names)} ")
    with pytest.raises(ValueError, match=CODE):
        weights.read(path, "dit")
    # In diffusers' place too.
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / f"diffusion_pytorch_model{suffix.replace('ckpt', 'bin')}")
    with pytest.raises(ValueError, match=CODE):
        weights.read(folder, "vae")


def test_guided_diffusion_s_names_are_adm_s(tmp_path):
    _save(tmp_path / "x.safetensors", dict.fromkeys(UNET, np.zeros(1, np.float32)))
    assert weights.read(tmp_path / "x.safetensors", "adm").keys() == {*UNET}


@pytest.mark.parametrize("kind", ["dit", "unet", "vae", "clip"])
def test_published_names_are_no_original_code_s_and_have_no_prefix(kind):
    """Else their own files would be refused or renamed."""
    path = GOLDENS / f"{kind}_tiny_reference.npz"
    names = tensor_files.describe(path)
    assert {*weights.read(path, kind)} == {*names}
    assert not {part for name in names for part in name.split(".")} & {*array_names.WRAPPERS}


@pytest.mark.parametrize("kind", [*CONVERTERS, "adm"])
def test_quantised_weights_are_refused_of_every_kind(kind, tmp_path):
    _save(tmp_path / "x.pt", {name: array.astype(np.int8) for name, array in ARRAYS.items()})
    message = r"no floating-point numbers: encoder\.0\.weight \(int8\), .* and 1 more"
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path / "x.pt", kind)


def test_single_files_without_their_config_say_what_to_give(tmp_path):
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
