"""Every number in a config has a range; a number outside its range is refused with its key."""

import importlib
import math

import jax
import pytest

from configs import default
from dit_jax import workdirs
from dit_jax.config import keys, ranges, sizes
from dit_jax.models import clip
from dit_jax.sampling import runs
from dit_jax.training import programs
from experiments.scaling.configs import default as sweeps

MODELS = ("dit", "unet", "vae")
RANGED = {key for key, row in keys.KEYS.items() if row.range}


@pytest.mark.parametrize("model", MODELS)
def test_every_number_in_the_default_config_is_in_its_range(model):
    config = default.get_config(model)
    keys.check(config)
    for key, value in workdirs.flatten(config).items():
        item = value[0] if isinstance(value, list) and value else value
        if isinstance(item, int | float) and not isinstance(item, bool):
            assert key in RANGED or key in CHECKED_ELSEWHERE, key


def test_every_number_in_a_sweep_is_in_its_range():
    config = sweeps.get_config(default.get_config())
    keys.check(config)
    for key, value in workdirs.flatten(config).items():
        if type(value) in (int, float) and not key.startswith("base."):
            assert key in RANGED, key


# Keys that are checked where they are used: image_channels is 1 or 3; churn_range may be infinite.
CHECKED_ELSEWHERE = {"data.image_channels", "sample.churn_range"}


