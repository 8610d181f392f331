"""Loading config files, and setting their keys from the command line."""

import re

import pytest

from configs import default, smoke
from dit_jax.config import overrides
from experiments.scaling.configs import smoke as sweep


@pytest.fixture
def write(tmp_path):
    """write(text) writes a config file."""

    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.flip", "False", False),
        ("data.flip", "true", True),
        ("seed", "3", 3),
        ("total_steps", "1_000", 1000),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("optim.learning_rate", "1", 1.0),
        ("data.name", "True", "True"),
        ("data.eval_split", "", ""),
        ("sample.last_step_t", "0", 0.0),  # None before, a placeholder
        ("latents.scale", "2", (2.0,)),
        ("latents.scale", "(1, 2.5)", (1.0, 2.5)),
        ("latents.scale", "1,2", (1.0, 2.0)),
        ("latents.scale", "()", ()),
        ("latents.scale", "[1,]", (1.0,)),
    ],
)
def test_text_becomes_a_value_of_the_keys_type(key, text, value):
    config = default.get_config()
    overrides.override(config, key, text)
    actual = overrides.get_value(config, key)
    assert actual == value
    assert type(actual) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, actual)) == list(map(type, value))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("total_steps", "1e3", "--config.total_steps=1e3 must be an integer"),
        ("seed", "True", "must be an integer"),
        ("seed", "", "must be an integer"),
        ("seed", "1.0", "must be an integer"),
        ("optim.learning_rate", "nan", "must be a number"),
        ("optim.learning_rate", "-inf", "must be a number"),
        ("sample.last_step_t", "None", "must be a number"),
        ("optim.learning_rate", "", "must be a number"),
        ("optim.learning_rate", "True", "must be a number"),
        ("data.flip", "maybe", "must be true or false"),
        ("data.flip", "", "must be true or false"),
        ("latents.scale", "a", "must be numbers with commas"),
        ("latents.scale", "True", "must be numbers with commas"),
        ("latents.scale", "(1, 'a')", "must be numbers with commas"),
        ("latents.scale", "(1, 1e999)", "must be numbers with commas"),
        ("latents.scale", "", "must be numbers with commas"),
        ("latents.scale", "1" + 400 * "0", "must be numbers with commas"),
        ("sample.cfg_interval", f"(0, 1{400 * '0'})", "must be numbers with commas"),
        ("total_steps", "1" + 5000 * "0", "must be an integer"),
        ("latents.scale", "1 2", "must be numbers with commas"),
        ("latents.scale", "{[]: 1}", "must be numbers with commas"),
        ("model", "dit", "model is a group of keys: set one of them"),
        ("modle.depth", "3", r'unknown config key .modle.*Did you mean "model" instead of "modle"'),
        ("model.depht", "3", r'unknown config key .model\.depht.*Did you mean "depth"'),
        ("seed.x", "3", r"unknown config key .seed\.x."),
        ("", "3", "unknown config key"),
        ("latents.vae", "gs://bucket/vae", "config.latents.vae=gs://.*remote paths"),
        ("data.data_dir", "~no-such-user/x", "no home directory"),
    ],
)
def test_wrong_text_for_a_key_is_refused(key, text, message):
    config = default.get_config()
    before = config.to_dict()
    with pytest.raises(ValueError, match=message):
        overrides.override(config, key, text)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "(10, 20)", (10, 20)),
        ("steps", "10", (10,)),
        ("grids.main.size", "XS", ("XS",)),
        ("grids.main.size", "XS,S", ("XS", "S")),
        ("grids.main.size", "('XS',)", ("XS",)),
        ("grids.main.model.patch_size", "2", (2,)),
    ],
)
def test_text_becomes_a_list_of_a_sweep(key, text, value):
    config = sweep.get_config()
    overrides.override(config, key, text)
    assert overrides.get_value(config, key) == value


@pytest.mark.parametrize("text", ["10.5", "(1, 2.0)", "XS", "1e3"])
def test_compute_points_are_whole_numbers(text):
    with pytest.raises(ValueError, match="must be whole numbers with commas"):
        overrides.override(sweep.get_config(), "steps", text)


def test_home_directories_are_expanded(monkeypatch, write):
    monkeypatch.setenv("HOME", "/home/me")
    config = smoke.get_config()
    overrides.override(config, "latents.vae", "~/vae")
    assert config.latents.vae == "/home/me/vae"
    path = write(
        "from configs import smoke\n"
        "def get_config():\n"
        "  config = smoke.get_config()\n"
        "  config.data.data_dir = '~/data'\n"
        "  return config\n"
    )
    assert overrides.load(str(path)).data.data_dir == "/home/me/data"
    assert "/home/me/none.py is not there" in _error("~/none.py")


def _error(spec):
    """Returns the message of the error that loading a config raises."""
    with pytest.raises((ValueError, OSError)) as error:
        overrides.load(str(spec))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config():\n  return 1\n", "", "returns a int; it must return a ConfigDict"),
        ("def get_config():\n  return None\n", ":x", "takes no argument 'x': write --config="),
        ("def get_config(name):\n  return 1\n", "", r"needs an argument: write .*:ARG"),
        ("def get_config(name):\n  return {}[name]\n", ":x", "does not know the argument 'x'"),
        ("def other():\n  pass\n", "", "has no function get_config"),
        ("def get_config(:\n", "", r"mine\.py:1: invalid syntax"),
        ("import no_such_module\n", "", r"mine\.py:1: No module named 'no_such_module'"),
        ("from configs import nothing\n", "", r"mine\.py:1: cannot import name 'nothing'"),
    ],
)
def test_file_that_is_no_config_is_refused_with_the_reason(write, text, argument, message):
    assert re.search(message, _error(f"{write(text)}{argument}"))


def test_config_json_of_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": true}')
    assert "must be a Python file with a function get_config" in _error(tmp_path / "config.json")


def test_missing_config_file_is_an_error_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _error("configs/x.py") == (
        f"cannot load --config=configs/x.py: {tmp_path}/configs/x.py is not there."
    )
    assert "is a directory" in _error(str(tmp_path))
    assert "remote paths" in _error("gs://bucket/x.py")
    assert "--config is empty" in _error("")


def test_other_exceptions_of_a_config_file_are_unchanged(write):
    with pytest.raises(KeyError, match="size"):
        overrides.load(str(write("def get_config():\n  return {}['size']\n")))
    with pytest.raises(ZeroDivisionError):
        overrides.load(str(write("def get_config():\n  return 1 // 0\n")))


def test_error_of_a_library_in_a_config_file_names_the_line(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("import numpy as np\n\n\ndef get_config():\n    np.zeros(3).reshape(2)\n")
    with pytest.raises(ValueError, match=rf"^{path}:5: cannot reshape array of size 3"):
        overrides.load(str(path))
    path.write_text("def get_config():\n    raise ValueError('choose a or b.')\n")
    with pytest.raises(ValueError, match=r"^choose a or b\.$"):
        overrides.load(str(path))


def test_error_for_a_renamed_key_names_the_new_keys():
    config = default.get_config()
    message = r"class_dropout_prob=?.* model\.null_condition .* objective\.condition_dropout"
    with pytest.raises(ValueError, match=message):
        overrides.override(config, "model.class_dropout_prob", "0.1")
