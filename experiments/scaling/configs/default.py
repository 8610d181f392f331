"""Every key of a sweep, with its unit and constraint; sweeps start from `get_config(base)`."""

from ml_collections import ConfigDict


def get_config(base: ConfigDict) -> ConfigDict:
    """A sweep without cells. Args: base, the config of `dit_jax.train` that all cells share."""
    config = ConfigDict()
    config.base = base
    # Sizes by name, each some keys of base.model: dict(S=dict(hidden_size=64, depth=4)). One with
    # the key 'name' is all of another config.model, such as that of a UNet.
    config.sizes = ConfigDict()
    # Grids by name. Each has keys of base, nested as there, with the values that they take; 'size'
    # takes names of sizes. Every combination is a cell:
    # dict(main=dict(size=("S", "B"), model=dict(patch_size=(2, 4)), seed=(0, 1))).
    config.grids = ConfigDict()
    # Compute points: optimizer steps at which every cell is evaluated. With another schedule of
    # the learning rate than constant only the last: put total_steps into a grid instead.
    config.steps = ()

    config.evaluate = ConfigDict()  # as the flags of dit_jax.evaluate; base.sample is the sampler
    config.evaluate.num = 1_000  # samples; 0 leaves the table with held-out losses alone
    config.evaluate.seed = 0  # of their noise, the same in every cell
    config.evaluate.labels = "balanced"  # balanced, random
    config.evaluate.extractor = ""  # inception, dinov2, pixels; empty: that of the reference
    config.evaluate.reference = ""  # empty: the training images
    config.evaluate.weights = ""  # workdir of the extractor's; empty: runs/<extractor>
    config.evaluate.batch_size = 0  # samples at a time; 0 is the default of dit_jax.evaluate

    config.slurm = ConfigDict()  # of executor slurm: one job to a cell
    config.slurm.partition = ""  # empty: the cluster's default
    config.slurm.timeout_min = 24 * 60
    config.slurm.nodes = 1  # with several, or several tasks, the cell's processes connect
    config.slurm.tasks_per_node = 1
    config.slurm.gpus_per_node = 1
    config.slurm.cpus_per_task = 8
    config.slurm.mem_gb = 64
    config.slurm.jobs_at_once = 16
    return config
