"""Command lines: correct words set the flags, and each wrong word is refused with a hint."""

import pathlib
import re

import pytest
from absl import flags

from dit_jax.config import arguments, parsers

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = [
    path
    for folder in ("dit_jax", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if "cli.run(" in path.read_text() and path.name != "cli.py"
]


@pytest.fixture
def define():
    """define() returns new flags of each type that commands use."""

    def define():
        values = flags.FlagValues()
        flags.DEFINE_flag(arguments.ConfigFlag("model"), values)
        flags.DEFINE(parsers.PathParser("out"), "out", "a.png", "", values)
        flags.DEFINE(parsers.PathParser("reference", as_string=True), "reference", None, "", values)
        flags.DEFINE(parsers.ListParser(float, 2), "interval", None, "", values)
        flags.DEFINE(parsers.ListParser(int), "widths", "1,2", "", values)
        flags.DEFINE_bool("raw", False, "", values)
        flags.DEFINE_bool("clip", None, "", values)
        flags.DEFINE_integer("num", 4, "", 1, flag_values=values)
        flags.DEFINE_float("scale", None, "", flag_values=values)
        flags.DEFINE_string("labels", "", "", values)
        flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "", values)
        flags.DEFINE_multi_string("prompt", [], "", values)
        return values

    return define


CONFIG = ["--config", str(ROOT / "configs/smoke.py")]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--raw", "raw", True),
        ("--raw False", "raw", False),
        ("--raw true", "raw", True),
        ("--raw=false", "raw", False),
        ("--noraw", "raw", False),
        ("--raw False --noraw", "raw", False),
        ("--clip False", "clip", False),
        ("-num 3", "num", 3),
        ("--num=3 --num 3", "num", 3),
        ("--scale -0.5", "scale", -0.5),
        ("--labels -1", "labels", "-1"),
        ("--labels=--raw", "labels", "--raw"),
        ("--labels=", "labels", ""),
        ("--prompt a --prompt b", "prompt", ["a", "b"]),
        ("--interval 0.1,0.8", "interval", (0.1, 0.8)),
        ("--widths 32", "widths", (32,)),
        ("--out runs/x.png", "out", pathlib.Path("runs/x.png")),
        ("--reference imagenet2012:train", "reference", "imagenet2012:train"),
    ],
)
def test_flag_gets_its_value(define, words, name, value):
    values = define()
    assert arguments.parse(["x", *words.split()], values=values) == []
    assert values[name].value == value


