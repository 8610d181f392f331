"""The config that an exported DiT's file carries: of whatever values somebody has put into it."""

import json

import pytest
import safetensors
import safetensors.numpy

from configs import dit_xl_2_256_published
from dit_jax import convert
from dit_jax.convert import exported


def _change_metadata(path, text):
    with safetensors.safe_open(path, framework="numpy") as file:
        actual = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    safetensors.numpy.save_file(actual, path, {"dit_jax": text})


@pytest.fixture
def exported_file(workdir, tmp_path):
    """(a file that `export_dit` wrote, the config in it)."""
    exported.write(workdir, tmp_path / "flow.safetensors")
    with safetensors.safe_open(tmp_path / "flow.safetensors", framework="numpy") as file:
        return tmp_path / "flow.safetensors", json.loads(file.metadata()["dit_jax"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"cannot read the config in .*flow\.safetensors: it ends too early"),
        ("[" * 10**5, "nested more than 100 deep"),
        ('{"a": ' + "9" * 10**5 + "}", "Exceeds the limit"),
        ("[1]", r"has {'config': \[1\]}: it must be what `convert dit-export` writes"),
        ("{}", "has {'model': None, 'data': None, 'diffusion': None, 'objective': None"),
    ],
)
def test_exported_config_that_is_none_is_refused(exported_file, tmp_path, text, message):
    path, _ = exported_file
    _change_metadata(path, text)
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dit", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "depth", 10**9, "has {'depth': 1000000000}"),
        ("model", "hidden_size", "48", "has {'hidden_size': '48'}"),
        ("model", "hidden_size", 2**20, r"tokens, of more than 67,108,864 numbers|does not fit"),
        ("model", "input_size", 4096, r"tokens, of more than 67,108,864 numbers|does not fit"),
        ("model", "other", 1, "has {'other': 1}"),
        ("model", "remat", None, "remat"),
        ("data", "name", None, "has {'name': None}"),
        ("latents", None, 7, "latents=7 must be an object with keys"),
    ],
)
def test_exported_config_of_other_values_is_refused(
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
def test_exported_config_of_numbers_out_of_range_is_refused(
    exported_file, tmp_path, section, key, value, message
):
    path, config = exported_file
    config[section][key] = value
    _change_metadata(path, json.dumps(config))
    with pytest.raises(ValueError, match=rf"the config in .*flow\.safetensors .*({message})"):
        convert.to_workdir("dit", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_exported_config_without_a_part_of_its_process_is_refused(exported_file, tmp_path):
    path, config = exported_file
    del config["diffusion"]["beta_start"]
    _change_metadata(path, json.dumps(config))
    with pytest.raises(ValueError, match=r"the config in .*flow\.safetensors .*beta_start"):
        convert.to_workdir("dit", path, tmp_path / "ours")


def test_given_config_of_numbers_out_of_range_is_refused(golden_model_config, published, tmp_path):
    safetensors.numpy.save_file(published, tmp_path / "dit.safetensors")
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.diffusion.beta_end = float("nan")
    with pytest.raises(ValueError, match=r"diffusion\.beta_end=nan must be a number in \(0, 1\)"):
        convert.to_workdir("dit", tmp_path / "dit.safetensors", tmp_path / "ours", config=config)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["/etc", "../x", "~/x", "a\\b", "gs://x", ""])
def test_exported_config_names_no_place_of_this_machine(exported_file, tmp_path, name):
    """Whoever wrote the file would else have this machine's files read, or TFDS's code run."""
    path, config = exported_file
    config["init_from"] = name
    config["data"] |= dict(name=name, data_dir=name)
    config["latents"] |= dict(vae=name, moments=name)
    config["fid"] |= dict(reference=name, weights=name)
    config["text"]["encoder"] = name
    _change_metadata(path, json.dumps(config))
    back = convert.to_workdir("dit", path, tmp_path / "ours")
    places = [back.init_from, back.data.name, back.data.data_dir, back.latents.vae]
    places += [back.latents.moments, back.fid.reference, back.fid.weights, back.text.encoder]
    assert places == [""] * 8
    config["data"]["name"] = "imagenet2012"  # of TFDS, not a place
    _change_metadata(path, json.dumps(config))
    assert convert.to_workdir("dit", path, tmp_path / "again").data.name == "imagenet2012"


def test_export_of_a_model_of_wide_images_is_read_again(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["input_size"] = config["data"]["image_size"] = [8, 12]
    (workdir / "config.json").write_text(json.dumps(config))
    for path in (workdir / "checkpoints").glob("*/config/metadata"):
        path.write_text(json.dumps(config))
    out = tmp_path / "wide.safetensors"
    exported.write(workdir, out)
    assert tuple(exported.read(out).model.input_size) == (8, 12)
