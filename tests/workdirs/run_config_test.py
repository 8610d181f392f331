"""A workdir belongs to one config."""

import contextlib
import json
import shutil

import pytest

from configs import default
from dit_jax import latents, train, workdirs
from dit_jax.config import keys, sizes
from dit_jax.datasets import digits, writing
from dit_jax.latents import store
from dit_jax.sampling import runs
from dit_jax.workdirs import identity


def _as_json(config):
    return json.loads(json.dumps(config.to_dict()))  # tuples are lists


def test_other_config_is_refused_with_the_keys(workdir, smoke_config):
    smoke_config.optim.learning_rate = 0.5
    smoke_config.model.depth = 3
    with pytest.raises(ValueError, match="another config") as error:
        train.train_and_evaluate(smoke_config, workdir)
    assert "model.depth: workdir 2, now 3" in str(error.value)
    assert "optim.learning_rate: workdir 0.003, now 0.5" in str(error.value)
    assert "batch_size" not in str(error.value)


@pytest.mark.parametrize("damage", ["lost", "garbled"])
def test_without_config_json_the_newest_checkpoint_s_counts(workdir, smoke_config, damage):
    if damage == "lost":
        (workdir / "config.json").unlink()
    else:
        (workdir / "config.json").write_bytes(b"\0\0")
    assert workdirs.load_config(workdir).to_dict() == _as_json(smoke_config)
    smoke_config.optim.learning_rate = 0.5
    with pytest.raises(ValueError, match="another config"):
        train.train_and_evaluate(smoke_config, workdir)
    for path in (workdir / "checkpoints").iterdir():
        (path / "config" / "metadata").write_text("{")
    if damage == "garbled":
        with pytest.raises(ValueError, match=r"no config in .* can be read"):
            workdirs.load_config(workdir)


@pytest.mark.parametrize(
    "change", [{"sample.sampler": "dim", "total_steps": 50}, {"total_steps": 20}]
)
def test_command_that_trains_nothing_changes_nothing(workdir, smoke_config, change):
    before = (workdir / "config.json").read_text()
    smoke_config.update_from_flattened_dict(change)
    with contextlib.suppress(ValueError):  # of the unknown sampler; the other is done
        train.train_and_evaluate(smoke_config, workdir)
    assert (workdir / "config.json").read_text() == before


def test_keys_that_may_change_are_taken_over(workdir, smoke_config, caplog):
    smoke_config.update(total_steps=50, log_every_steps=7, checkpoint_keep=4)
    smoke_config.model.remat = "full"
    with workdirs.claim(workdir, smoke_config):
        workdirs.write_config(workdir, smoke_config)
    assert caplog.text.count("total_steps was 40, now 50") == 1
    assert workdirs.load_config(workdir).total_steps == 50


def test_digests_that_the_run_fills_in_are_no_difference(workdir, smoke_config):
    config = json.loads((workdir / "config.json").read_text())
    config["text"]["encoder_digest"] = "0123"
    (workdir / "config.json").write_text(json.dumps(config))
    workdirs.check_config(workdir, smoke_config)
    smoke_config.text.encoder_digest = "4567"
    with pytest.raises(ValueError, match=r"text.encoder_digest: workdir '0123', now '4567'"):
        workdirs.check_config(workdir, smoke_config)


def test_loaded_config_is_the_one_that_was_saved_and_locked(workdir, smoke_config):
    loaded = workdirs.load_config(workdir)
    assert loaded.to_dict() == _as_json(smoke_config)
    with pytest.raises(AttributeError):
        loaded.no_such_key = 1


@pytest.mark.parametrize(
    ("older", "now"),
    [
        (dict(last_step_size=0.0, steps=3), dict(last_step_t=None, steps=3)),
        (dict(last_step_size=0.02), dict(last_step_t=0.02)),
        (dict(last_step_t=0.0), dict(last_step_t=0.0)),
        (dict(steps=3), dict(steps=3)),
    ],
    ids=str,
)
def test_older_settings_of_samples_keep_their_meaning(older, now):
    """0 was the default of last_step_size, which it is not of last_step_t."""
    before = dict(older)
    assert workdirs.upgrade_sample(older) == now
    assert older == before