def test_home_directory_is_expanded_in_path_flags(define, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = define()
    arguments.parse(["x", "--out=~/a.png", "--reference", "~/b"], values=values)
    assert values.out == pathlib.Path("/home/me/a.png")
    assert values.reference == "/home/me/b"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--config.data.flip False", "flip", False),
        ("--config.data.flip", "flip", True),
        ("--noconfig.data.flip", "flip", False),
        ("--config.data.num_workers 3", "num_workers", 3),
        ("--config.data.eval_split=", "eval_split", ""),
    ],
)
def test_config_key_gets_its_value(define, words, key, value):
    for order in (CONFIG + words.split(), words.split() + CONFIG):
        values = define()
        assert arguments.parse(["x", *order], values=values) == []
        assert values.config.data[key] == value
    repeated = define()
    arguments.parse(["x", *values["config"].words()], values=repeated)
    assert repeated.config == values.config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stray", "'stray' is not understood: the command takes no words without a flag"),
        ("-- stray", "'stray' is not understood"),
        ("-", "'-' is not understood"),
        ("num=3", "'num=3' is not understood.*Write --num=3"),
        ("config.seed=3", "'config.seed=3' is not understood.*Write --config.seed=3"),
        (
            "--labels 3 9",
            "'9' is not understood.*write --labels=3,9 for a list, "
            "or --labels='3 9' for a text with spaces.",
        ),
        (
            "--prompt a red hat",
            "'red' is not understood.*write --prompt=a --prompt=red for two values, "
            "or --prompt='a red' for a text with spaces.",
        ),
        ("--out=a b.png", "'b.png' .* --out=a: write --out='a b.png' for a text with spaces."),
        ("--widths 32 64", "'64' .* --widths=32: write --widths=32,64 for a list."),
        ("--num 3 4", "'4' .* after --num=3, which takes one value: leave it out."),
        ("--dtype float32 x", "'x' .* --dtype=float32, which takes one value: leave it out."),
        ("--raw 0", "'0' is not understood.*write --raw=true or --raw=false"),
        ("--raw False no", "'no' is not understood.*--raw=true or --raw=false"),
        ("--noraw=True", "--noraw=True is given a value: write --raw=True"),
        ("--nonum", "unknown flag --nonum"),
        ("--labes 3", "unknown flag --labes. Did you mean --labels?"),
        ("--flagfile=words.txt", "unknown flag --flagfile."),
        ("-flagfile words.txt", "unknown flag --flagfile."),
        ("--undefok=nim --nim=3", "unknown flag --undefok."),
        ("--config.seed=3", "--config.seed sets a key of --config, which is missing"),
        ("--num", "--num has no value"),
        ("--num --raw", "--num has no value; if --raw is its value, write --num=--raw"),
        ("--out --raw", "--out has no value"),
        ("--num=3 --num=4", "--num is given 2 times, as 3 and 4"),
        ("--raw --noraw", "--raw is given 2 times"),
        ("--labels 3 --labels 9", "--labels is given 2 times, as 3 and 9"),
        ("--num=0", "--num=0 must be a positive integer"),
        ("--num=1e3", "--num=1e3 must be a positive integer"),
        ("--num=", "--num= must be a positive integer"),
        ("--scale=nan", "--scale=nan must be a number"),
        ("--scale=inf", "--scale=inf must be a number"),
        ("--scale=", "--scale= must be a number"),
        ("--raw=maybe", "--raw=maybe must be true or false"),
        ("--dtype=f32", "--dtype=f32 must be one of float32, bfloat16"),
        ("--interval=0.5", "must be 2 numbers with commas, such as 0.1,0.8"),
        ("--interval=0,nan", "must be 2 numbers with commas"),
        ("--interval=0.1,0.2,0.3", "must be 2 numbers with commas"),
        ("--widths=32,x", "must be whole numbers with commas"),
        ("--widths=1.5", "must be whole numbers with commas"),
        ("--widths=()", "must be whole numbers with commas"),
        ("--out=gs://bucket/x.png", "--out=gs://bucket/x.png: remote paths"),
        ("--out=", "--out is empty"),
        ("--reference=s3://bucket/x.npz", "--reference=s3://.*: remote paths"),
        ("--config", "--config has no value"),
        ("--config --raw", "--config has no value"),
    ],
)
def test_wrong_word_is_refused_with_a_hint(define, words, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        arguments.parse(["x", *words.split(" ")], values=define())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config.data.flip 0", "'0' is not understood.*--config.data.flip=true or"),
        ("stray", "'stray' .*configs/smoke.py, which takes one value: leave it out."),
        ("--config.seed 3 4", "'4' .* --config.seed=3, which takes one value: leave it out."),
        ("--config.data.image_size 8 9", "'9' .* write --config.data.image_size=8,9 for a list."),
        (
            "--config.latents.vae=my vae",
            "'vae' .* write --config.latents.vae=my,vae for a list, "
            "or --config.latents.vae='my vae' for a text with spaces.",
        ),
        ("--config.seed", "--config.seed has no value"),
        ("--config.seed --raw", "--config.seed has no value; if --raw is its value"),
        ("--config.seed=1 --config.seed=2", "--config.seed is given 2 times, as 1 and 2"),
        ("--config.total_steps=1e3", "must be an integer"),
        ("--config.modle.depth=3", 'Did you mean "model"'),
        ("--noconfig.seed", "unknown flag --noconfig.seed"),
        ("--seed=3", "unknown flag --seed. Did you mean --config.seed?"),
        ("--config configs/digits.py", "--config is given 2 times"),
    ],
)
def test_wrong_word_for_a_config_is_refused_with_a_hint(define, words, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        arguments.parse(["x", *CONFIG, *words.split()], values=define())


@pytest.mark.parametrize(
    "name", ["only_check_args", "run_with_pdb", "norun_with_profiling", "v", "verbosity=1"]
)
def test_flags_of_libraries_are_unknown(name):
    """absl's --only_check_args, for example, would end a command at once, with exit status 0."""
    with pytest.raises(ValueError, match=rf"^unknown flag --{name.partition('=')[0]}\."):
        arguments.parse(["x", f"--{name}"])


def test_hint_for_an_unknown_flag_names_no_flag_of_a_library():
    with pytest.raises(ValueError, match=r"unknown flag --only_check_arg\. --help lists the flags"):
        arguments.parse(["x", "--only_check_arg"])


@pytest.mark.parametrize(
    "change", ["total_steps=0", "data.image_size=-4", "model.depth=0", "optim.b1=0.99999999999"]
)
def test_numbers_of_a_config_are_checked_when_the_flags_are_parsed(define, change):
    """So every command that takes a config refuses them."""
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=rf"^(--config\.)?{key}={value} "):
        arguments.parse(["x", *CONFIG, f"--config.{change}"], values=define())


