"""A sweep of two tiny cells, and copies of its finished directory."""

import shutil

from experiments.scaling.cells import grid
from experiments.scaling.configs import smoke


def make_sweep(digits_dir):
    """Two cells of configs/smoke.py of sweeps, with compute points 10 and 20, free to change."""
    config = smoke.get_config().unlock()
    config.base.data.data_dir = str(digits_dir)
    config.grids = dict(main=dict(size=("XS",), model=dict(patch_size=(2, 4))))
    config.steps = (10, 20)
    return config


def copy_cells(swept, workdir, config):
    """Copies the finished sweep's directory to the workdir, to change; returns its cells."""
    shutil.copytree(swept, workdir, dirs_exist_ok=True)
    return grid.make_cells(config)
