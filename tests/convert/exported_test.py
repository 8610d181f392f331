"""A DiT exported to one file: its arrays, its config, and configs that somebody has changed."""

import errno
import json
import types

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import published_files
from ml_collections import ConfigDict

from configs import dit_xl_2_256_published, smoke
from dit_jax import conditions, convert, workdirs
from dit_jax.convert import exported
from dit_jax.sampling import generate, runs
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


@pytest.fixture(scope="module")
def two_checkpoints(golden_model_config, golden_params, tmp_path_factory):
    """A workdir with two checkpoints, as training writes them; shared, so no test may change it."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.model.attention = "cudnn"  # not on this machine
    (workdir / "checkpoints").mkdir(parents=True)
    workdirs.write_config(workdir, config)
    with checkpoint.open_manager(workdir, config) as manager:
        for step in (1, 2):
            scaled = [
                jax.tree.map(lambda array, factor=factor: factor * array, golden_params)
                for factor in (-step, step, 0)
            ]
            trees = dict(zip(checkpoint.STATE_ITEMS, scaled, strict=True))
            state = types.SimpleNamespace(**trees)
            checkpoint.save(manager, step, state, {}, config)
    return workdir


@pytest.mark.parametrize(
    ("step", "raw", "factor"), [(None, False, 2), (1, False, 1), (2, True, -2), (1, True, -1)]
)
def test_export_selects_step_and_ema(two_checkpoints, published, tmp_path, step, raw, factor):
    out = tmp_path / "new" / "dit.safetensors"
    assert exported.write(two_checkpoints, out, step, raw) == abs(factor)
    arrays = safetensors.numpy.load_file(out)
    name = "blocks.2.attn.qkv.weight"
    np.testing.assert_array_equal(arrays[name], factor * published[name])
    np.testing.assert_array_equal(arrays["pos_embed"], published["pos_embed"])
    assert list(out.parent.iterdir()) == [out]
    assert out.stat().st_mode == (two_checkpoints / "config.json").stat().st_mode


def test_impossible_exports_are_refused(published, monkeypatch, tmp_path):
    diffusers_dir = published_files.write_dit(tmp_path / "transformer", published)
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"DST=.*dit\.npz must end in \.safetensors"):
        exported.write(tmp_path / "ours", tmp_path / "dit.npz")
    with pytest.raises(OSError, match=r"cannot write DST=.*config\.json/dit\.safetensors"):
        exported.write(tmp_path / "ours", tmp_path / "ours" / "config.json" / "dit.safetensors")
    out = tmp_path / "dit.safetensors"
    (tmp_path / "lpips").mkdir()
    other = ConfigDict({"model": {"name": "lpips", "dtype": "float32"}})
    workdirs.write_config(tmp_path / "lpips", other)
    with pytest.raises(ValueError, match="holds a 'lpips', not a 'dit'"):
        exported.write(tmp_path / "lpips", out)
    with pytest.raises(FileNotFoundError, match="must be a directory that"):
        exported.write(tmp_path, out)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in"):
        exported.write(tmp_path / "ours", out, step=3)
    with pytest.raises(ValueError, match="holds only EMA parameters: leave out --raw"):
        exported.write(tmp_path / "ours", out, raw=True)

    out.write_bytes(b"older file")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=rf"cannot write {out}: .*No space left"):
        exported.write(tmp_path / "ours", out)
    assert out.read_bytes() == b"older file"
    assert not list(tmp_path.glob("*.tmp*"))


def test_export_keeps_the_config(workdir, tmp_path):
    """The file is converted to a workdir that draws the same samples: a flow of pixels."""
    config = json.loads((workdir / "config.json").read_text())
    config["diffusion"]["process"] = "flow"
    config["objective"]["prediction"] = "u"
    config["sample"] |= dict(sampler="ab2", steps=3)
    config["data"] |= dict(source="folder", name="somewhere")
    for path in (workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")):
        path.write_text(json.dumps(config))
    exported.write(workdir, tmp_path / "flow.safetensors")
    back = convert.to_workdir("dit", tmp_path / "flow.safetensors", tmp_path / "back")
    config["data"] |= dict(data_dir="", name="")
    config["latents"]["moments"] = ""
    assert back.to_dict() == config
    output, reference = (_draw(directory) for directory in (workdir, tmp_path / "back"))
    np.testing.assert_array_equal(output, reference)
    del config["sample"]["last_step_t"]  # an older version's file
    config["sample"]["last_step_size"] = 0.0
    arrays = safetensors.numpy.load_file(tmp_path / "flow.safetensors")
    metadata = {exported.METADATA_KEY: json.dumps(config)}
    safetensors.numpy.save_file(arrays, tmp_path / "older.safetensors", metadata)
    older = convert.to_workdir("dit", tmp_path / "older.safetensors", tmp_path / "older")
    assert older.to_dict() == back.to_dict()
    other = smoke.get_config()
    with pytest.raises(ValueError, match=r"was exported with diffusion=.* Leave out --config"):
        convert.to_workdir("dit", tmp_path / "flow.safetensors", tmp_path / "other", config=other)


def _draw(workdir):
    trained = runs.load(workdir)
    request = conditions.from_labels([0, 1], trained.config.model.num_classes)
    mesh, to_image = trained.mesh, trained.to_image
    return generate.generate(trained.make_sample_fn(), trained.params, request, 0, mesh, to_image)


def _change_metadata(path, config_json):
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    safetensors.numpy.save_file(tensors, path, {"dit_jax": config_json})


@pytest.fixture
def exported_file(workdir, tmp_path):
    """(a file that `exported.write` wrote, the config in it)."""
    exported.write(workdir, tmp_path / "flow.safetensors")
    with safetensors.safe_open(tmp_path / "flow.safetensors", framework="numpy") as file:
        return tmp_path / "flow.safetensors", json.loads(file.metadata()["dit_jax"])


@pytest.mark.parametrize(
    ("config_json", "message"),
    [
        ("", r"cannot read the config in .*flow\.safetensors: it ends too early"),
        ("[" * 10**5, "nested more than 100 deep"),
        ('{"a": ' + "9" * 10**5 + "}", "Exceeds the limit"),
        ("[1]", r"has {'config': \[1\]}\. It must be the config that `convert dit-export` writes"),
        ("{}", "has {'model': None, 'data': None, 'diffusion': None, 'objective': None"),
    ],
)
def test_exported_config_that_is_no_config_is_refused(
    exported_file, tmp_path, config_json, message
):
    path, _ = exported_file
    _change_metadata(path, config_json)
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dit", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "depth", 10**9, "has {'depth': 1000000000}"),
        ("model", "hidden_size", "48", "has {'hidden_size': '48'}"),
        ("model", "hidden_size", 2**20, r"more than 67,108,864 numbers|does not fit"),
        ("model", "input_size", 4096, r"more than 67,108,864 numbers|does not fit"),
        ("model", "other", 1, "has {'other': 1}"),
        ("model", "remat", None, "remat"),
        ("data", "name", None, "has {'name': None}"),
        ("latents", None, 7, "latents=7 must be an object with keys"),
    ],
)
def test_invalid_values_in_an_exported_config_are_refused(
    exported_file, tmp_path, section, key, value, message
):
    path, config = exported_file
    if key is None:
        config[section] = value
    else:
        config[section][key] = value
    _change_metadata(path, json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dit", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "diffusion",
            "beta_end",
            float("nan"),
            r"diffusion\.beta_end=nan must be a number in \(0, 1",
        ),
        ("diffusion", "beta_end", float("inf"), r"diffusion\.beta_end=inf must be"),
        ("diffusion", "sigma_data", "1", r"diffusion\.sigma_data='1' must be"),
        ("diffusion", "process", "other", r"unknown diffusion\.process='other'"),
        ("diffusion", "process", [], "diffusion.process=.* must be a str"),
        ("objective", "min_t", -1.0, r"objective\.min_t=-1\.0 must be"),
        ("latents", "scale", [1.0, float("nan")], r"latents\.scale=\[1\.0, nan\] must be"),
        ("sample", "cfg_scale", 0.5, r"sample\.cfg_scale=0\.5 must be"),
        ("objective", "condition_dropout", 2.0, r"condition_dropout=2\.0 must be"),
        ("optim", "ema_decay", float("nan"), r"optim\.ema_decay=nan must be"),
    ],
)
def test_numbers_out_of_range_in_an_exported_config_are_refused(
    exported_file, tmp_path, section, key, value, message
):
    path, config = exported_file
    config[section][key] = value
    _change_metadata(path, json.dumps(config))
    with pytest.raises(ValueError, match=rf"the config in .*flow\.safetensors .*({message})"):
        convert.to_workdir("dit", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_key_in_an_exported_config_is_refused(exported_file, tmp_path):
    path, config = exported_file
    del config["diffusion"]["beta_start"]
    _change_metadata(path, json.dumps(config))
    with pytest.raises(ValueError, match=r"the config in .*flow\.safetensors .*beta_start"):
        convert.to_workdir("dit", path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["/etc", "../x", "~/x", "a\\b", "gs://x", ""])
def test_paths_in_an_exported_config_are_ignored(exported_file, tmp_path, name):
    """Otherwise its author could have files of this machine read, or run code of TFDS."""
    path, config = exported_file
    config["init_from"] = name
    config["data"] |= dict(name=name, data_dir=name)
    config["latents"] |= dict(vae=name, moments=name)
    config["fid"] |= dict(reference=name, weights=name)
    config["text"]["encoder"] = name
    _change_metadata(path, json.dumps(config))
    back = convert.to_workdir("dit", path, tmp_path / "ours")
    paths = [back.init_from, back.data.name, back.data.data_dir, back.latents.vae]
    paths += [back.latents.moments, back.fid.reference, back.fid.weights, back.text.encoder]
    assert paths == [""] * 8
    config["data"]["name"] = "imagenet2012"  # of TFDS, no path
    _change_metadata(path, json.dumps(config))
    assert convert.to_workdir("dit", path, tmp_path / "again").data.name == "imagenet2012"


def test_exported_config_of_wide_images_is_read(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["input_size"] = config["data"]["image_size"] = [8, 12]
    (workdir / "config.json").write_text(json.dumps(config))
    for path in (workdir / "checkpoints").glob("*/config/metadata"):
        path.write_text(json.dumps(config))
    out = tmp_path / "wide.safetensors"
    exported.write(workdir, out)
    assert tuple(exported.read_config(out).model.input_size) == (8, 12)
