"""Refusals of invalid settings in config.sample, and of settings without an effect."""

import pathlib
import re

import pytest

from configs import default
from dit_jax.diffusion import grids, samplers


def _settings(**changes):
    config = default.get_config().sample
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("process", "change", "message"),
    [
        ("ddpm", dict(sampler="plms"), "unknown sampler='plms'; choose one of ddpm, ddim, ddim_le"),
        (
            "ddpm",
            dict(sampler="euler_maruyama"),
            "'euler_maruyama' does not work with diffusion.process=ddpm; choose ddpm, .*, ab4.$",
        ),
        ("ddpm", dict(steps=1001), "cannot take 1001 sampling steps"),
        ("flow", dict(steps=0), "a grid must have a step or more and end at data, t = 0"),
        (
            "ddpm",
            dict(eta=0.5),
            "eta=0.5 has no effect with sampler 'ddpm'. It is for ddim, ddim_level1.",
        ),
        ("edm", dict(sampler="heun", churn=1.0, churn_range=(1.0,)), "churn_range=1.0 must be two"),
        ("edm", dict(sampler="heun", churn=1.0, churn_range=(2.0, 1.0)), "=2.0,1.0 must be two"),
        ("flow", dict(cfg_interval=(0.5, 0.5)), "cfg_interval=0.5,0.5 must be two numbers, low <"),
        ("flow", dict(cfg_interval=(0.8, 0.2)), "cfg_interval=0.8,0.2 must be two numbers, low <"),
        ("flow", dict(cfg_interval=(0.5,)), "cfg_interval=0.5 must be two numbers, low < high"),
        ("ddpm", dict(variance="medium"), "unknown variance='medium'"),
        (
            "flow",
            dict(sampler="heun", churn=1.0),
            "churn=1.0 needs diffusion.process=edm or vp",
        ),
        ("edm", dict(sampler="euler", churn=1.0), "with sampler 'euler'. It is for heun"),
        (
            "flow",
            dict(sde_diffusion="linear"),
            "unknown sde_diffusion='linear'; choose one of sigma, s",
        ),
        ("flow", dict(last_step="heun"), "unknown last_step='heun'; choose one of mean, euler"),
        ("flow", dict(sampler="euler_maruyama", steps=1), "needs at least 2 steps, not steps=1"),
        (
            "flow",
            dict(sampler="euler_maruyama", last_step_t=0.9995),
            "last_step_t=0.9995 must be less than 0.999, the grid's first time",
        ),
        ("flow", dict(grid="ddim"), "grid 'ddim' is for process ddpm only; choose"),
        (
            "flow",
            dict(sampler="ddim_level1"),
            "does not work with a process in continuous time; ch",
        ),
        ("ddpm", dict(sampler="ddim_level1"), "grid begins at level 1, where .* Choose grid leadi"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(build_process, process, change, message):
    with pytest.raises(ValueError, match=message):
        samplers.build(_settings(**change), build_process(process), "eps")


@pytest.mark.parametrize(
    ("change", "keys", "learn_sigma", "message"),
    [
        (dict(sampler="euler"), ["steps", "last_step"], False, "'euler'. It is for euler_maruyama"),
        ({}, ["rho"], True, r"rho=7\.0 has no effect with grid 'uniform'. It is for karras"),
        (
            dict(sampler="heun"),
            ["churn_noise"],
            False,
            "churn_noise=1.0 has no effect with churn=0",
        ),
        (dict(cfg_scale=1.0), ["cfg_rescale"], True, "cfg_rescale=0.0 has no effect with cfg_s"),
        (dict(cfg_scale=1.0), ["cfg_channels"], True, "Give a larger cfg_scale"),
        (dict(cfg_scale=1.0), ["cfg_interval"], True, "Give a larger cfg_scale"),
        ({}, ["variance"], True, "variance=large has no effect, .* Leave it out"),
    ],
    ids=str,
)
def test_keys_without_an_effect_are_refused(change, keys, learn_sigma, message):
    with pytest.raises(ValueError, match=message):
        samplers.check_used(_settings(**change), keys, learn_sigma)


def test_keys_with_an_effect_are_accepted():
    config = _settings(sampler="heun", churn=1.0)
    guidance = ["cfg_scale", "cfg_channels", "cfg_interval", "cfg_rescale"]
    samplers.check_used(config, ["churn", "churn_noise", "steps", "sampler", *guidance], True)
    samplers.check_used(_settings(), ["variance"], False)


def test_grid_with_thousands_of_digits_is_refused_as_unknown(process):
    with pytest.raises(ValueError, match="unknown grid"):
        samplers.build(_settings(grid="9" * 5000), process, "eps")


@pytest.mark.parametrize(
    ("flag", "names"),
    [("--sampler", samplers.SAMPLERS), ("--grid", {**grids.GRIDS, **grids.CHAIN_GRIDS})],
)
def test_docs_list_every_sampler_and_grid(flag, names):
    page = pathlib.Path(__file__).parents[2] / "docs" / "sampling.md"
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| `{flag}` |")]
    assert re.findall(r"`([a-z]\w*)`", row) == list(names)
