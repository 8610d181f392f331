"""The mathematics of diffusion: processes, predictions, losses, samplers, guidance, likelihood.

Nothing here knows a network, a dataset or a device mesh: a network is a function that is passed in.
"""

from dit_jax.diffusion.processes import DiscreteProcess, Process, build

__all__ = ["DiscreteProcess", "Process", "build"]
