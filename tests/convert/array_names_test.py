"""Names in weight files: prefixes of wrappers, and files of the original code."""

import logging

import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS
from helpers import torch_format

from dit_jax import convert
from dit_jax.convert import array_names, tensor_files, weights


@pytest.fixture
def logged(caplog, monkeypatch):
    """logged(): messages that the package has logged."""
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "dit_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def _save(path, names):
    """Writes a file with an array under each of these names."""
    tensors = dict.fromkeys(names, np.zeros(1, np.float32))
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:  # as a training checkpoint, with objects that are no tensors
        by_name, records = torch_format.tensors(tensors)
        callback = torch_format.Call(torch_format.Global("pytorch_lightning", "Callback"), ())
        contents = {"epoch": 3, "state_dict": by_name, "callbacks": {"a": callback}}
        torch_format.save(path, contents, records)


NAMES = [f"encoder.{i}.weight" for i in range(6)]


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
def test_prefixes_of_all_names_are_removed_and_logged(kind, prefix, logged, tmp_path):
    path = tmp_path / "x.safetensors"
    _save(path, [prefix + name for name in NAMES])
    assert [*weights.read(path, kind)] == NAMES
    parts = sorted(f"{part}." for part in prefix[:-1].split("."))
    (message,) = logged()
    assert message.startswith(f"{path}: its names are read without the prefixes ")
    assert sorted(message.rpartition("prefixes ")[2].split(", ")) == parts


def test_wrappers_of_single_modules_are_removed(tmp_path):
    """Only some modules of a model may be compiled or wrapped."""
    tensors = {"encoder.0.weight": 0, "encoder._orig_mod.1.weight": 1}
    tensors |= {f"encoder.module.{i}.weight": i for i in range(2, 6)}
    stripped = array_names.strip_prefixes(tensors, "vae", tmp_path)
    assert stripped == {name: i for i, name in enumerate(NAMES)}


def test_names_without_prefixes_are_kept(logged, tmp_path):
    path = tmp_path / "x.safetensors"
    # The prefixes of other kinds may be a part of the model.
    for names in (NAMES, [f"transformer.{name}" for name in NAMES]):
        _save(path, names)
        assert [*weights.read(path, "vae")] == names
    assert not logged()


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


# Names in files of the original code.
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
    ("names", "model", "way_out"),
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
def test_files_of_the_original_code_are_refused_with_the_way_out(
    tmp_path, names, model, way_out, suffix
):
    path = tmp_path / f"model{suffix}"
    _save(path, names)
    for kind in ("vae", "unet", "sd", "clip"):
        with pytest.raises(ValueError, match=f"(?s){CODE}.*: {model}.*{way_out}") as error:
            convert.to_workdir(kind, path, tmp_path / "workdir")
        assert str(error.value).startswith(f"{path} has {len(names)} ")
    with pytest.raises(ValueError, match=CODE):
        weights.read(path, "dit")
    # Refused under the file name of diffusers too.
    directory = tmp_path / "directory"
    directory.mkdir()
    path.rename(directory / f"diffusion_pytorch_model{suffix.replace('ckpt', 'bin')}")
    with pytest.raises(ValueError, match=CODE):
        weights.read(directory, "vae")


def test_guided_diffusion_s_names_are_accepted_for_adm(tmp_path):
    _save(tmp_path / "x.safetensors", UNET)
    assert weights.read(tmp_path / "x.safetensors", "adm").keys() == {*UNET}


@pytest.mark.parametrize("kind", ["dit", "unet", "vae", "clip"])
def test_published_names_are_not_taken_for_others(kind):
    """Otherwise published files would be refused, or their arrays renamed."""
    path = GOLDENS / f"{kind}_tiny_reference.npz"
    names = tensor_files.describe(path)
    assert {*weights.read(path, kind)} == {*names}
    assert not {part for name in names for part in name.split(".")} & {*array_names.WRAPPERS}