@pytest.mark.parametrize("lost", [False, True])
def test_configs_of_an_older_version_are_read_as_it_meant_them(workdir, smoke_config, lost):
    """Also out of a checkpoint; what is read can be set, to 0 too."""
    newest = workdir / "checkpoints" / "40" / "config" / "metadata"
    for path in (workdir / "config.json", newest):
        config = json.loads(path.read_text())
        del config["sample"]["last_step_t"]
        config["sample"]["last_step_size"] = 0.0
        del config["model"]["null_condition"]
        config["model"]["class_dropout_prob"] = config["objective"].pop("condition_dropout")
        path.write_text(json.dumps(config))
    if lost:
        (workdir / "config.json").unlink()
    loaded = workdirs.load_config(workdir)
    assert loaded.to_dict() == _as_json(smoke_config)
    assert loaded.sample.last_step_t is None
    loaded.sample.update(last_step_t=0.0)
    assert loaded.sample.last_step_t == 0.0
    workdirs.check_config(workdir, smoke_config)


def test_model_of_an_older_version_without_a_null_class_has_no_null_condition(smoke_config):
    smoke_config.model.null_condition = False
    config = json.loads(json.dumps(smoke_config.to_dict()))
    del config["model"]["null_condition"], config["objective"]["condition_dropout"]
    config["model"]["class_dropout_prob"] = 0.0
    loaded = workdirs.read_config(json.dumps(config), "a test")
    assert loaded.to_dict() == _as_json(smoke_config)


def test_checkpoint_of_another_config_is_not_taken_for_the_run_s(workdir, smoke_config, caplog):
    """Copied from elsewhere, or beside a config.json that was changed."""
    path = workdir / "checkpoints" / "40" / "config" / "metadata"
    config = json.loads(path.read_text())
    config["seed"], config["sample"]["steps"] = 7, 123  # the latter may change
    path.write_text(json.dumps(config))
    assert runs.load(workdir).step == 30
    expected_message = "checkpoint 40 cannot be read: its config is not config.json: seed 7, now 0"
    assert expected_message in caplog.text
    config = json.loads((workdir / "config.json").read_text())
    config["diffusion"]["beta_end"], config["model"]["num_heads"] = 0.2, 4
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        OSError, match=r"config\.json: diffusion\.beta_end 0\.02, now 0\.2; model\.num"
    ):
        runs.load(workdir, step=30)


def test_workdir_that_cannot_be_written_is_named(smoke_config, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot write into .*file/run"),
        workdirs.claim(tmp_path / "file" / "run", smoke_config),
    ):
        pytest.fail("claimed")


def _remove(config, key):
    *sections, name = key.split(".")
    for section in sections:
        config = config.get(section, {})
    config.pop(name, None)


def test_config_of_an_older_version_means_what_it_meant(workdir, smoke_config):
    """Keys added since have the value of before, and the run goes on."""
    config = json.loads((workdir / "config.json").read_text())
    added = {key for key, row in keys.KEYS.items() if row.old is not keys.NO_VALUE}
    added.remove("diffusion.sigma_data")  # of which this config has another value
    expected = workdirs.load_config(workdir).to_dict()
    for key in added:
        _remove(config, key)
    for section in ("text", "fid"):  # these did not exist
        assert not config.pop(section)
    (workdir / "config.json").write_text(json.dumps(config))
    loaded = json.loads(json.dumps(workdirs.load_config(workdir).to_dict()))
    assert loaded == json.loads(json.dumps(expected))
    smoke_config.total_steps = 41
    workdirs.check_config(workdir, smoke_config)
    assert runs.load(workdir).step == 40


@pytest.mark.parametrize("contents", ['{"a": 1}', "[]", '{"model": 3}'])
def test_json_that_is_no_config_is_damage(workdir, smoke_config, contents):
    (workdir / "config.json").write_text(contents)
    assert workdirs.load_config(workdir).to_dict() == _as_json(smoke_config)


