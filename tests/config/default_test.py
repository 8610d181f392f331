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
    "sample.grid": [*grids.GRIDS, *grids.CHAIN_GRIDS],
    "fid.extractor": extractors.NAMES,
    **{
        f"sample.{key}": setting.choices
        for key, setting in samplers.SETTINGS.items()
        if setting.choices and key != "sampler"
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


def test_comment_of_the_sampler_names_the_table_and_help_every_row():
    """So that a new sampler is a row, and no edit of the config."""
    assert "SAMPLERS in dit_jax/diffusion/samplers.py" in _comment("sample.sampler")
    text = samplers.SETTINGS["sampler"].help
    assert all(f"{name} ({spec.help})" in text for name, spec in samplers.SAMPLERS.items())
    assert default.get_config().sample.sampler in samplers.SAMPLERS


def test_settings_of_samplers_are_the_keys_of_the_config():
    assert set(samplers.SETTINGS) == set(default.get_config().sample)
