"""Workdirs: the config, checkpoints and data identity that a run keeps on disk.

A workdir belongs to one run; its config.json is the config of that run.
"""

from dit_jax.workdirs.checkpoint_files import saved_steps
from dit_jax.workdirs.claims import LOCK, claim
from dit_jax.workdirs.identity import load_data, write_data
from dit_jax.workdirs.older_versions import upgrade_sample
from dit_jax.workdirs.run_config import (
    check_config,
    check_draws_images,
    check_step,
    check_types,
    flatten,
    load_config,
    read_config,
    write_config,
)

__all__ = [
    "LOCK",
    "check_config",
    "check_draws_images",
    "check_step",
    "check_types",
    "claim",
    "flatten",
    "load_config",
    "load_data",
    "read_config",
    "saved_steps",
    "upgrade_sample",
    "write_config",
    "write_data",
]