def test_directories_that_libraries_cannot_write_to_are_refused_first(
    tmp_path, workdir, smoke_config
):
    """Names that are not in UTF-8."""
    name = tmp_path / "a\udcff"
    message = r"a\\udcff.* is not valid UTF-8, but directories of checkpoints"
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(smoke_config, name)
    assert not name.exists()
    with pytest.raises(ValueError, match=message):
        runs.load(shutil.copytree(workdir, name))
    with pytest.raises(ValueError, match=message):
        writing.write(digits.Digits, data_dir=name)
    with pytest.raises(ValueError, match=message):
        store.encode(smoke_config, workdir, name / "moments")
    smoke_config.data.data_dir = str(name)
    with pytest.raises(ValueError, match=message):
        latents.open_split(smoke_config, "train")


def test_directories_of_other_names_are_no_checkpoints(workdir, smoke_config):
    names = ["best_99", "8x", "-3", "007", "\u00b2", "99.orbax-checkpoint-tmp-1", "1e3"]
    for name in names:
        shutil.copytree(workdir / "checkpoints" / "40", workdir / "checkpoints" / name)
    (workdir / "checkpoints" / "77").write_text("a file")
    assert workdirs.saved_steps(workdir) == [20, 30, 40]
    assert runs.load(workdir).step == 40
    smoke_config.total_steps = 41
    assert int(train.train_and_evaluate(smoke_config, workdir).step) == 41
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left >= {*names} - {"99.orbax-checkpoint-tmp-1"}  # a checkpoint that was not finished


