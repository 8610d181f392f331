"""The comments in configs/default.py name all choices of a key."""

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
    """Returns the comment above the line of a key, and behind it."""
    lines = SOURCE.splitlines()
    index = next(i for i, line in enumerate(lines) if f"config.{key} = " in line)
    comment = lines[index].partition("#")[2]
    while lines[index - 1].lstrip().startswith("#"):
        index -= 1
        comment = f"{lines[index]} {comment}"
    return comment


@pytest.mark.parametrize("key", CHOICES)
def test_comment_of_a_key_names_every_choice(key):
    named = set(re.findall(r"[\w-]+", _comment(key)))
    assert set(CHOICES[key]) <= named
    assert overrides.get_value(default.get_config(), key) in [*CHOICES[key], ""]


def test_comment_of_the_sampler_names_the_table_and_its_help_names_all_samplers():
    """So a new sampler is a row of the table, without a change of the config's comment."""
    assert "SAMPLERS in dit_jax/diffusion/samplers.py" in _comment("sample.sampler")
    text = samplers.SETTINGS["sampler"].help
    assert all(f"{name} ({spec.help})" in text for name, spec in samplers.SAMPLERS.items())
    assert default.get_config().sample.sampler in samplers.SAMPLERS


def test_settings_of_samplers_are_the_keys_of_the_config():
    assert set(samplers.SETTINGS) == set(default.get_config().sample)
