"""The mathematics of diffusion: processes, predictions, losses, samplers, guidance, likelihood.

Nothing here depends on a network, a dataset or a device mesh: a network is passed in as a function.
"""

from dit_jax.diffusion.processes import DiscreteProcess, Process, build

__all__ = ["DiscreteProcess", "Process", "build"]