def test_numbers_of_a_sweep_are_checked_when_the_flags_are_parsed():
    values, spec = flags.FlagValues(), ROOT / "experiments/scaling/configs/smoke.py"
    flags.DEFINE_flag(arguments.ConfigFlag("grids"), values)
    with pytest.raises(ValueError, match=r"^evaluate\.num=-1 must be a whole number in 0"):
        arguments.parse(["x", f"--config={spec}", "--config.evaluate.num=-1"], values=values)


def test_config_of_another_command_is_refused(define):
    spec = ROOT / "experiments/scaling/configs/smoke.py"
    with pytest.raises(ValueError, match=r"has no config\.model: .* a sweep's has config\.grids"):
        arguments.parse(["x", f"--config={spec}"], values=define())


@pytest.mark.parametrize(
    ("names", "words", "actual"),
    [
        ("TASK", "invert --raw", ["invert"]),
        ("TASK", "--raw invert", ["invert"]),
        ("KIND SRC DST", "dit a --num 3 b", ["dit", "a", "b"]),
        ("KIND SRC DST", "dit", ["dit"]),
        ("MODEL ...", "a b c", ["a", "b", "c"]),
        ("MODEL ...", "-- a", ["a"]),
        ("MODEL ...", "", []),
    ],
)
def test_positional_words_are_returned(define, names, words, actual):
    assert arguments.parse(["x", *words.split()], names, define()) == actual


def test_too_many_positional_words_are_refused(define):
    with pytest.raises(ValueError, match="'b' is not understood: the command takes TASK"):
        arguments.parse(["x", "a", "b"], "TASK", define())


def test_missing_flags_are_named_in_one_line(define):
    values = define()
    flags.mark_flag_as_required("config", values)
    flags.DEFINE(parsers.PathParser("workdir"), "workdir", None, "", values, required=True)
    with pytest.raises(ValueError, match=r"^--config and --workdir are missing; --help lists"):
        arguments.parse(["x"], values=values)


def test_every_flag_for_a_path_is_defined_as_one():
    """Commands use cli.define_path, define_paths or define_images, not DEFINE_string."""
    assert len(COMMANDS) > 20
    names = r"\w*(dir|file|path|npz|out|vae|encoder|guide|image|mask|reference|samples|weights)"
    names += r"|page|table|demo|results|make_reference"
    for path in COMMANDS:
        text = path.read_text()
        assert not re.search(rf'DEFINE_\w*string\(\s*"({names})"', text), path
        assert "pathlib.Path(FLAGS" not in text, path
        assert "app.run(" not in text, path
