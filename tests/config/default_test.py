"""The comments of configs/default.py name every choice that there is."""

import pathlib
import re

import pytest

from configs import default
from dit_jax import conditions, latents
from dit_jax.config import overrides
from dit_jax.diffusion import (
    grids,
    objectives,
    predictions,
    processes,
    sampler_settings,
    samplers,
    schedules,
)
from dit_jax.evaluation import extractors
from dit_jax.models import blocks, options
from dit_jax.training import optimizer

SOURCE = pathlib.Path(default.__file__).read_text()
CHOICES = {
    "optim.name": optimizer.OPTIMIZERS,
    "optim.schedule": optimizer.SCHEDULES,
    "model.block": blocks.BLOCKS,
    "model.condition": conditions.KINDS,
    "model.remat": options.REMAT_POLICIES,
    "diffusion.process": processes.PROCESSES,
    "diffusion.schedule": schedules.SCHEDULES,
    "objective.prediction": predictions.PREDICTIONS,
    "objective.weight": objectives.WEIGHTS,
    "objective.t_distribution": objectives.T_DISTRIBUTIONS,
    "latents.source": latents.KINDS,
    "sample.sampler": samplers.SAMPLERS,
    "sample.grid": [*grids.GRIDS, *grids.CHAIN_GRIDS],
    "fid.extractor": extractors.NAMES,
    **{
        f"sample.{key}": setting.choices
        for key, setting in sampler_settings.SETTINGS.items()
        if setting.choices
    },
}


def _comment(key):
    """What stands above the line of a key, and behind it."""
    lines = SOURCE.splitlines()
    number = next(i for i, line in enumerate(lines) if f"config.{key} = " in line)
    comment = lines[number].partition("#")[2]
    while lines[number - 1].lstrip().startswith("#"):
        number -= 1
        comment = f"{lines[number]} {comment}"
    return comment


@pytest.mark.parametrize("key", CHOICES)
def test_comment_of_a_key_names_every_choice(key):
    named = set(re.findall(r"[\w-]+", _comment(key)))
    assert set(CHOICES[key]) <= named
    assert overrides.get_value(default.get_config(), key) in [*CHOICES[key], ""]


def test_settings_of_samplers_are_the_keys_of_the_config():
    assert set(sampler_settings.SETTINGS) == set(default.get_config().sample)