def test_every_row_has_a_key_of_a_config():
    known = {key for model in MODELS for key in workdirs.flatten(default.get_config(model))}
    known |= workdirs.flatten(sweeps.get_config(default.get_config())).keys()
    # No config file trains a CLIP, so its fields are in no default config.
    known |= {f"model.{key}" for key in clip.ClipText.__dataclass_fields__}
    assert not keys.KEYS.keys() - known


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, r"seed=-1 must be a whole number in 0\.\.4294967295"),
        ("seed", 2**32, "seed=4294967296 must be"),
        ("total_steps", 0, "total_steps=0 must be a whole number in 1"),
        ("checkpoint_keep", 1, "checkpoint_keep=1 must be a whole number in 2"),
        ("optim.learning_rate", 0.0, "optim.learning_rate=0.0 must be a number in"),
        ("optim.learning_rate", math.nan, "optim.learning_rate=nan must be"),
        ("optim.weight_decay", math.inf, "optim.weight_decay=inf must be a number of at least 0"),
        ("optim.b2", 1.0, r"optim.b2=1.0 must be a number in \[0, 1\)"),
        ("optim.b1", -0.1, "optim.b1=-0.1 must be"),
        ("optim.eps", -1e-8, "optim.eps=-1e-08 must be"),
        ("optim.grad_clip_norm", -1.0, "optim.grad_clip_norm=-1.0 must be"),
        ("sample.cfg_scale", 0.5, r"sample.cfg_scale=0.5 must be a number in \[1, 1000\]"),
        ("sample.cfg_scale", math.inf, "sample.cfg_scale=inf must be"),
        ("sample.cfg_interval", (0.0, math.nan), r"sample.cfg_interval=\(0.0, nan\) must be"),
        ("sample.steps", 0, "sample.steps=0 must be"),
        ("objective.t_std", 0.0, "objective.t_std=0.0 must be"),
        ("objective.t_std", 1e30, "objective.t_std=1e[+]30 must be"),
        ("objective.t_mean", -1e30, "objective.t_mean=-1e[+]30 must be"),
        ("objective.p2_gamma", 1e30, "objective.p2_gamma=1e[+]30 must be"),
        ("diffusion.sigma_max", 1e30, "diffusion.sigma_max=1e[+]30 must be"),
        ("sample.churn_noise", 1e30, "sample.churn_noise=1e[+]30 must be"),
        ("sample.cfg_scale", 1e30, "sample.cfg_scale=1e[+]30 must be"),
        ("latents.scale", (0.0,), r"latents.scale=\(0.0,\) must be a number above 0"),
        ("model.depth", 10**9, "model.depth=1000000000 must be a whole number in 1"),
        ("model.hidden_size", 2**30, "model.hidden_size=1073741824 must be"),
        ("latents.scale", (math.inf,), r"latents.scale=\(inf,\) must be"),
        ("data.num_threads", -1, "data.num_threads=-1 must be"),
        (
            "data.image_size",
            10**9,
            r"data.image_size=1000000000 must be a whole number in 1\.\.8192",
        ),
        ("total_steps", 2**31, r"total_steps=2147483648 must be a whole number in 1\.\.2147483647"),
        ("optim.warmup_steps", 3 * 10**9, "optim.warmup_steps=3000000000 must be"),
        ("total_steps", 10**400, "total_steps=10000"),
        ("sample_num_images", 10**9, r"sample_num_images=1000000000 must be .* 1\.\.10000"),
        ("model.mlp_ratio", 1e9, r"model.mlp_ratio=1000000000.0 must be a number in \(0, 100\]"),
        (
            "model.mlp_ratio",
            1e-9,
            "mlp_ratio=1e-09 gives an MLP without channels for hidden_size=32",
        ),
        ("fid.cfg_scale", 0.5, "fid.cfg_scale=0.5 must be"),
        ("sample.cfg_interval", (0.8, 0.1), "cfg_interval=0.8,0.1 must be two numbers, low < high"),
        ("sample.cfg_interval", (0.1,), "cfg_interval=0.1 must be two numbers"),
        ("sample.cfg_interval", (-0.1, 0.5), r"cfg_interval=\(-0.1, 0.5\) must be .* in \[0, 1\]"),
        ("sample.cfg_interval", (0.5, 1.5), r"cfg_interval=\(0.5, 1.5\) must be .* in \[0, 1\]"),
        ("sample.cfg_rescale", 1.5, r"sample.cfg_rescale=1.5 must be a number in \[0, 1\]"),
        ("sample.cfg_scale", math.nan, "sample.cfg_scale=nan must be"),
        ("sample.eta", 1.5, r"sample.eta=1.5 must be a number in \[0, 1\]"),
        ("sample.rho", 0.0, "sample.rho=0.0 must be a number above 0"),
        ("sample.rho", math.nan, "sample.rho=nan must be"),
        ("sample.shift", -1.0, "sample.shift=-1.0 must be a number above 0"),
        ("sample.shift", math.inf, "sample.shift=inf must be"),
        ("sample.churn", -1.0, "sample.churn=-1.0 must be a number of at least 0"),
        ("sample.churn", math.inf, "sample.churn=inf must be"),
        ("sample.churn_noise", 0.0, r"sample.churn_noise=0.0 must be a number in \(0, 100\]"),
        ("sample.churn_noise", math.nan, "sample.churn_noise=nan must be"),
        ("sample.last_step_t", 1.0, r"sample.last_step_t=1.0 must be a number in \[0, 1\)"),
        ("sample.variance", "medium", "unknown variance='medium'; choose one of large, small"),
        ("objective.min_t", 1.0, r"objective.min_t=1.0 must be a number in \[0, 1\)"),
        ("objective.snr_gamma", -1.0, "objective.snr_gamma=-1.0 must be a number above 0"),
        ("objective.p2_gamma", math.nan, "objective.p2_gamma=nan must be"),
        ("diffusion.beta_start", 0.0, r"beta_start=0.0 must be a number in \(0, 1\)"),
        ("diffusion.beta_end", 1.0, r"beta_end=1.0 must be a number in \(0, 1\)"),
        ("diffusion.num_steps", 1, "num_steps=1 must be a whole number in 2"),
        ("diffusion.sigma_data", 0.0, "sigma_data=0.0 must be a number in"),
        ("sample.churn_range", (5.0, 1.0), "churn_range=5.0,1.0 must be two numbers, low < high"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_built(
    smoke_config, key, value, message
):
    smoke_config.sample_every_steps = 0  # the checks of sampling settings are tested below
    smoke_config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        programs.make_program(smoke_config)


@pytest.mark.parametrize("key", ["optim.b1", "optim.b2", "optim.ema_decay", "model.dropout"])
def test_number_that_float32_rounds_to_an_excluded_1_is_refused(key):
    section, name = key.split(".")
    keys.check({section: {name: 0.9999999}})
    message = rf"{key}=0\.99999999999 is 1 in float32, but must be a number in \[0, 1\)\."
    with pytest.raises(ValueError, match=message):
        keys.check({section: {name: 0.99999999999}})


@pytest.mark.parametrize("key", ["sample_every_steps", "fid.every_steps"])
def test_wrong_sampling_settings_are_refused_if_the_run_samples(smoke_config, key):
    config = smoke_config
    config.update(sample_every_steps=0)
    config.sample.sampler = "ddim"
    config.update_from_flattened_dict({"sample.steps": 2000, "fid.steps": 2000})
    # The run itself does not sample, and the commands that sample have a flag for the steps.
    programs.make_program(config)
    config.update_from_flattened_dict({key: 10})
    with pytest.raises(ValueError, match="cannot take 2000 sampling steps"):
        programs.make_program(config)


@pytest.mark.parametrize("model", ["smoke", "vae_digits"])
def test_picture_that_does_not_fit_into_memory_is_refused(model):
    config = importlib.import_module(f"configs.{model}").get_config()
    config.update(sample_every_steps=1, sample_num_images=10_000)
    programs.make_program(config, jax.devices()[:1])
    config.data.image_size = 512
    if model == "smoke":
        config.model.update(input_size=512, patch_size=8)
    with pytest.raises(ValueError, match=r"a picture of 10,000 images of 512 x \d+ pixels would"):
        programs.make_program(config, jax.devices()[:1])


def test_range_holds_only_numbers_of_its_type():
    whole, real = ranges.Range(0, 9, whole=True), ranges.Range(0, 9)
    assert whole.holds(3)
    assert real.holds(3)
    assert not whole.holds(3.0)
    assert not whole.holds(True)
    assert not real.holds("3")
    assert not real.holds(None)


def test_numbers_of_a_workdir_are_checked_when_it_is_loaded(workdir):
    with pytest.raises(ValueError, match=r"sample.cfg_scale=0.25 must be a number in"):
        runs.load(workdir, settings={"cfg_scale": 0.25})
    path = workdir / "config.json"
    path.write_text(path.read_text().replace('"depth": 2', '"depth": 2000000'))
    with pytest.raises(ValueError, match=r"model.depth=2000000 must be"):
        runs.load(workdir)


@pytest.mark.parametrize("value", [None, [], [1, 1], (1,), {}, "1", True, [[1]], [None]])
def test_value_that_is_no_number_is_refused(value):
    for key in RANGED:
        section, _, name = key.rpartition(".")
        config = {section: {name: value}} if section else {name: value}
        is_valid = keys.KEYS[key].is_list and value in ([], [1, 1], (1,))
        is_valid |= key in sizes.KEYS and value == [1, 1]
        if is_valid or (value is None and keys.KEYS[key].optional):
            keys.check(config)
            continue
        with pytest.raises(ValueError, match=rf"{key}=.* must be "):
            keys.check(config)


def test_rows_agree_with_the_types_in_the_default_config():
    for model in MODELS:
        for key, value in workdirs.flatten(default.get_config(model)).items():
            if key in RANGED:
                assert isinstance(value, list) == keys.KEYS[key].is_list, key
                assert (value is None) == keys.KEYS[key].optional, key


@pytest.mark.parametrize(
    "value", [1e-320, 1e-60, 1e39, 10**40, 10**400], ids=lambda value: str(value)[:9]
)
def test_number_that_is_0_or_infinite_in_float32_is_refused(value):
    config = default.get_config()
    keys.check(config)
    with pytest.raises(ValueError, match=r"optim\.grad_clip_norm=.* is 0 or infinite in float32\."):
        keys.check(dict(optim=dict(grad_clip_norm=value)))


def test_value_of_another_type_is_refused():
    keys.check_type("optim.ema_decay", 1, float)
    keys.check_type("sample.cfg_interval", (0, 0.5), float, many=True)
    with pytest.raises(ValueError, match=r"^sample\.steps=True must be a whole number\.$"):
        keys.check_type("sample.steps", True, int)
    with pytest.raises(ValueError, match=r"^latents\.scale=1 must be a list of numbers\.$"):
        keys.check_type("latents.scale", 1, float, many=True)
    with pytest.raises(ValueError, match=r"^data\.name=\[0, 0.{95}\.\.\. must be a str\.$"):
        keys.check_type("data.name", [0] * 1000, str)
