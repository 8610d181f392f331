"""All keys of a sweep, each with its unit and constraint. Sweeps start from `get_config(base)`."""

from ml_collections import ConfigDict


def get_config(base: ConfigDict) -> ConfigDict:
    """Returns a sweep without cells.

    Args: base, the config of `dit_jax.train` that all cells share.
    """
    config = ConfigDict()
    config.base = base
    # Sizes by name: dict(S=dict(hidden_size=64, depth=4)). A size overrides keys of base.model. If
    # it has the key 'name', it replaces the whole base.model, for example by a UNet.
    config.sizes = ConfigDict()
    # Grids by name. A grid lists values for keys of base, nested as in base; the key 'size' lists
    # names of sizes. Every combination of values is a cell:
    # dict(main=dict(size=("S", "B"), model=dict(patch_size=(2, 4)), seed=(0, 1))).
    config.grids = ConfigDict()
    # Compute points: optimizer steps at which every cell is evaluated. If optim.schedule is not
    # constant, give a single step, or put total_steps into a grid instead.
    config.steps = ()

    config.evaluate = (
        ConfigDict()
    )  # like the flags of dit_jax.evaluate; the sampler is in base.sample
    config.evaluate.num = 1_000  # samples; 0: the table has held-out losses only
    config.evaluate.seed = 0  # of the samples' noise, the same in every cell
    config.evaluate.labels = "balanced"  # balanced, random
    config.evaluate.extractor = ""  # inception, dinov2, pixels; empty: the reference's
    config.evaluate.reference = ""  # empty: the training images
    config.evaluate.weights = ""  # workdir of the extractor's weights; empty: runs/<extractor>
    config.evaluate.batch_size = 0  # samples per batch; 0: the default of dit_jax.evaluate

    config.slurm = ConfigDict()  # for --executor slurm: one job per cell
    config.slurm.partition = ""  # empty: the cluster's default
    config.slurm.timeout_min = 24 * 60
    config.slurm.nodes = 1  # several nodes or tasks: the cell's processes connect into one run
    config.slurm.tasks_per_node = 1
    config.slurm.gpus_per_node = 1
    config.slurm.cpus_per_task = 8
    config.slurm.mem_gb = 64
    config.slurm.jobs_at_once = 16
    return config