def test_home_in_a_path_is_the_same_run(workdir, smoke_config, monkeypatch):
    """Where config.json was written with `~`, or train_and_evaluate is called with it."""
    monkeypatch.setenv("HOME", "/home/me")
    path = workdir / "config.json"
    saved = json.loads(path.read_text())
    saved["data"]["name"] = "~/digits"
    path.write_text(json.dumps(saved))
    smoke_config.data.name = "/home/me/digits"
    workdirs.check_config(workdir, smoke_config)
    smoke_config.data.name = "~/digits"
    workdirs.check_config(workdir, smoke_config)
    smoke_config.data.name = "/home/you/digits"  # moved: its record says whether they are the same
    workdirs.check_config(workdir, smoke_config)
    monkeypatch.setattr(identity, "load_data", lambda _: {})  # of an older version
    with pytest.raises(ValueError, match="another config"):
        workdirs.check_config(workdir, smoke_config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sample.steps", True, "sample.steps=True must be a whole number"),
        ("sample.sampler", 3, "sample.sampler=3 must be a str"),
        ("sample.cfg_scale", "1.5", "sample.cfg_scale='1.5' must be a number"),
        ("data.imbge_size", 8, "it has data.imbge_size, which this version does not know"),
        ("diffusion.respacing", "fast", "it has diffusion.respacing, which this version does not"),
        ("data.image_size", None, "it has no data.image_size"),
        ("optim", None, "it has no optim"),
        ("mesh", "a", "mesh='a' must be an object with keys"),
        ("latents.vae", 5, "latents.vae=5 must be a str"),
        ("latents.scale", "1", "latents.scale='1' must be a list of numbers"),
        ("model.learn_sigma", "yes", "model.learn_sigma='yes' must be a bool"),
        ("model.deqth", 3, "the model 'dit' does not know deqth"),
        ("model.depth", None, "the model 'dit' needs depth too"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused_by_name(workdir, run_command, key, value, message):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    *groups, name = key.split(".")
    section = config[groups[0]] if groups else config
    if name == "imbge_size":  # one bit of it is another
        del section["image_size"]
    if value is None:
        del section[name]
    else:
        section[name] = value
    for copy in (path, *workdir.glob("checkpoints/*/config/metadata")):
        copy.write_text(json.dumps(config))
    flags = ["--steps", 2, "--cfg_scale", 1.0, "--num", 1, "--out", workdir / "x.png"]
    error = run_command("sample", "--workdir", workdir, *flags, fails=True)
    (error,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert "restore config.json from a copy. config.json is not used: " in error
    assert message in error


STRANGE = (None, [], [1, 2], {}, "\x1b", True, {"a": [{}]}, [None], ["x", 1], [[1]])


def _keys(config, prefix=()):
    for name, value in config.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _keys(value, (*prefix, name))


def _is_legal(key, value, before):
    """Whether a value is of the type of the one before; of sections, whether it has keys."""
    if isinstance(before, list):
        return isinstance(value, list) and all(type(one) is int for one in value)
    if key in sizes.KEYS and value == [1, 2]:
        return True
    if before is None:  # sample.last_step_t
        return value is None
    return type(value) is type(before) and bool(value)


@pytest.mark.parametrize("model", ["dit", "unet", "vae", "clip", "lpips"])
def test_value_of_another_type_is_damage_of_any_key(model):
    if model in ("dit", "unet", "vae"):
        config = _as_json(default.get_config(model))
    else:
        sizes = dict.fromkeys(("vocab_size", "length", "hidden_size", "depth", "num_heads"), 8)
        sizes = sizes | dict(mlp_size=8, activation="gelu") if model == "clip" else {}
        config = {"model": {"name": model, "dtype": "float32", **sizes}}
    text = json.dumps(config)
    workdirs.read_config(text, "config.json")
    for key in _keys(config):
        for value in STRANGE:
            damaged = json.loads(text)
            section = damaged
            for name in key[:-1]:
                section = section[name]
            if _is_legal(".".join(key), value, section[key[-1]]):
                continue
            section[key[-1]] = value
            with pytest.raises(ValueError, match=key[-1]):
                workdirs.read_config(json.dumps(damaged), "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("sample.cfg_scale", None), ("sample.steps", [1, 2]), ("model.attention", 7), ("fid", {})],
    ids=str,
)
def test_config_with_a_value_of_another_type_is_as_good_as_lost(
    workdir, smoke_config, caplog, key, value
):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    *groups, name = key.split(".")
    (config[groups[0]] if groups else config)[name] = value
    path.write_text(json.dumps(config))
    assert workdirs.load_config(workdir).to_dict() == _as_json(smoke_config)
    assert f"config.json is not used: {key}=" in caplog.text
    assert runs.load(workdir).step == 40
    config["sample"]["steps"] = 0  # a number of another range is no damage, but a mistake
    config["sample"]["cfg_scale"], config["model"]["attention"] = 1.0, "auto"
    config["fid"] = _as_json(smoke_config)["fid"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: sample\.steps=0 must be .*\. Correct"):
        workdirs.load_config(workdir)


def test_scale_of_the_first_versions_is_one_number(workdir):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["latents"].update(scale=0.5, shift=0)
    path.write_text(json.dumps(config))
    latents = workdirs.load_config(workdir).latents
    assert (latents.scale, latents.shift) == ([0.5], [0])


def test_keys_that_an_older_version_did_not_have_are_no_damage(workdir):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    del config["sample_num_images"], config["data"]["cache"], config["latents"]["moments"]
    path.write_text(json.dumps(config))
    assert workdirs.load_config(workdir).model.depth == config["model"]["depth"]


def test_section_without_keys_is_damage(workdir):
    whole, path = workdirs.load_config(workdir), workdir / "config.json"
    path.write_text(json.dumps(whole.to_dict() | {"sample": {}}))
    assert workdirs.load_config(workdir).sample == whole.sample


@pytest.mark.parametrize("value", [-1.0, 1.0, float("nan"), "0.1"])
def test_dropout_of_an_older_version_that_cannot_be_is_refused(smoke_config, value):
    config = json.loads(json.dumps(smoke_config.to_dict()))
    del config["model"]["null_condition"], config["objective"]["condition_dropout"]
    config["model"]["class_dropout_prob"] = value
    with pytest.raises(ValueError, match=r"model.class_dropout_prob=.* must be a number"):
        workdirs.read_config(json.dumps(config), "a test")


def test_directory_of_moments_is_no_workdir(smoke_config, tmp_path):
    (tmp_path / "encode.json").write_text("{}")
    with (
        pytest.raises(
            ValueError, match=r"holds moments of dit_jax\.encode: choose another workdir"
        ),
        workdirs.claim(tmp_path, smoke_config),
    ):
        pass
